"""Paths in data lead nowhere: not training, not pages, not tables, not artifacts read what a file of others points at.

The readers of rows and of published layouts have their own tests (tests/unit/test_sources.py, tests/fuzz); here are the
parts that show and send things.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from mirage.config.schema import DataConfig, SourceConfig
from mirage.data.sources import load_mixture
from mirage.errors import UserError
from mirage.evals.calibration.sheet import export_sheet
from mirage.report.page import write_report
from mirage.tracking.artifacts import dataset_card
from mirage.tracking.sample_table import sample_table
from tests.support.dataset import write_dataset
from tests.support.evaluations import labels, write_evaluation

SECRET = "the-content-of-another-file-0123456789"


@pytest.fixture
def outside(tmp_path: Path) -> list[Path]:
    """What a path of others could name: a text file, a link to it, a pipe, a device without end, a folder, nothing."""
    text = tmp_path / "elsewhere" / "secret.txt"
    text.parent.mkdir()
    text.write_text(SECRET)
    link = tmp_path / "elsewhere" / "link.png"
    link.symlink_to(text)
    pipe = tmp_path / "elsewhere" / "pipe.png"
    os.mkfifo(pipe)
    return [text, link, pipe, Path("/dev/zero"), text.parent, text.parent / "nothing.png"]


def evaluation(folder: Path, paths: list[Path]) -> Path:
    write_evaluation(folder, {"mis_hard": labels(asr=3, rsr=4), "twins": labels(helped=3)}, step=0, image_paths=paths)
    return folder


def test_a_report_shows_pictures_and_nothing_else(tmp_path: Path, outside: list[Path]) -> None:
    evaluation(tmp_path / "run" / "evals" / "step-000000", outside)
    (tmp_path / "run" / "recipe.json").write_text('{"name": "x"}')
    written = write_report([tmp_path / "run"])
    text = written.path.read_text("utf-8")
    assert "data:image/webp" not in text and SECRET not in text


def test_a_label_sheet_takes_pictures_and_names_them_as_what_they_are(tmp_path: Path, outside: list[Path]) -> None:
    picture = tmp_path / "page.html"
    Image.new("RGB", (8, 8), "red").save(picture, format="GIF")
    good = evaluation(tmp_path / "good" / "step-000000", [picture])
    export_sheet([good], tmp_path / "sheet" / "labels.csv", n=5)
    copied = [path.suffix for path in (tmp_path / "sheet" / "labels_pictures").iterdir()]
    assert copied == [".gif"]
    for number, path in enumerate(outside):
        bad = evaluation(tmp_path / f"bad{number}" / "step-000000", [path])
        with pytest.raises(UserError, match="image "):
            export_sheet([bad], tmp_path / f"sheet{number}" / "labels.csv", n=5)
        assert SECRET not in "".join(file.read_text() for file in tmp_path.glob(f"sheet{number}/**/*.*"))


def test_a_table_for_wandb_takes_pictures_alone(tmp_path: Path, outside: list[Path]) -> None:
    pytest.importorskip("wandb")
    row = dict.fromkeys(("id", "task", "question", "answer", "verdict", "reason", "category", "changed"), "")
    found = sample_table([row | {"image_paths": outside}], picture_pixels=64, max_bytes=1 << 20)
    assert found.num_pictures == 0 and found.num_pictures_left_out == len(outside)


def test_an_artifact_holds_no_file_that_a_link_leads_to(tmp_path: Path, outside: list[Path]) -> None:
    folder = write_dataset(tmp_path / "data", seed_rows=1)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(outside[0])
    (folder / "README.md").symlink_to(outside[0])
    os.mkfifo(folder / "notes.md")
    card = dataset_card(folder, detail="files", max_bytes=1 << 20)
    names = [name for name, _ in (*card.files, *card.references)]
    assert names == ["rows.jsonl"] and list(card.metadata["files"]) == ["rows.jsonl"]


@pytest.mark.parametrize("way", ["link", "folder link", "parent", "absolute"])
def test_a_row_cannot_show_a_picture_of_elsewhere(way: str, tmp_path: Path) -> None:
    folder, private = write_dataset(tmp_path / "data", seed_rows=1), tmp_path / "private" / "mine.png"
    private.parent.mkdir()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    image = next(row for row in rows if row["split"] == "train")["images"][0]
    private.write_bytes((folder / image["path"]).read_bytes())
    path = folder / image["path"]
    if way == "link":
        path.unlink()
        path.symlink_to(private)
    elif way == "folder link":
        (folder / "album").symlink_to(private.parent)
        image["path"] = "album/mine.png"
    else:
        image["path"] = "../private/mine.png" if way == "parent" else str(private)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"leads outside|must be a relative"):
        load_mixture(DataConfig(dir=folder, sources=(SourceConfig(split="train"),)), seed=0)
