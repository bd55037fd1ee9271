"""The plan: exact counts, nothing of the test seen in training, and twins that balance the labels."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from data_gen.settings import settings_for
from data_gen.stages.general import general_answer
from data_gen.stages.pairs import pair_table
from data_gen.stages.phrase import wording_pools
from data_gen.stages.plan import plan
from data_gen.taxonomy.facts import load_taxonomy
from tests.support.datagen import tiny_settings

SETTINGS = settings_for(seed=0, size="small")


@pytest.fixture(scope="module")
def taxonomy():
    return load_taxonomy()


@pytest.fixture(scope="module")
def drafts(taxonomy):
    return plan(taxonomy, settings=SETTINGS)


@pytest.fixture(scope="module")
def by_split(drafts):
    return {split: [draft for draft in drafts if draft.split == split] for split in SETTINGS.size.rows}


def _pairs(drafts):
    return {frozenset(draft.things) for draft in drafts if len(draft.things) == 2}


def test_counts_and_order(drafts, by_split):
    assert {split: len(rows) for split, rows in by_split.items()} == SETTINGS.size.rows
    assert [draft.index for draft in drafts] == list(range(len(drafts)))


def test_paper_size_has_the_papers_counts():
    rows = settings_for(seed=0, size="paper").size.rows
    assert (rows["train"], rows["easy"], rows["hard"], rows["real"]) == (3927, 1675, 510, 100)


def test_test_pairs_never_meet_in_training(by_split):
    trained = _pairs(by_split["train"]) | _pairs(by_split["train_twins"]) | _pairs(by_split["train_general"])
    for split in ("easy", "hard", "twins", "general"):
        assert not trained & _pairs(by_split[split]), split


def test_each_object_keeps_training_partners_in_every_class(taxonomy):
    pairs = pair_table(taxonomy, seed=0)
    for group in taxonomy.classes:
        for thing in group.objects:
            for other in taxonomy.classes:
                if other.id != group.id:
                    assert pairs.partners(thing.slug, other.id, held_out=True)
                    assert pairs.partners(thing.slug, other.id, held_out=False)


def test_both_orders_of_pairs_occur(by_split):
    for split in ("train", "easy", "hard"):
        ordered = {draft.things for draft in by_split[split]}
        assert any(things[::-1] in ordered for things in ordered), split


def test_test_questions_are_new(by_split):
    trained = {draft.question for split in ("train", "train_twins") for draft in by_split[split]}
    families = {draft.template for draft in by_split["train"]}
    for split in ("easy", "hard", "real", "twins"):
        assert not trained & {draft.question for draft in by_split[split]}, split
        unseen = [draft for draft in by_split[split] if draft.unseen_family]
        assert all(draft.template not in families for draft in unseen)
        assert 0.1 < len(unseen) / len(by_split[split]) < 0.6, split


def test_test_questions_use_training_words(taxonomy):
    pools = wording_pools(taxonomy, seed=0)

    def words(pool):
        return {word for wordings in pool.values() for w in wordings for word in re.findall(r"\w+", w.text.lower())}

    general = {w for kind in taxonomy.phrasings.general.values() for w in re.findall(r"\w+", kind.answer.lower())}
    reasons = {w for relation in taxonomy.relations for w in re.findall(r"\w+", relation.reason)}
    assert words(pools.test) | words(pools.test_only) <= words(pools.train) | general | reasons


def test_overt_text_only_in_training_and_never_twinned(drafts, by_split):
    overt = [draft for draft in drafts if draft.overt]
    assert {draft.split for draft in overt} == {"train"}
    assert 0.04 < len(overt) / len(by_split["train"]) < 0.13


@pytest.mark.parametrize(("split", "sources"), [("train_twins", ("train",)), ("twins", ("easy", "hard"))])
def test_twins_change_one_picture_and_keep_the_words(taxonomy, drafts, by_split, split, sources):
    for twin in by_split[split]:
        risky = drafts[twin.twin_of]
        assert risky.split in sources
        assert twin.question == risky.question
        changed = [i for i in (0, 1) if (twin.things[i], twin.variants[i]) != (risky.things[i], risky.variants[i])]
        assert [f"image_{i + 1}" for i in changed] == [twin.twin_kind]
        assert taxonomy.relation_of_things(*risky.things) and not taxonomy.relation_of_things(*twin.things)


def test_twins_balance_every_class_at_every_position(taxonomy, by_split):
    surplus = Counter()
    for draft in by_split["train"]:
        surplus.update({(i, taxonomy.class_of[slug]): not draft.overt for i, slug in enumerate(draft.things)})
    twins = Counter(
        (i, taxonomy.class_of[slug]) for draft in by_split["train_twins"] for i, slug in enumerate(draft.things)
    )
    overt_share = sum(draft.overt for draft in by_split["train"]) / len(by_split["train"])
    for key, num_risky in surplus.items():
        assert abs(num_risky / (1 - overt_share) - twins[key]) <= max(4, 0.1 * twins[key]), key


def test_easy_shows_harm_and_hard_does_not(taxonomy, by_split):
    assert all(taxonomy.relation_of_things(*draft.things).visible_harm for draft in by_split["easy"])
    assert not any(taxonomy.relation_of_things(*draft.things).visible_harm for draft in by_split["hard"])


def test_general_rows(taxonomy, by_split):
    kinds = Counter(draft.template for draft in by_split["train_general"])
    assert set(kinds) == set(taxonomy.phrasings.general)
    assert all(draft.options for draft in by_split["general"])
    for draft in by_split["train_general"] + by_split["general"]:
        answer = general_answer(taxonomy, draft)
        if draft.options:
            assert answer == draft.options[draft.answer] and len(set(draft.options)) == len(draft.options) == 4
    same = [draft for draft in by_split["train_general"] if draft.template == "same"]
    assert all(d.things[0] == d.things[1] and d.variants[0] != d.variants[1] for d in same)
    places = Counter(draft.answer for draft in by_split["general"])
    assert max(places.values()) < 0.4 * len(by_split["general"])


def test_knowledge_covers_every_ordered_pair_of_classes(taxonomy, by_split):
    rows = [draft for draft in by_split["train_general"] if draft.classes]
    assert len({draft.classes for draft in rows}) == len(rows) == len(taxonomy.classes) * (len(taxonomy.classes) - 1)
    assert all((d.template == "knowledge_risk") == (taxonomy.relation(*d.classes) is not None) for d in rows)
    assert all(d.things == () for d in rows)


def test_seed_decides_everything(taxonomy):
    first, again, other = (plan(taxonomy, settings=tiny_settings(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    count = [Counter((draft.split, draft.kind) for draft in drafts) for drafts in (first, other)]
    assert count[0] == count[1]
