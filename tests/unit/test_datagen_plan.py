"""The plan: exact counts, nothing of the test seen in training, and twins that balance the labels."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest

from data_gen.settings import settings_for
from data_gen.stages.general import general_answer
from data_gen.stages.pairs import pair_table, size_pairs
from data_gen.stages.phrase import wording_pools
from data_gen.stages.plan import plan
from data_gen.taxonomy.facts import load_taxonomy
from mirage.errors import UserError
from tests.support.datagen import tiny_settings

SETTINGS = settings_for(seed=0, size="small")
PAIR_ROWS = ("train", "train_twins", "train_contrast", "train_multi")


@pytest.fixture(scope="module")
def taxonomy():
    return SETTINGS.select(load_taxonomy())


@pytest.fixture(scope="module")
def drafts(taxonomy):
    return plan(taxonomy, settings=SETTINGS)


@pytest.fixture(scope="module")
def by_split(drafts):
    return {split: [draft for draft in drafts if draft.split == split] for split in SETTINGS.size.rows}


def _pairs(drafts):
    return {frozenset(draft.things) for draft in drafts if len(draft.things) == 2}


def _met(drafts):
    """All pairs of different objects that are shown or named in one row."""
    return {
        frozenset(pair)
        for draft in drafts
        for pair in itertools.combinations(draft.named or draft.things, 2)
        if pair[0] != pair[1]
    }


def test_counts_and_order(drafts, by_split):
    assert {split: len(rows) for split, rows in by_split.items()} == SETTINGS.size.rows
    assert [draft.index for draft in drafts] == list(range(len(drafts)))


def test_paper_size_has_the_papers_counts():
    rows = settings_for(seed=0, size="paper").size.rows
    assert (rows["train"], rows["easy"], rows["hard"], rows["real"]) == (3927, 1675, 510, 100)


def test_test_pairs_never_meet_in_training(by_split):
    trained = _met(draft for split in PAIR_ROWS for draft in by_split[split]) | _pairs(by_split["train_general"])
    for split in ("easy", "hard", "twins", "general"):
        assert not trained & _pairs(by_split[split]), split
    for split in ("contrast", "multi"):
        assert not trained & {frozenset(draft.pair) for draft in by_split[split]}, split


def test_each_object_keeps_training_partners_in_every_class(taxonomy):
    pairs = pair_table(taxonomy, seed=0)
    for group in taxonomy.classes:
        for thing in group.objects:
            for other in taxonomy.classes:
                if other.id != group.id:
                    assert pairs.partners(thing.slug, other.id, holdout="pair")
                    assert pairs.partners(thing.slug, other.id, holdout=None)


def test_both_orders_of_pairs_occur(by_split):
    for split in ("train", "easy", "hard"):
        ordered = {draft.things for draft in by_split[split]}
        assert any(things[::-1] in ordered for things in ordered), split


def test_test_questions_are_new(by_split):
    trained = {draft.question for split in PAIR_ROWS for draft in by_split[split]}
    families = {draft.template for split in PAIR_ROWS for draft in by_split[split]}
    for split in ("easy", "hard", "real", "twins", "contrast", "multi"):
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
    assert not any(draft.overt for draft in drafts if draft.sibling_of is not None)
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


@pytest.fixture(scope="module")
def paper():
    """(pair table, drafts by split) of the paper's size with fewer rows: all facts, all kinds of holdout."""
    size = settings_for(seed=0, size="paper").size
    rows = {split: max(count // 6, 60) // 2 * 2 for split, count in size.rows.items()} | {"twins": 360}
    size = size.model_copy(update={"rows": rows | {"easy": 260, "hard": 100, "train_general": 1500}})
    settings = settings_for(seed=0, size="paper").model_copy(update={"size": size})
    taxonomy = load_taxonomy()
    drafts = plan(taxonomy, settings=settings)
    by_split = {split: [draft for draft in drafts if draft.split == split] for split in size.rows}
    assert {split: len(found) for split, found in by_split.items()} == size.rows
    return pair_table(taxonomy, seed=0, shares=size.holdout_shares), by_split


def test_nothing_held_out_is_in_a_training_pair_row(paper):
    pairs, by_split = paper
    trained = [draft for split in PAIR_ROWS for draft in by_split[split]]
    objects = {slug for draft in trained for slug in (*draft.things, *draft.named)}
    class_of = pairs.taxonomy.class_of
    class_pairs = {frozenset(class_of[slug] for slug in pair) for pair in _met(trained)}
    assert len(pairs.objects) >= 20 and not pairs.objects & objects
    assert len(pairs.class_pairs) >= 8 and not pairs.class_pairs & class_pairs
    assert not pairs.held_out & _met(trained)
    assert not pairs.held_out & _pairs(by_split["train_general"])
    known = {slug for draft in by_split["train_general"] for slug in draft.things}
    assert pairs.objects <= known, "held-out objects are still named in general rows"
    knowledge = {frozenset(draft.classes) for draft in by_split["train_general"] if draft.classes}
    assert knowledge and not pairs.class_pairs & knowledge


def test_holdout_says_what_is_new(paper):
    pairs, by_split = paper
    trained = [draft for split in PAIR_ROWS for draft in by_split[split]]
    objects = {slug for draft in trained for slug in (*draft.things, *draft.named)}
    class_of = pairs.taxonomy.class_of
    for split in ("easy", "hard", "twins", "contrast", "multi", "line"):
        for draft in (draft for draft in by_split[split] if draft.kind != "general"):
            new_object = bool(set(draft.pair) & pairs.objects)
            new_classes = frozenset(class_of[slug] for slug in draft.pair) in pairs.class_pairs
            assert frozenset(draft.pair) in pairs.held_out
            assert (new_object, new_classes) == (draft.holdout == "object", draft.holdout == "class_pair")
            if draft.holdout == "object":
                assert not set(draft.pair) <= objects
    for split, total in (("easy", 260), ("hard", 100)):
        counts = Counter(draft.holdout for draft in by_split[split])
        assert counts == {"pair": total * 6 // 10, "object": total // 5, "class_pair": total // 5}


def test_twins_have_the_holdout_of_their_risky_row(paper):
    _, by_split = paper
    risky = {draft.index: draft for split in ("easy", "hard") for draft in by_split[split]}
    assert all(twin.holdout == risky[twin.twin_of].holdout for twin in by_split["twins"])


def test_held_out_class_pairs_are_as_often_risky_as_benign(paper):
    pairs, _ = paper
    uses = Counter()
    for pair in pairs.class_pairs:
        risky = pairs.taxonomy.relation(*pair) is not None
        uses.update({(name, risky): 1 for name in pair})
    assert set(uses.values()) == {1}
    assert {name for name, risky in uses if risky} == {name for name, risky in uses if not risky}


def test_line_rows_are_siblings_in_another_style(paper):
    _, by_split = paper
    by_index = {draft.index: draft for rows in by_split.values() for draft in rows}
    line = by_split["line"]
    assert {draft.index for draft in by_index.values() if draft.style != "colour"} == {draft.index for draft in line}
    changed = {
        "index": 0,
        "split": "line",
        "style": "line",
        "sibling_of": 0,
        "sibling_kind": "line_art",
        "twin_of": None,
    }
    for draft in line:
        sibling = by_index[draft.sibling_of]
        assert replace(draft, **changed) == replace(sibling, **changed)
        if draft.kind == "benign":
            assert by_index[draft.twin_of].sibling_of == sibling.twin_of and by_index[draft.twin_of] in line
    sources = Counter(by_index[draft.sibling_of].split for draft in line)
    assert sources == {"easy": 13, "hard": 12, "twins": 25, "general": 10}
    for split, number in (("easy", 13), ("hard", 12)):
        kinds = Counter(draft.holdout for draft in line if by_index[draft.sibling_of].split == split)
        wanted = {"pair": 0.6 * number, "object": 0.2 * number, "class_pair": 0.2 * number}
        assert all(abs(kinds[kind] - share) < 1 for kind, share in wanted.items())


def test_more_line_rows_than_siblings_are_refused(taxonomy):
    tiny = tiny_settings()
    size = tiny.size.model_copy(update={"rows": tiny.size.rows | {"line": 120}})
    with pytest.raises(UserError, match=r"'line' needs siblings of 25 easy rows with twins, and the plan has 8"):
        plan(taxonomy, settings=tiny.model_copy(update={"size": size}))


def test_mini_holds_out_an_object_of_each_class_of_five(taxonomy):
    size = settings_for(seed=0, size="mini").size
    pairs = size_pairs(taxonomy, size, seed=0)
    large = {group.id for group in taxonomy.classes if len(group.objects) >= 5}
    held = [taxonomy.class_of[slug] for slug in pairs.objects]
    assert set(held) == large and len(held) == len(large) and pairs.class_pairs
    assert not size_pairs(taxonomy, SETTINGS.size, seed=0).objects


def test_new_objects_need_large_classes(taxonomy):
    small = taxonomy.model_copy(
        update={"classes": tuple(g.model_copy(update={"objects": g.objects[:5]}) for g in taxonomy.classes)}
    )
    with pytest.raises(UserError, match="no class of the taxonomy has 6 objects"):
        pair_table(small, seed=0, shares={"pair": 80, "object": 20})


def test_settled_test_rows_balance_every_class(paper):
    pairs, by_split = paper
    tilt = Counter()
    for sign, splits in ((1, ("easy", "hard")), (-1, ("twins",))):
        for split in splits:
            for draft in by_split[split]:
                for place, slug in enumerate(draft.things):
                    tilt[place, pairs.taxonomy.class_of[slug]] += sign
    assert sum(map(abs, tilt.values())) <= 0.15 * 2 * len(by_split["twins"])


@pytest.mark.parametrize("split", ["train_multi", "multi"])
def test_multi_rows_have_one_risky_pair_and_a_sibling_without(taxonomy, drafts, by_split, split):
    def risky_places(draft):
        return [
            places
            for places in itertools.combinations(range(len(draft.things)), 2)
            if taxonomy.relation_of_things(*(draft.things[place] for place in places))
        ]

    rows = by_split[split]
    assert Counter((len(d.things), d.scope, d.kind) for d in rows) == {
        (size, scope, kind): len(rows) // 8
        for size in (3, 4)
        for scope in ("all", "pair")
        for kind in ("risky", "benign")
    }
    for twin in (draft for draft in rows if draft.kind == "benign"):
        risky = drafts[twin.twin_of]
        assert (risky.split, risky.question, risky.pair_at) == (split, twin.question, twin.pair_at)
        assert risky_places(risky) == [risky.pair_at]
        if twin.scope == "all":
            assert risky_places(twin) == []
            assert sum(a != b for a, b in zip(risky.things, twin.things)) == 1
        else:
            assert len(risky_places(twin)) == 1 and twin.pair_at not in risky_places(twin)
            assert Counter(zip(risky.things, risky.variants)) == Counter(zip(twin.things, twin.variants))


def test_multi_questions_refer_to_the_pair_that_decides(by_split):
    words = ("first", "second", "third", "fourth")
    for draft in by_split["train_multi"] + by_split["multi"]:
        named = {words.index(word) for word in re.findall("first|second|third|fourth", draft.question)}
        assert named == (set(draft.pair_at) if draft.scope == "pair" else set()), draft.question
        numbers = re.findall("two|three|four(?!th)", draft.question)
        assert set(numbers) <= {{3: "three", 4: "four"}[len(draft.things)]}, draft.question


@pytest.mark.parametrize("split", ["train_contrast", "contrast"])
def test_contrast_rows_change_one_thing(taxonomy, drafts, by_split, split):
    count = SETTINGS.size.rows[split]
    kinds = Counter((draft.sibling_kind, draft.kind) for draft in by_split[split])
    assert kinds == {
        ("swap_order", "risky"): count // 5,
        ("swap_order", "benign"): count // 5,
        ("all_in_text", "risky"): count // 5,
        ("all_in_text", "benign"): count // 5,
        ("protective_intent", "benign"): count // 5,
    }
    origins = ("train", "train_twins") if split == "train_contrast" else ("easy", "hard", "twins")
    for draft in by_split[split]:
        source = drafts[draft.sibling_of]
        assert source.split in origins
        assert (taxonomy.relation_of_things(*draft.pair) is None) == (source.kind == "benign")
        pictures = list(zip(source.things, source.variants))
        shown = list(zip(draft.things, draft.variants))
        if draft.sibling_kind == "swap_order":
            assert shown == pictures[::-1] and draft.question == source.question
        elif draft.sibling_kind == "protective_intent":
            assert shown == pictures and (draft.intent, draft.twin_of) == ("protect", source.index)
        else:
            assert len(shown) <= 1 and set(shown) <= set(pictures)
            assert all(taxonomy.things[slug].noun in draft.question for slug in source.things)
            assert not re.search("image|object|picture", draft.question)
        if draft.kind == "benign" and draft.intent == "use":
            risky = drafts[draft.twin_of]
            assert (risky.split, risky.sibling_kind, risky.kind) == (split, draft.sibling_kind, "risky")


def test_more_rows_of_a_late_split_leave_the_others_alone(taxonomy):
    first = tiny_settings(seed=3)
    rows = first.size.rows | {"multi": 32, "train_multi": 8, "contrast": 0, "line": 24}
    second = first.model_copy(update={"size": first.size.model_copy(update={"rows": rows})})
    one, two = (plan(taxonomy, settings=settings) for settings in (first, second))
    late = ("train_contrast", "train_multi", "contrast", "multi", "line")
    assert [d for d in one if d.split not in late] == [d for d in two if d.split not in late]


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
