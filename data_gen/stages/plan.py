"""Stage 1, plan: decide every row's objects, question and drawings. Nothing after it makes a choice of content."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import get_args

from data_gen.seeds import rng
from data_gen.settings import Settings
from data_gen.stages.contrast import contrast_rows
from data_gen.stages.draft import Draft, Holdout
from data_gen.stages.general import general_drafts
from data_gen.stages.line import line_rows
from data_gen.stages.multi import MultiPlanner, multi_rows
from data_gen.stages.pairs import PairTable, size_pairs
from data_gen.stages.phrase import Wording, WordingPools, multi_pools, protect_pools, wording_pools
from data_gen.stages.quotas import balanced_quotas
from data_gen.stages.twins import Change, settle, twin_draft, twin_drafts
from data_gen.taxonomy.facts import Relation, Taxonomy
from mirage.data.row import Split

VERSION = "2"
OVERT_RATE = 0.08  # share of training rows whose text itself states a bad intent (paper section 3.2, split rule)
MAX_REDRAWS = 1000  # a question that was used for the same pictures is drawn again; this many repeats means a full pool


@dataclass
class Planner:
    """Shared state of planning: facts, pools, and the drafts so far."""

    taxonomy: Taxonomy
    settings: Settings
    pairs: PairTable
    wordings: WordingPools
    drafts: list[Draft] = field(default_factory=list)

    def num_variants(self, side: str) -> int:
        """Drawings of a concept on one side."""
        size = self.settings.size
        return size.train_variants if side == "train" else size.test_variants

    def add(self, drafts: list[Draft]) -> list[Draft]:
        """Number drafts by their place in the plan and keep them."""
        start = len(self.drafts)
        numbered = [replace(draft, index=start + offset) for offset, draft in enumerate(drafts)]
        self.drafts.extend(numbered)
        return numbered


def plan(taxonomy: Taxonomy, *, settings: Settings) -> tuple[Draft, ...]:
    """All drafts of a build in row order. A pure function of taxonomy and settings.

    The number of rows of each split is exactly what the size asks for.
    """
    seed, size = settings.seed, settings.size
    rows = {split: size.rows.get(split, 0) for split in get_args(Split)}
    table = size_pairs(taxonomy, size, seed=seed)
    planner = Planner(taxonomy, settings, table, wording_pools(taxonomy, seed=seed))
    train = planner.add(_risky_drafts(planner, "train", taxonomy.relations, rows["train"]))
    sources = [draft for draft in train if not draft.overt]
    train_twins = planner.add(_twins(planner, "train_twins", sources, rows["train_twins"]))
    planner.add(general_drafts(taxonomy, planner.pairs, settings=settings, split="train_general"))
    easy_relations = tuple(relation for relation in taxonomy.relations if relation.visible_harm)
    hard_relations = tuple(relation for relation in taxonomy.relations if not relation.visible_harm)
    quotas = _test_quotas(planner, easy=easy_relations, hard=hard_relations)
    easy = _risky_drafts(planner, "easy", easy_relations, rows["easy"], quotas=quotas.get("easy"))
    hard = _risky_drafts(planner, "hard", hard_relations, rows["hard"], quotas=quotas.get("hard"))
    tested, changes = _settled(planner, easy + hard, rows["twins"])
    tested = [*planner.add(tested[: len(easy)]), *planner.add(tested[len(easy) :])]
    planner.add(_real_drafts(planner, rows["real"]))
    if changes:
        twins = planner.add([twin_draft(source, change, "twins") for source, change in zip(tested, changes)])
    else:
        twins = planner.add(_twins(planner, "twins", tested, rows["twins"]))
    general = planner.add(general_drafts(taxonomy, planner.pairs, settings=settings, split="general"))
    # Later splits stand behind earlier ones, so that asking for more of them leaves the others as they are.
    _add_contrast(planner, "train_contrast", sources, train_twins, rows["train_contrast"])
    _add_multi(planner, "train_multi", rows["train_multi"])
    _add_contrast(planner, "contrast", tested, twins, rows["contrast"])
    _add_multi(planner, "multi", rows["multi"])
    _add_line(planner, tested, twins, general, rows["line"])
    return tuple(planner.drafts)


def _add_contrast(planner: Planner, split: Split, sources: list[Draft], twins: list[Draft], count: int) -> None:
    pool = protect_pools(seed=planner.settings.seed)
    made = contrast_rows(
        planner.taxonomy,
        sources,
        twins,
        split=split,
        count=count,
        draw_protective=pool.draw_train if split == "train_contrast" else pool.draw_test,
        generator=rng(planner.settings.seed, "contrast", split),
    )
    _add_mirrored(planner, list(made.risky), list(made.twins))
    planner.add(list(made.protective))


def _add_multi(planner: Planner, split: Split, count: int) -> None:
    seed, side = planner.settings.seed, "train" if split == "train_multi" else "test"
    generator = rng(seed, "multi", split)
    multi = MultiPlanner(
        pairs=planner.pairs,
        pools=multi_pools(seed=seed),
        split=split,
        num_variants=planner.num_variants(side),
        generator=generator,
    )
    pairs = _risky_pairs(planner, planner.taxonomy.relations, holdout=multi.holdout, generator=generator)
    _add_mirrored(planner, *multi_rows(multi, pairs, count))


def _add_line(planner: Planner, sources: list[Draft], twins: list[Draft], general: list[Draft], count: int) -> None:
    generator = rng(planner.settings.seed, "line")
    made = line_rows(planner.taxonomy, sources, twins, general, count=count, generator=generator)
    _add_mirrored(planner, list(made.risky), list(made.twins))
    planner.add(list(made.general))


def _add_mirrored(planner: Planner, risky: list[Draft], twins: list[Draft]) -> None:
    """Add risky rows, then the benign rows that mirror them one by one."""
    numbered = planner.add(risky)
    planner.add([replace(twin, twin_of=draft.index) for draft, twin in zip(numbered, twins, strict=True)])


def _settled(planner: Planner, sources: list[Draft], num_twins: int) -> tuple[list[Draft], list[Change]]:
    """Test rows and the changes that make their twins, chosen together where the size asks for it and can."""
    passes = planner.settings.size.balance_passes
    if not passes or num_twins > len(sources):
        return sources, []
    settled, changes = settle(
        planner.pairs,
        sources[:num_twins],
        num_variants=planner.num_variants("test"),
        generator=rng(planner.settings.seed, "settle"),
        passes=passes,
    )
    return settled + sources[num_twins:], changes


def _twins(planner: Planner, split: Split, sources: list[Draft], count: int) -> list[Draft]:
    side = "train" if split == "train_twins" else "test"
    return twin_drafts(
        planner.pairs,
        sources,
        split=split,
        count=count,
        num_variants=planner.num_variants(side),
        generator=rng(planner.settings.seed, "twins", split),
        passes=planner.settings.size.balance_passes,
    )


def _cycle(items: list, generator: Random) -> Iterator:
    """The items in a new random order each time round, for ever."""
    while True:
        order = list(items)
        generator.shuffle(order)
        yield from order


def _unused_wording(used: set[tuple], key: tuple, draw: Callable[[], Wording]) -> Wording:
    """A wording not yet used with `key`."""
    for _ in range(MAX_REDRAWS):
        wording = draw()
        if (*key, wording.text) not in used:
            used.add((*key, wording.text))
            return wording
    raise AssertionError(f"no unused wording is left for {key}")


Quotas = dict[tuple[str, str], int]


def _test_quotas(planner: Planner, **relations: tuple[Relation, ...]) -> dict[str, Quotas]:
    """How often each relation whose classes training shows together is asked about; empty where all are alike."""
    size = planner.settings.size
    if not size.balance_passes:
        return {}
    trained = {
        part: tuple(relation for relation in found if not planner.pairs.holds_classes(*relation.classes))
        for part, found in relations.items()
    }
    uses = balanced_quotas(planner.pairs, {part: (found, size.rows[part]) for part, found in trained.items()})
    return {
        part: {relation.classes: number for relation, number in zip(found, uses[part], strict=True)}
        for part, found in trained.items()
    }


def _spread(relations: list[Relation], quotas: Quotas) -> list[Relation]:
    """A round of relations in which each stands as often as its quota says, evenly spread."""
    places = [
        ((turn + 0.5) / quotas[relation.classes], number)
        for number, relation in enumerate(relations)
        for turn in range(quotas[relation.classes])
    ]
    return [relations[number] for _, number in sorted(places)]


def _risky_pairs(
    planner: Planner,
    relations: tuple[Relation, ...],
    *,
    holdout: Holdout | None,
    generator: Random,
    quotas: Quotas | None = None,
) -> Iterator[tuple[str, str]]:
    """Risky object pairs for ever: every relation in turn or by quota, and within it every pair of one side in turn."""
    pairs = {relation.classes: planner.pairs.ordered_pairs(relation, holdout=holdout) for relation in relations}
    cycles = {classes: _cycle(found, generator) for classes, found in pairs.items() if found}
    assert cycles, f"no relation has pairs with holdout {holdout}"
    present = [relation for relation in relations if relation.classes in cycles]
    deck: Iterator[Relation] = (
        _cycle(present, generator) if quotas is None else itertools.cycle(_spread(present, quotas))
    )
    for relation in deck:
        yield next(cycles[relation.classes])


def _shares(count: int, shares: dict[Holdout, int]) -> dict[Holdout, int]:
    """`count` rows cut by percent; what rounding leaves over goes to the first kind."""
    parts = {kind: count * share // 100 for kind, share in shares.items()}
    parts[next(iter(parts))] += count - sum(parts.values())
    return parts


def _risky_drafts(
    planner: Planner, split: Split, relations: tuple[Relation, ...], count: int, *, quotas: Quotas | None = None
) -> list[Draft]:
    """Rows about risky pairs, with the size's share of each kind of holdout in the test."""
    generator = rng(planner.settings.seed, "risky", split)
    used: set[tuple] = set()
    if split == "train":
        return _risky_part(planner, split, relations, count, holdout=None, used=used, generator=generator)
    drafts: list[Draft] = []
    parts = _shares(count, planner.settings.size.holdout_shares)
    for holdout, number in parts.items():
        drafts += _risky_part(
            planner,
            split,
            relations,
            number,
            holdout=holdout,
            used=used,
            generator=generator,
            quotas=None if holdout == "class_pair" else quotas,
        )
    if len(parts) > 1:
        generator.shuffle(drafts)
    return drafts


