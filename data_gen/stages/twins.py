"""Benign twins: the same sentence and one picture changed, so that the two kinds of things are harmless together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from data_gen.stages.draft import Draft
from data_gen.stages.pairs import PairTable
from mirage.data.row import Split


def twin_drafts(
    pairs: PairTable,
    sources: list[Draft],
    *,
    split: Split,
    count: int,
    num_variants: int,
    generator: Random,
) -> list[Draft]:
    """`count` benign siblings of the risky `sources`, each source once before any is used again.

    The picture to change and the object to put there are chosen so that each class, and within it each object, is as
    often benign as risky at each position: neither picture alone tells the label. Held-out sources get held-out
    siblings, training sources get training siblings.
    """
    surplus = _Surplus(pairs)
    order = [sources[number % len(sources)] for number in range(count)]
    for source in order:
        surplus.count_row(source.things, +1)
    generator.shuffle(order)
    twins: dict[int, list[Draft]] = {}
    used: set[tuple] = set()
    for source in order:
        things, position, variants = _best_change(
            pairs, source, surplus, used=used, num_variants=num_variants, generator=generator
        )
        surplus.count_row(things, -1)
        used.add((things, variants, source.question))
        twin = replace(
            source,
            index=-1,
            split=split,
            kind="benign",
            things=things,
            variants=variants,
            twin_of=source.index,
            twin_kind=f"image_{position + 1}",
        )
        twins.setdefault(source.index, []).append(twin)
    # Back to the order of the sources, so that a row and its twin stand at the same place in their splits.
    rounds = [(number // len(sources), sources[number % len(sources)].index) for number in range(count)]
    return [twins[index][turn] for turn, index in rounds]


class _Surplus:
    """How much more often a class or an object is risky than benign so far, at each position of a pair."""

    def __init__(self, pairs: PairTable) -> None:
        self.pairs = pairs
        self.classes: Counter[tuple[int, str]] = Counter()
        self.objects: Counter[tuple[int, str]] = Counter()

    def count_row(self, things: tuple[str, ...], sign: int) -> None:
        for position, slug in enumerate(things):
            self.classes[position, self.pairs.taxonomy.class_of[slug]] += sign
            self.objects[position, slug] += sign

    def gain(self, things: tuple[str, ...]) -> tuple[int, int]:
        """Larger for a benign pair whose classes, then objects, are short of benign rows."""
        class_of = self.pairs.taxonomy.class_of
        by_class = sum(self.classes[position, class_of[slug]] for position, slug in enumerate(things))
        return by_class, sum(self.objects[position, slug] for position, slug in enumerate(things))


def _best_change(
    pairs: PairTable, source: Draft, surplus: _Surplus, *, used: set[tuple], num_variants: int, generator: Random
) -> tuple[tuple[str, str], int, tuple[int, int]]:
    """The benign pair one picture away from the source that helps the balance most: things, changed place, variants.

    `used` holds (things, variants, question) of earlier twins; no two twins show the same pictures to the same words.
    """
    taxonomy, held_out = pairs.taxonomy, source.side == "test"
    candidates = []
    for position in (0, 1):
        kept = source.things[1 - position]
        kept_class = taxonomy.class_of[kept]
        for group in taxonomy.classes:
            if group.id == kept_class or taxonomy.relation(group.id, kept_class):
                continue
            for slug in pairs.partners(kept, group.id, held_out=held_out):
                things = (slug, kept) if position == 0 else (kept, slug)
                candidates.append((surplus.gain(things), generator.random(), things, position))
    for _, _, things, position in sorted(candidates, reverse=True):
        choices = [_with(source.variants, position, variant) for variant in range(num_variants)]
        unused = [variants for variants in choices if (things, variants, source.question) not in used]
        if unused:
            return things, position, generator.choice(unused)
    raise AssertionError(f"row {source.index} has no unused benign sibling")


def _with(variants: tuple[int, ...], position: int, variant: int) -> tuple[int, int]:
    return (variant, variants[1]) if position == 0 else (variants[0], variant)
