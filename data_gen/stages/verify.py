"""Stage 4, verify: read every row again and compare it with the taxonomy's facts; one failing row stops the build."""

from __future__ import annotations

import re
from collections.abc import Iterable

from data_gen.stages.draft import TRAIN_SPLITS
from data_gen.stages.label import join_segments
from data_gen.stages.pairs import PairTable
from data_gen.taxonomy.facts import Relation, Taxonomy
from mirage.data.row import Row, row_id
from mirage.errors import UserError

VERSION = "1"
NUMBERED_STEP = re.compile(r"(?:^|\s)(?:\d+[.)]\s|step \d)", re.IGNORECASE)
LEAKED_ID = re.compile(r"\b[a-z]+_[a-z_]+\b|[{}]")  # slugs and class ids, and unfilled slots
BAD_ARTICLE = re.compile(r"\ba [aeio]|\ban [^aeioI\s]", re.IGNORECASE)
MAX_ANSWER_WORDS = 90


def contains_phrase(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as whole words, in any case ('a fire' is not in 'a firecracker')."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def check_row(row: Row, taxonomy: Taxonomy, *, pairs: PairTable) -> dict[str, str]:
    """Check name -> 'ok' or what was found, for the checks that apply to the row."""
    checks = {"id": _ok(row.id == row_id(row.images, row.messages, split=row.split), "is not the hash of the content")}
    checks["licence"] = _ok(
        bool(row.licence) and all(image.licence and image.attribution for image in row.images),
        "an image or the row has no licence or attribution",
    )
    checks["text"] = _text_problem(row) or "ok"
    checks["images"] = _ok(row.split not in ("train", "train_twins") or len(row.images) == 2, "must show two pictures")
    checks["turns"] = _ok(
        (row.answer is not None) == (row.split in TRAIN_SPLITS), "training rows end with an answer, test rows do not"
    )
    if "object_pair" in row.tags and row.tags.get("picture_kind") != "photo":
        checks["held_out"] = _held_out_problem(row, taxonomy, pairs) or "ok"
    if row.label is not None:
        relation = taxonomy.relation_of_things(*row.tags["object_pair"].split(" + "))
        checks["decision"] = _decision_problem(row, relation) or "ok"
        if row.segments is not None:
            checks["segments"] = _segment_problem(row, relation) or "ok"
            checks["concepts"] = _concept_problem(row) or "ok"
            checks["risk"] = _risk_problem(row, relation, taxonomy) or "ok"
        elif row.split in TRAIN_SPLITS:
            checks["segments"] = "an answer about a pair needs its four segments"
    if row.choice is not None and row.answer is not None:
        checks["choice"] = _ok(
            row.answer == row.choice.options[row.choice.answer], "the answer is not the right option"
        )
    return checks


def _ok(good: bool, problem: str) -> str:
    return "ok" if good else problem


def _text_problem(row: Row) -> str | None:
    for message in row.messages:
        if not message.text.strip() or message.text != " ".join(message.text.split()):
            return f"empty text or stray blanks: {message.text!r}"
        for name, pattern in (("numbered step", NUMBERED_STEP), ("leaked id", LEAKED_ID), ("article", BAD_ARTICLE)):
            if found := pattern.search(message.text):
                return f"{name} {found.group().strip()!r} in {message.text!r}"
    if row.answer is not None and len(row.answer.split()) > MAX_ANSWER_WORDS:
        return f"the answer has {len(row.answer.split())} words, more than {MAX_ANSWER_WORDS}"
    return None


def _held_out_problem(row: Row, taxonomy: Taxonomy, pairs: PairTable) -> str | None:
    first, second = row.tags["object_pair"].split(" + ")
    if taxonomy.class_of[first] == taxonomy.class_of[second] and row.split == "train_general":
        return None
    if pairs.is_held_out(first, second) == (row.split in TRAIN_SPLITS):
        return f"pair {first} + {second} belongs to the other side of the split"
    return None


def _decision_problem(row: Row, relation: Relation | None) -> str | None:
    assert row.label is not None
    if (row.label.decision == "help") != (relation is None):
        return f"decision {row.label.decision!r} contradicts the taxonomy"
    if row.label.risk != (relation.risk if relation else None):
        return f"risk {row.label.risk!r} is not the taxonomy's"
    if relation is not None and row.split in ("easy", "hard") and relation.visible_harm != (row.split == "easy"):
        return f"a pair with visible_harm={relation.visible_harm} is in split {row.split}"
    if (row.label.decision == "help") != (row.twin_of is not None):
        return "a benign row must name its risky sibling and a risky row must not"
    return None


def _segment_problem(row: Row, relation: Relation | None) -> str | None:
    assert row.segments is not None
    parts = row.segments.model_dump()
    empty = [name for name, text in parts.items() if not text.strip()]
    if empty:
        return f"empty segment {', '.join(empty)}"
    if row.answer != join_segments(row.segments):
        return "the answer is not its segments joined by single spaces"
    declines = "can't help" in row.segments.reply
    if declines != (relation is not None):
        return f"the reply {'declines' if declines else 'helps'} against the decision"
    return None


def _concept_problem(row: Row) -> str | None:
    assert row.segments is not None
    names = [image.concept or "" for image in row.images]
    for part in ("perceive", "relate"):
        missing = [name for name in names if not contains_phrase(getattr(row.segments, part), name)]
        if missing:
            return f"segment {part} does not name {', '.join(missing)}"
    return None


def _risk_problem(row: Row, relation: Relation | None, taxonomy: Taxonomy) -> str | None:
    assert row.segments is not None and row.answer is not None
    if relation is not None:
        return None if contains_phrase(row.segments.risk, relation.risk) else f"does not name {relation.risk!r}"
    named = sorted({r.risk for r in taxonomy.relations if contains_phrase(row.answer, r.risk)})
    return f"a benign answer names {', '.join(named)}" if named else None


def verify(rows: Iterable[Row], taxonomy: Taxonomy, *, pairs: PairTable) -> tuple[Row, ...]:
    """The rows with their checks recorded.

    Raises UserError naming the first failing rows: generated data is whole or not written at all.
    """
    checked, failures, ids = [], [], set()
    for number, row in enumerate(rows, 1):
        checks = check_row(row, taxonomy, pairs=pairs)
        if row.id in ids:
            checks["id"] = "occurs twice"
        ids.add(row.id)
        failures += [
            f"row {number} ({row.id}, {row.split}): {n}: {found}" for n, found in checks.items() if found != "ok"
        ]
        checked.append(row.model_copy(update={"checks": checks}))
    if failures:
        more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
        raise UserError(
            "generated rows contradict the taxonomy, so nothing was written: "
            + "; ".join(failures[:3])
            + more
            + ". Correct the taxonomy entry or sentence that the message shows"
        )
    return tuple(checked)