def _risky_part(
    planner: Planner,
    split: Split,
    relations: tuple[Relation, ...],
    count: int,
    *,
    holdout: Holdout | None,
    used: set[tuple],
    generator: Random,
    quotas: Quotas | None = None,
) -> list[Draft]:
    num_variants = planner.num_variants("train" if holdout is None else "test")
    pairs = _risky_pairs(planner, relations, holdout=holdout, generator=generator, quotas=quotas)
    drafts: list[Draft] = []
    for _ in range(count):
        things = next(pairs)
        overt = split == "train" and generator.random() < OVERT_RATE
        pools = planner.wordings
        draw = pools.draw_overt if overt else pools.draw_train if split == "train" else pools.draw_test
        wording = _unused_wording(used, things, partial(draw, generator))
        drafts.append(
            Draft(
                index=-1,
                split=split,
                kind="risky",
                things=things,
                variants=(generator.randrange(num_variants), generator.randrange(num_variants)),
                question=wording.text,
                template=wording.family,
                unseen_family=wording.unseen_family,
                overt=overt,
                holdout=holdout,
            )
        )
    return drafts


def _real_drafts(planner: Planner, count: int) -> list[Draft]:
    """Rows whose two pictures are photographs; a variant is a crop, numbered so that none is used twice in a pair."""
    taxonomy, generator = planner.taxonomy, rng(planner.settings.seed, "real")
    photos = [photo.slug for photo in taxonomy.photos]
    pairs = [(a, b) for a in photos for b in photos if a != b and taxonomy.relation_of_things(a, b)]
    cycle = _cycle(pairs, generator)
    drafts: list[Draft] = []
    used: set[tuple] = set()
    for number in range(count):
        things = next(cycle)
        wording = _unused_wording(used, things, partial(planner.wordings.draw_test, generator))
        drafts.append(
            Draft(
                index=-1,
                split="real",
                kind="risky",
                things=things,
                variants=(number, number),
                question=wording.text,
                template=wording.family,
                unseen_family=wording.unseen_family,
            )
        )
    return drafts
