"""Object pairs: which ones exist, which are risky, and which are held out of training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from data_gen.seeds import rng
from data_gen.taxonomy.facts import Relation, Taxonomy


@dataclass(frozen=True)
class PairTable:
    """Held-out object pairs. A held-out pair never meets in a training row, in either order.

    Each object keeps training partners in every other class: what is new in the test is the pair, not the object and
    not the two classes.
    """

    taxonomy: Taxonomy
    held_out: frozenset[frozenset[str]]

    def is_held_out(self, first: str, second: str) -> bool:
        """Whether two objects (slugs) are kept for the test."""
        return frozenset((first, second)) in self.held_out

    def partners(self, thing: str, class_id: str, *, held_out: bool) -> list[str]:
        """Objects of a class that `thing` meets on one side of the split, in taxonomy order."""
        slugs = [other.slug for other in self.taxonomy.class_by_id[class_id].objects]
        return [slug for slug in slugs if self.is_held_out(thing, slug) == held_out]

    def ordered_pairs(self, relation: Relation, *, held_out: bool) -> list[tuple[str, str]]:
        """Object pairs of a relation on one side of the split, in both orders."""
        first, second = (self.taxonomy.class_by_id[name].objects for name in relation.classes)
        pairs = [(a.slug, b.slug) for a in first for b in second if self.is_held_out(a.slug, b.slug) == held_out]
        return pairs + [(b, a) for a, b in pairs]


def pair_table(taxonomy: Taxonomy, *, seed: int) -> PairTable:
    """Hold out, for each two classes, a matching that touches every object of the larger class once."""
    held: set[frozenset[str]] = set()
    for first, second in itertools.combinations(taxonomy.classes, 2):
        generator = rng(seed, "held-out-pairs", first.id, second.id)
        a, b = ([thing.slug for thing in group.objects] for group in (first, second))
        generator.shuffle(a)
        generator.shuffle(b)
        held |= {frozenset((a[i % len(a)], b[i % len(b)])) for i in range(max(len(a), len(b)))}
    return PairTable(taxonomy=taxonomy, held_out=frozenset(held))
