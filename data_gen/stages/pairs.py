"""Object pairs: which ones are risky, and which are held out of training, with their objects or their classes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from data_gen.seeds import rng
from data_gen.settings import PAIRS_ONLY, Size
from data_gen.stages.draft import Holdout
from data_gen.taxonomy.facts import Relation, Taxonomy
from mirage.errors import UserError

HELD_RELATIONS_SHARE = 0.1  # of the risky class pairs; as many benign ones are held out beside them

Pair = frozenset[str]


@dataclass(frozen=True)
class PairTable:
    """What training never sees. A held-out object pair never meets in a training row of any kind, in either order.

    Held-out objects and class pairs are more: no training row that asks about a pair shows such an object or two
    objects of such classes; rows that name and compare may show them, so that the objects are known.
    """

    taxonomy: Taxonomy
    held_out: frozenset[Pair]
    objects: frozenset[str] = frozenset()
    class_pairs: frozenset[Pair] = frozenset()
    _partners: dict[tuple[str, str, Holdout | None], list[str]] = field(default_factory=dict, compare=False, repr=False)

    def is_held_out(self, first: str, second: str) -> bool:
        """Whether two objects (slugs) are kept for the test."""
        return frozenset((first, second)) in self.held_out

    def holds_classes(self, first: str, second: str) -> bool:
        """Whether the two classes (ids) are held out of training together."""
        return frozenset((first, second)) in self.class_pairs

    def _newer(self, first: str, second: str) -> frozenset[Holdout]:
        """What besides the pair itself is new about two objects."""
        class_of = self.taxonomy.class_of
        found: set[Holdout] = {"object"} if self.objects & {first, second} else set()
        return frozenset(found | ({"class_pair"} if self.holds_classes(class_of[first], class_of[second]) else set()))

    def holdout(self, first: str, second: str) -> Holdout | None:
        """What is new about a held-out pair; None for other pairs, and where both object and classes are new."""
        newer = self._newer(first, second)
        if not self.is_held_out(first, second) or len(newer) > 1:
            return None
        return next(iter(newer), "pair")

    def is_trained(self, first: str, second: str) -> bool:
        """Whether training rows may ask about the two objects together."""
        return not self.is_held_out(first, second) and not self._newer(first, second)

    def is_on_side(self, first: str, second: str, holdout: Holdout | None) -> bool:
        """Whether a pair belongs to training (`holdout` None) or to one part of the test."""
        if holdout is None:
            return self.is_trained(first, second)
        return self.holdout(first, second) == holdout

    def partners(self, thing: str, class_id: str, *, holdout: Holdout | None) -> list[str]:
        """Objects of a class that `thing` meets in training (`holdout` None) or in one part of the test, in order."""
        key = (thing, class_id, holdout)
        if key not in self._partners:
            slugs = [other.slug for other in self.taxonomy.class_by_id[class_id].objects]
            self._partners[key] = [slug for slug in slugs if self.is_on_side(thing, slug, holdout)]
        return self._partners[key]

    def ordered_pairs(self, relation: Relation, *, holdout: Holdout | None) -> list[tuple[str, str]]:
        """Object pairs of a relation in training (`holdout` None) or in one part of the test, in both orders."""
        first, second = (self.taxonomy.class_by_id[name].objects for name in relation.classes)
        pairs = [(a.slug, b.slug) for a in first for b in second if self.is_on_side(a.slug, b.slug, holdout)]
        return pairs + [(b, a) for a, b in pairs]


def pair_table(
    taxonomy: Taxonomy, *, seed: int, shares: Mapping[Holdout, int] = PAIRS_ONLY, min_class_objects: int = 6
) -> PairTable:
    """Hold out, for each two classes, a matching that touches every object at least once.

    Where `shares` names them, one object of each class of `min_class_objects` or more and some class pairs are held
    out as well; all test pairs are of the matching. Raises UserError if the taxonomy is too small for that.
    """
    objects: frozenset[str] = frozenset()
    if "object" in shares:
        objects = _held_objects(taxonomy, seed=seed, min_class_objects=min_class_objects)
    class_pairs = _held_class_pairs(taxonomy, seed=seed) if "class_pair" in shares else frozenset()
    held: set[Pair] = set()
    for first, second in itertools.combinations(taxonomy.classes, 2):
        generator = rng(seed, "held-out-pairs", first.id, second.id)
        # Where the classes are new together, new objects are left out: each other object needs a partner of its own.
        left_out = objects if frozenset((first.id, second.id)) in class_pairs else frozenset()
        a, b = ([thing.slug for thing in group.objects if thing.slug not in left_out] for group in (first, second))
        generator.shuffle(a)
        generator.shuffle(b)
        held |= {frozenset((a[i % len(a)], b[i % len(b)])) for i in range(max(len(a), len(b)))}
    return PairTable(taxonomy=taxonomy, held_out=frozenset(held), objects=objects, class_pairs=class_pairs)


def size_pairs(taxonomy: Taxonomy, size: Size, *, seed: int) -> PairTable:
    """The pair table of a dataset of that size."""
    return pair_table(taxonomy, seed=seed, shares=size.holdout_shares, min_class_objects=size.min_class_objects)


def _held_objects(taxonomy: Taxonomy, *, seed: int, min_class_objects: int) -> frozenset[str]:
    large = [group for group in taxonomy.classes if len(group.objects) >= min_class_objects]
    if not large:
        raise UserError(
            f"no class of the taxonomy has {min_class_objects} objects, so none can be held out; "
            "add objects or take 'object' out of holdout_shares"
        )
    return frozenset(rng(seed, "held-out-object", group.id).choice(group.objects).slug for group in large)


def _held_class_pairs(taxonomy: Taxonomy, *, seed: int) -> frozenset[Pair]:
    """Class pairs in rings of four: two risky pairs joined by two benign ones, so that every class of a ring is as
    often risky as benign and neither class alone tells the label. No class is in two rings; harm is visible in both
    risky pairs of a ring or in neither.
    """
    generator = rng(seed, "held-out-class-pairs")
    rings = {visible: list(_rings(taxonomy, visible=visible)) for visible in (True, False)}
    for found in rings.values():
        generator.shuffle(found)
    num_rings = max(2, round(HELD_RELATIONS_SHARE * len(taxonomy.relations) / 2))
    held: set[Pair] = set()
    for number in range(num_rings):
        visible = number % 2 == 0
        ring = next((ring for ring in rings[visible] if _leaves_enough(taxonomy, held, ring)), None)
        if ring is None:
            if number < 2:
                raise UserError(
                    "the taxonomy has no ring of two risky and two benign class pairs to hold out; "
                    "add relations or take 'class_pair' out of holdout_shares"
                )
            continue
        held |= set(ring)
    return frozenset(held)


def _rings(taxonomy: Taxonomy, *, visible: bool) -> Iterator[tuple[Pair, ...]]:
    relations = [relation.classes for relation in taxonomy.relations if relation.visible_harm == visible]
    for (a, b), (c, d) in itertools.combinations(relations, 2):
        for third, fourth in ((c, d), (d, c)):
            ring = tuple(frozenset(pair) for pair in ((a, b), (b, third), (third, fourth), (fourth, a)))
            if len({a, b, c, d}) == 4 and not taxonomy.relation(b, third) and not taxonomy.relation(fourth, a):
                yield ring


def _leaves_enough(taxonomy: Taxonomy, held: set[Pair], ring: tuple[Pair, ...]) -> bool:
    """Whether training keeps every sub-category and two relations of each class without the ring's class pairs."""
    if frozenset().union(*held) & frozenset().union(*ring):
        return False
    left = [relation for relation in taxonomy.relations if frozenset(relation.classes) not in held | set(ring)]
    kinds = {(relation.category, relation.sub_category) for relation in taxonomy.relations}
    uses = Counter(name for relation in left for name in relation.classes)
    return kinds == {(relation.category, relation.sub_category) for relation in left} and all(
        uses[group.id] >= 2 for group in taxonomy.classes
    )
