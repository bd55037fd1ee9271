"""Contrast rows: siblings of rows about two pictures with the order, the intent, or the way of naming changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from data_gen.stages.draft import Draft
from data_gen.stages.phrase import Wording, name_objects
from data_gen.stages.twins import Surplus
from data_gen.taxonomy.facts import Taxonomy
from mirage.data.row import Split

# Percent of a contrast split. Rows of the first two kinds come in pairs, a sibling of a risky row and one of its twin.
SHARES = {"swap_order": 40, "all_in_text": 40, "protective_intent": 20}
WINDOW = 300  # couples that are compared at a time when a balanced subset is taken

Couple = tuple[Draft, Draft]  # a risky row and its benign twin


@dataclass(frozen=True)
class ContrastRows:
    """Siblings of risky rows, and of their twins: `twins[i]` mirrors `risky[i]`, its `twin_of` still to be set."""

    risky: tuple[Draft, ...]
    twins: tuple[Draft, ...]
    protective: tuple[Draft, ...]


def contrast_rows(
    taxonomy: Taxonomy,
    sources: Sequence[Draft],
    twins: Sequence[Draft],
    *,
    split: Split,
    count: int,
    draw_protective: Callable[[Random], Wording],
    generator: Random,
) -> ContrastRows:
    """`count` siblings of `sources` (risky rows) and `twins` (their benign siblings), as `SHARES` says.

    Swapping the order and naming both objects in the text change nothing: the risky sibling is still risky and the
    benign one benign. Asking to keep the things safely apart makes a risky row one to help with.
    """
    couples = couples_of(sources, twins)
    generator.shuffle(couples)
    num_pairs = {kind: count * share // 200 for kind, share in SHARES.items()}
    risky, benign = [], []
    for source, twin in balanced_couples(couples, num_pairs["swap_order"], surplus=Surplus(taxonomy)):
        risky.append(_swapped(source, split))
        benign.append(replace(_swapped(twin, split), twin_kind=_other_place(twin)))
    nameable = [couple for couple in couples[::-1] if _question(taxonomy, couple[0]) is not None]
    named = balanced_couples(nameable, num_pairs["all_in_text"], surplus=Surplus(taxonomy))
    for number, (source, twin) in enumerate(named):
        # Where there is a picture, it is the one that both siblings share.
        place = 1 - _changed(twin) if number % 2 else None
        risky.append(_named(taxonomy, source, split, place=place))
        benign.append(replace(_named(taxonomy, twin, split, place=place), twin_kind=f"object_{_changed(twin) + 1}"))
    protective = [
        _protective(source, split, draw_protective(generator)) for source, _ in couples[: count - 2 * len(risky)]
    ]
    return ContrastRows(tuple(risky), tuple(benign), tuple(protective))


def couples_of(sources: Sequence[Draft], twins: Sequence[Draft]) -> list[Couple]:
    """Each of the risky sources that has a benign twin, with the last of its twins."""
    by_index = {draft.index: draft for draft in sources}
    last = {twin.twin_of: twin for twin in twins if twin.twin_of in by_index}
    return [(by_index[index], twin) for index, twin in last.items() if index is not None]


def balanced_couples(couples: Sequence[Couple], count: int, *, surplus: Surplus) -> list[Couple]:
    """`count` of the couples, each the best of the next few for every object to be as often risky as benign.

    `surplus` holds what was chosen before, and counts what is chosen here.
    """
    left = list(couples)
    chosen: list[Couple] = []
    while left and len(chosen) < count:
        gains = [
            (sum(surplus.gain(twin.things)) - sum(surplus.gain(source.things)), -number)
            for number, (source, twin) in enumerate(left[:WINDOW])
        ]
        source, twin = left.pop(-max(gains)[1])
        surplus.count_row(source.things, +1)
        surplus.count_row(twin.things, -1)
        chosen.append((source, twin))
    return chosen


def _sibling(source: Draft, split: Split, kind: str) -> Draft:
    return replace(source, index=-1, split=split, twin_of=None, sibling_of=source.index, sibling_kind=kind)


def _changed(twin: Draft) -> int:
    """Position of the picture in which a twin differs from its risky row."""
    assert twin.twin_kind is not None
    return int(twin.twin_kind.removeprefix("image_")) - 1


def _other_place(twin: Draft) -> str:
    return f"image_{2 - _changed(twin)}"


def _swapped(source: Draft, split: Split) -> Draft:
    draft = _sibling(source, split, "swap_order")
    return replace(draft, things=source.things[::-1], variants=source.variants[::-1])


def _question(taxonomy: Taxonomy, source: Draft) -> str | None:
    first, second = (taxonomy.things[slug].noun for slug in source.things)
    return name_objects(taxonomy, source.question, (first, second))


def _named(taxonomy: Taxonomy, source: Draft, split: Split, *, place: int | None) -> Draft:
    """The sibling whose text names both objects; it shows the picture at `place`, or none."""
    question = _question(taxonomy, source)
    assert question is not None, "a twin has its source's words"
    shown = slice(0, 0) if place is None else slice(place, place + 1)
    draft = _sibling(source, split, "all_in_text")
    return replace(
        draft,
        question=question,
        named=source.things,
        things=source.things[shown],
        variants=source.variants[shown],
    )


def _protective(source: Draft, split: Split, wording: Wording) -> Draft:
    draft = _sibling(source, split, "protective_intent")
    return replace(
        draft,
        kind="benign",
        intent="protect",
        question=wording.text,
        template=wording.family,
        unseen_family=wording.unseen_family,
        twin_of=source.index,
        twin_kind="intent",
    )
