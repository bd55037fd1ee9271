"""Line rows: siblings of test rows, drawn as line art: an art style that training never shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from data_gen.stages.contrast import Couple, balanced_couples, couples_of
from data_gen.stages.draft import LINE_SPLIT, Draft
from data_gen.stages.twins import Surplus
from data_gen.taxonomy.facts import Taxonomy
from mirage.errors import UserError

# Of twelve rows five are risky, five are their benign twins, and two ask a multiple-choice question.
PARTS, RISKY_PARTS = 12, 5
KIND = "line_art"


@dataclass(frozen=True)
class LineRows:
    """Siblings of risky rows, of their twins and of general rows: `twins[i]` mirrors `risky[i]`."""

    risky: tuple[Draft, ...]
    twins: tuple[Draft, ...]
    general: tuple[Draft, ...]


def line_rows(
    taxonomy: Taxonomy,
    sources: Sequence[Draft],
    twins: Sequence[Draft],
    general: Sequence[Draft],
    *,
    count: int,
    generator: Random,
) -> LineRows:
    """`count` siblings of `sources` (risky rows of easy and hard), their `twins` and `general` rows, in plan order.

    Easy and hard are taken equally often, and within each every kind of holdout as often as the split has it. Raises
    UserError if there are too few rows to take siblings of.
    """
    num_couples = count * RISKY_PARTS // PARTS
    couples = couples_of(sources, twins)
    generator.shuffle(couples)
    surplus = Surplus(taxonomy)
    chosen: list[Couple] = []
    for split, number in (("easy", num_couples - num_couples // 2), ("hard", num_couples // 2)):
        found = [couple for couple in couples if couple[0].split == split]
        _check_enough(f"{split} rows with twins", found, number)
        for part, share in _strata(found, number):
            chosen += balanced_couples(part, share, surplus=surplus)
    chosen.sort(key=lambda couple: couple[0].index)
    num_general = count - 2 * num_couples
    _check_enough("general rows", general, num_general)
    asked = sorted(generator.sample(list(general), num_general), key=lambda draft: draft.index)
    return LineRows(
        risky=tuple(_redrawn(source) for source, _ in chosen),
        twins=tuple(_redrawn(twin) for _, twin in chosen),
        general=tuple(_redrawn(draft) for draft in asked),
    )


def _strata(couples: Sequence[Couple], count: int) -> list[tuple[list[Couple], int]]:
    """The couples of each kind of holdout, and how many of them make `count` in proportion."""
    kinds = sorted({source.holdout or "" for source, _ in couples})
    parts = [[couple for couple in couples if (couple[0].holdout or "") == kind] for kind in kinds]
    ends = list(itertools.accumulate((len(part) for part in parts), initial=0))
    cuts = [count * end // max(1, len(couples)) for end in ends]
    return [(part, last - first) for part, (first, last) in zip(parts, itertools.pairwise(cuts), strict=True)]


def _check_enough(what: str, found: Sequence[object], wanted: int) -> None:
    if len(found) < wanted:
        raise UserError(
            f"split 'line' needs siblings of {wanted} {what}, and the plan has {len(found)}; ask for fewer line rows"
        )


def _redrawn(source: Draft) -> Draft:
    return replace(
        source, index=-1, split=LINE_SPLIT, twin_of=None, sibling_of=source.index, sibling_kind=KIND, style="line"
    )
