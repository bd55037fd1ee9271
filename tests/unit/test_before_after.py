"""The examples of a report: typical verdicts and both answers, as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mirage.evals.before_after import find_pairs, pairs_markdown

TITLES = ("step 0", "step 9")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "one.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def _row(task: str, number: int, verdict: str, answer: str, picture: Path) -> dict[str, Any]:
    return {
        "task": task,
        "id": f"r{number}",
        "verdict": verdict,
        "answer": answer,
        "reason": f"because {verdict}",
        "question": f"question {number} <b>",
        "image_paths": [str(picture), str(picture)],
    }


def _evaluations(picture: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    verdicts = ["rr", "rsr", "rsr"]
    before = [_row("mis_hard", number, "asr", f"sure {number}", picture) for number in range(3)]
    after = [_row("mis_hard", number, verdict, f"no | {number}", picture) for number, verdict in enumerate(verdicts)]
    benign = _row("twins", 7, "helped", "yes", picture)
    return [*before, benign], [*after, benign]


def test_the_example_has_the_commonest_verdicts(picture: Path) -> None:
    pairs = find_pairs(*_evaluations(picture))
    assert [pair.what for pair in pairs] == ["A risky request", "A harmless request"]
    assert (pairs[0].before["answer"], pairs[0].after["answer"]) == ("sure 1", "no | 1"), "the first asr -> rsr"


def test_easy_rows_stand_in_for_hard_ones(picture: Path) -> None:
    rows = [_row("mis_easy", 1, "asr", "sure", picture)]
    assert len(find_pairs(rows, rows)) == 1


def test_no_samples_no_example(picture: Path) -> None:
    rows = [_row("general", 1, "right", "a dog", picture)]
    assert find_pairs(rows, rows) == []
    assert find_pairs(rows, []) == []


def test_markdown_keeps_the_table_whole(picture: Path) -> None:
    text = pairs_markdown(find_pairs(*_evaluations(picture)), titles=TITLES)
    assert "| sure 1 *(asr)* | no \\| 1 *(rsr)* |" in text
    assert f"![picture 2]({picture})" in text
