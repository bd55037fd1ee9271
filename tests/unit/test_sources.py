"""Reading rows and pictures: what is wrong is said once, with file, row and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mirage.config.schema import DataConfig, SourceConfig
from mirage.data.pictures import open_picture, picture_size
from mirage.data.readers.build import Turn, messages_of
from mirage.data.row import ImagePart, TextPart
from mirage.data.sources import load_mixture, read_rows
from mirage.errors import UserError


@pytest.fixture
def folder(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the shapes dataset that a test may spoil."""
    return Path(shutil.copytree(shapes, tmp_path / "data"))


def edit_line(folder: Path, number: int, change: Callable[[dict], object]) -> None:
    file = folder / "rows.jsonl"
    lines = file.read_text().splitlines()
    record = json.loads(lines[number - 1])
    change(record)
    lines[number - 1] = json.dumps(record)
    file.write_text("\n".join(lines) + "\n")


def first_picture(folder: Path) -> Path:
    return folder / json.loads((folder / "rows.jsonl").read_text().splitlines()[0])["images"][0]["path"]


def load(folder: Path, **options: object) -> object:
    return load_mixture(DataConfig(dir=folder, sources=(SourceConfig(split="train"),), **options), seed=0)


def test_rows_come_back_as_written(shapes):
    rows = list(read_rows(shapes, splits=("train",)))
    assert len(rows) == 8
    assert rows[0].answer and rows[0].answer.startswith("The first image shows a")
    assert [row.id for row in rows] == [entry.row.id for entry in load(shapes).rows]


def test_truncated_line(folder):
    file = folder / "rows.jsonl"
    file.write_text(file.read_text()[:-40])
    count = len(file.read_text().splitlines())
    with pytest.raises(UserError, match=rf"rows\.jsonl:{count}: not valid JSON \(the text ends too early, .*restore"):
        load(folder)


def test_marks_and_images_differ(folder):
    edit_line(folder, 1, lambda record: record["messages"][0]["content"].pop(0))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*image marks .*the row has 2 images; mark each image once"):
        load(folder)


def test_missing_picture(folder):
    first_picture(folder).unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: row [0-9a-f]{16}: image .*\.png is missing; write"):
        load(folder)


def test_file_that_is_no_picture(folder):
    first_picture(folder).write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: row .* cannot be read .*restore the file"):
        load(folder)


def test_picture_of_another_size(folder):
    Image.new("RGB", (10, 12)).save(first_picture(folder))
    with pytest.raises(UserError, match="has 10 x 12 pixels, the row says 64 x 64"):
        load(folder)


def test_truncated_picture_is_found_when_it_is_decoded(folder):
    picture = first_picture(folder)
    picture.write_bytes(picture.read_bytes()[:-60])
    with pytest.raises(UserError, match="cannot be decoded"):
        open_picture(picture)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "images\\x.png"])
def test_path_that_leaves_the_folder(folder, path):
    edit_line(folder, 1, lambda record: record["images"][0].update(path=path))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: images\.0\.path: must be a relative POSIX path inside"):
        load(folder)


def test_link_that_leads_outside(folder, tmp_path):
    picture = first_picture(folder)
    outside = tmp_path / "outside.png"
    shutil.move(picture, outside)
    picture.symlink_to(outside)
    with pytest.raises(UserError, match="leads outside"):
        load(folder)


def test_unknown_field(folder):
    edit_line(folder, 1, lambda record: record.update(colour="red"))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: colour: Extra inputs are not permitted"):
        load(folder)


def test_no_dataset(tmp_path):
    with pytest.raises(UserError, match="make datagen OUT="):
        load(tmp_path)


def test_skipped_rows_are_listed_and_limited(folder):
    edit_line(folder, 2, lambda record: record["messages"][0]["content"].pop(0))
    mixture = load(folder, on_bad_row="skip", max_left_out=1)
    assert len(mixture.rows) == 7
    assert [("rows.jsonl:2" in entry.reason, entry.source) for entry in mixture.left_out] == [(True, "train")]
    with pytest.raises(UserError, match=r"1 rows cannot be trained on and data\.max_left_out is 0"):
        load(folder, on_bad_row="skip")


