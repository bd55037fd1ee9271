"""Question wordings: fill the phrasing families and hold some of them out of training."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from string import Formatter

from data_gen.seeds import rng
from data_gen.taxonomy.facts import Family, Taxonomy

HELD_OUT_SHARE = 4  # one sentence in four of a shared family is held out for the test
UNSEEN_FAMILY_RATE = 1 / 3  # of test questions, so that both kinds of held-out wording can be told apart


@dataclass(frozen=True)
class Wording:
    """One question text and where it comes from."""

    text: str
    family: str
    unseen_family: bool = False


@dataclass(frozen=True)
class WordingPools:
    """Wordings by family. `train` and `test` share families but no sentence; `test_only` families are new."""

    train: dict[str, tuple[Wording, ...]]
    test: dict[str, tuple[Wording, ...]]
    test_only: dict[str, tuple[Wording, ...]]
    overt: dict[str, tuple[Wording, ...]]

    def draw_train(self, generator: random.Random) -> Wording:
        """A training wording: a family first, so that no family dominates by its number of sentences."""
        return _draw(self.train, generator)

    def draw_overt(self, generator: random.Random) -> Wording:
        """A training wording that states a bad intent."""
        return _draw(self.overt, generator)

    def draw_test(self, generator: random.Random) -> Wording:
        """A test wording: an unseen sentence, in a third of the draws of an unseen family."""
        return _draw(self.test_only if generator.random() < UNSEEN_FAMILY_RATE else self.test, generator)


def _draw(pool: dict[str, tuple[Wording, ...]], generator: random.Random) -> Wording:
    return generator.choice(pool[generator.choice(sorted(pool))])


def _expand(template: str, slots: dict[str, tuple[str, ...]]) -> list[str]:
    """All fillings of a template, in slot order; a slot called NAME_lower is NAME with a small first letter."""
    names = list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name))
    if not names:
        return [template]
    choices = []
    for name in names:
        texts = [text for raw in slots[name.removesuffix("_lower")] for text in _expand(raw, slots)]
        choices.append([text[:1].lower() + text[1:] for text in texts] if name.endswith("_lower") else texts)
    return [template.format(**dict(zip(names, texts))) for texts in itertools.product(*choices)]


def family_sentences(family: Family, slots: dict[str, tuple[str, ...]]) -> list[str]:
    """Every sentence of a family once, in a fixed order."""
    return list(dict.fromkeys(text for template in family.templates for text in _expand(template, slots)))


def wording_pools(taxonomy: Taxonomy, *, seed: int) -> WordingPools:
    """Split all wordings into train, test, test-only and overt pools; which sentences are held out follows the seed."""
    pools = WordingPools(train={}, test={}, test_only={}, overt={})
    for family in taxonomy.phrasings.families:
        texts = family_sentences(family, taxonomy.phrasings.slots)
        wordings = [Wording(text, family.id, unseen_family=family.use == "test") for text in texts]
        if family.use == "shared":
            rng(seed, "held-out-wordings", family.id).shuffle(wordings)
            num_held = max(1, len(wordings) // HELD_OUT_SHARE)
            pools.test[family.id] = tuple(wordings[:num_held])
            pools.train[family.id] = tuple(wordings[num_held:])
        else:
            pool = pools.overt if family.use == "overt" else pools.test_only
            pool[family.id] = tuple(wordings)
    return pools
