"""Stage 1, plan: decide every row's objects, question and drawings. Nothing after it makes a choice of content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from data_gen.seeds import rng
from data_gen.settings import Settings
from data_gen.stages.draft import Draft
from data_gen.stages.general import general_drafts
from data_gen.stages.pairs import PairTable, pair_table
from data_gen.stages.phrase import Wording, WordingPools, wording_pools
from data_gen.stages.twins import twin_drafts
from data_gen.taxonomy.facts import Relation, Taxonomy
from mirage.data.row import Split

VERSION = "1"
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
    seed, rows = settings.seed, settings.size.rows
    planner = Planner(taxonomy, settings, pair_table(taxonomy, seed=seed), wording_pools(taxonomy, seed=seed))
    train = planner.add(_risky_drafts(planner, "train", taxonomy.relations, rows["train"]))
    sources = [draft for draft in train if not draft.overt]
    planner.add(_twins(planner, "train_twins", sources, rows["train_twins"]))
    planner.add(general_drafts(taxonomy, planner.pairs, settings=settings, split="train_general"))
    easy_relations = tuple(relation for relation in taxonomy.relations if relation.visible_harm)
    hard_relations = tuple(relation for relation in taxonomy.relations if not relation.visible_harm)
    easy = planner.add(_risky_drafts(planner, "easy", easy_relations, rows["easy"]))
    hard = planner.add(_risky_drafts(planner, "hard", hard_relations, rows["hard"]))
    planner.add(_real_drafts(planner, rows["real"]))
    planner.add(_twins(planner, "twins", easy + hard, rows["twins"]))
    planner.add(general_drafts(taxonomy, planner.pairs, settings=settings, split="general"))
    return tuple(planner.drafts)


def _twins(planner: Planner, split: Split, sources: list[Draft], count: int) -> list[Draft]:
    side = "train" if split == "train_twins" else "test"
    return twin_drafts(
        planner.pairs,
        sources,
        split=split,
        count=count,
        num_variants=planner.num_variants(side),
        generator=rng(planner.settings.seed, "twins", split),
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


def _risky_drafts(planner: Planner, split: Split, relations: tuple[Relation, ...], count: int) -> list[Draft]:
    """Rows about risky pairs: every relation in turn, and within it every object pair in turn."""
    generator = rng(planner.settings.seed, "risky", split)
    held_out = split != "train"
    num_variants = planner.num_variants("test" if held_out else "train")
    pair_cycles = {
        relation.classes: _cycle(planner.pairs.ordered_pairs(relation, held_out=held_out), generator)
        for relation in relations
    }
    relation_cycle = _cycle(list(relations), generator)
    drafts: list[Draft] = []
    used: set[tuple] = set()
    for _ in range(count):
        things = next(pair_cycles[next(relation_cycle).classes])
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