def test_a_picture_cut_off_is_a_bad_row_where_pictures_are_checked_whole(folder):
    picture = first_picture(folder)
    picture.write_bytes(picture.read_bytes()[:-60])
    assert len(load(folder).rows) == 8, "its header is whole"
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: row .*: image .* cannot be decoded"):
        load(folder, check_pictures="whole")
    mixture = load(folder, check_pictures="whole", on_bad_row="skip", max_left_out=8)
    assert 0 < len(mixture.left_out) == 8 - len(mixture.rows)
    assert all("cannot be decoded" in entry.reason for entry in mixture.left_out)


def test_an_id_that_occurs_twice_is_a_bad_row(folder):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:{len(lines) + 1}: row id '[0-9a-f]+' occurs twice"):
        load(folder)


def test_marks_of_other_systems_and_long_lines(folder):
    """A byte order mark and CRLF are taken; a line longer than 4 MiB is one bad row, and those after it are read."""
    file = folder / "rows.jsonl"
    lines = file.read_text().splitlines()
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "x" * (5 * 2**20), *lines[1:]]).encode() + b"\r\n")
    mixture = load(folder, on_bad_row="skip", max_left_out=1)
    assert len(mixture.rows) == 8
    assert "rows.jsonl:2: the line is longer than 4 MiB" in mixture.left_out[0].reason


def test_max_samples_draws_the_same_rows_again(shapes):
    source = SourceConfig(split="train", max_samples=3)
    chosen = [load_mixture(DataConfig(dir=shapes, sources=(source,)), seed=seed).rows for seed in (1, 1, 2)]
    assert len(chosen[0]) == 3
    assert [entry.row.id for entry in chosen[0]] == [entry.row.id for entry in chosen[1]]
    assert [entry.row.id for entry in chosen[0]] != [entry.row.id for entry in chosen[2]]


def write_published(folder: Path, value: str) -> Path:
    folder.mkdir()
    for number in (1, 2):
        path = folder / f"images/1/object{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20 + number)).save(path)
    record = {
        "id": 1,
        "category": "Violent",
        "sub_category": "Weapon-Related Violence",
        "image": ["images/1/object1.png", "images/1/object2.png"],
        "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "The first image shows a ball."}],
    }
    (folder / "mis_train.json").write_text(json.dumps([record]))
    return folder


def test_published_mis_train_becomes_bare_images_then_the_question(tmp_path):
    folder = write_published(tmp_path / "mis", "<image>\n<image>\nHow are these used?")
    config = DataConfig(dir=tmp_path, sources=(SourceConfig(format="mis_train", path=folder),))
    (entry,) = load_mixture(config, seed=0).rows
    assert entry.row.messages[0].content == (
        ImagePart(index=0),
        ImagePart(index=1),
        TextPart(text="How are these used?"),
    )
    assert [(image.width, image.height) for image in entry.row.images] == [(30, 21), (30, 22)]


def test_published_row_with_a_mark_too_few(tmp_path):
    folder = write_published(tmp_path / "mis", "<image>\nHow are these used?")
    config = DataConfig(dir=tmp_path, sources=(SourceConfig(format="mis_train", path=folder),))
    with pytest.raises(UserError, match=r"mis_train\.json\[0\]: .*1 <image> marks and 2 images; mark each image once"):
        load_mixture(config, seed=0)


def test_sharegpt_text_is_kept_to_the_letter():
    turns = [Turn("user", "Image-1: <image>\nAnd <image>?"), Turn("assistant", "Yes.")]
    user, assistant = messages_of(turns, num_images=2, location="here")
    assert user.content == (
        TextPart(text="Image-1: "),
        ImagePart(index=0),
        TextPart(text="\nAnd "),
        ImagePart(index=1),
        TextPart(text="?"),
    )
    assert assistant.text == "Yes."


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photograph_has_its_upright_size(tmp_path, orientation):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif)
    size = (20, 40) if orientation >= 5 else (40, 20)
    assert picture_size(tmp_path / "turned.jpg") == size == open_picture(tmp_path / "turned.jpg").size


def test_transparent_and_cmyk_pictures_become_rgb(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(tmp_path / "print.jpg").mode == "RGB"
