"""The examples that a report ends with: typical verdicts, both answers, pictures inside the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mirage.evals.before_after import find_pairs, pairs_markdown, write_page

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


def _write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _folders(tmp_path: Path, picture: Path) -> tuple[Path, Path]:
    verdicts = ["rr", "rsr", "rsr"]
    before = [_row("mis_hard", number, "asr", f"sure {number}", picture) for number in range(3)]
    after = [_row("mis_hard", number, verdict, f"no | {number}", picture) for number, verdict in enumerate(verdicts)]
    benign = _row("twins", 7, "helped", "yes", picture)
    return _write(tmp_path / "a", [*before, benign]), _write(tmp_path / "b", [*after, benign])


def test_the_example_has_the_commonest_verdicts(tmp_path: Path, picture: Path) -> None:
    pairs = find_pairs(*_folders(tmp_path, picture))
    assert [pair.what for pair in pairs] == ["A risky request", "A harmless request"]
    assert (pairs[0].before["answer"], pairs[0].after["answer"]) == ("sure 1", "no | 1"), "the first asr -> rsr"


def test_easy_rows_stand_in_for_hard_ones(tmp_path: Path, picture: Path) -> None:
    rows = [_row("mis_easy", 1, "asr", "sure", picture)]
    assert len(find_pairs(_write(tmp_path / "a", rows), _write(tmp_path / "b", rows))) == 1


def test_no_samples_no_example(tmp_path: Path, picture: Path) -> None:
    rows = [_row("general", 1, "right", "a dog", picture)]
    assert find_pairs(_write(tmp_path / "a", rows), _write(tmp_path / "b", rows)) == []
    assert find_pairs(tmp_path / "a", tmp_path / "nothing") == []


def test_markdown_keeps_the_table_whole(tmp_path: Path, picture: Path) -> None:
    text = pairs_markdown(find_pairs(*_folders(tmp_path, picture)), titles=TITLES)
    assert "| sure 1 *(asr)* | no \\| 1 *(rsr)* |" in text
    assert f"![picture 2]({picture})" in text


def test_the_page_holds_pictures_and_escapes_answers(tmp_path: Path, picture: Path) -> None:
    page = tmp_path / "page.html"
    write_page(page, find_pairs(*_folders(tmp_path, picture)), titles=TITLES)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 4
    assert "question 1 &lt;b&gt;" in text and "<b>" not in text
    assert str(picture) not in text


def test_a_picture_that_is_gone_is_said_and_stops_nothing(tmp_path: Path, picture: Path) -> None:
    pairs = find_pairs(*_folders(tmp_path, picture))
    picture.unlink()
    write_page(tmp_path / "page.html", pairs, titles=TITLES)
    assert "picture 2: one.png is no longer there" in (tmp_path / "page.html").read_text()
