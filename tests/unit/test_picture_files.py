"""Bad and unusual pictures in rows: one message with file and row, or the handling that docs/bad-data.md describes."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirage.config.schema import DataConfig, SourceConfig
from mirage.data.picture_files import open_picture, picture_size
from mirage.data.sources import load_mixture
from mirage.errors import UserError
from tests.support.dataset import write_dataset
from tests.support.illustrators import png_claiming


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", edge=16, seed_rows=2)


def load(folder: Path) -> object:
    return load_mixture(DataConfig(dir=folder, sources=(SourceConfig(split="train"),)), seed=0)


def first_picture(folder: Path) -> Path:
    return folder / json.loads((folder / "rows.jsonl").read_text().splitlines()[0])["images"][0]["path"]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def outside(path: Path) -> None:
    shutil.move(path, path.parents[3] / "outside.png")
    path.symlink_to(path.parents[3] / "outside.png")


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "bomb": (lambda path: path.write_bytes(png_claiming(100_000, 100_000)), "far more than the 67,108,864 pixels"),
    "large": (lambda path: path.write_bytes(png_claiming(12_000, 12_000)), "has 12000 x 12000 pixels, at most"),
    "empty": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text": (lambda path: path.write_bytes(b"<svg/>"), "it is none of PNG, JPEG, WEBP, GIF, BMP, TIFF"),
    "postscript": (
        lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "it is none of",
    ),
    "cut": (truncated, "cannot be read"),
    "folder": (replaced(Path.mkdir), "is a folder; a regular file is needed"),
    "pipe": (replaced(os.mkfifo), "is a pipe; a regular file is needed"),
    "device": (replaced(lambda path: path.symlink_to("/dev/zero")), "leads outside"),
    "link": (outside, "leads outside"),
    "circle": (replaced(lambda path: path.symlink_to(path.name)), "cannot be opened"),
    "other size": (lambda path: Image.new("RGB", (1, 1)).save(path), "has 1 x 1 pixels, the row says 16 x 16"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_picture_is_one_message_with_file_and_row(folder: Path, name: str) -> None:
    spoil, message = SPOILT[name]
    spoil(first_picture(folder))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf"rows\.jsonl:\d+: .*{message}"):
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_device_beside_the_rows_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a device"):
        picture_size(Path("/dev/zero"))
    with pytest.raises(UserError, match="is a device"):
        open_picture(Path("/dev/zero"))


def test_the_ending_does_not_matter(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4), "red").save(tmp_path / "a.jpg", format="PNG")
    assert open_picture(tmp_path / "a.jpg").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000)])
def test_tiny_and_very_wide_pictures_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    assert picture_size(tmp_path / "a.png") == open_picture(tmp_path / "a.png").size == size


def test_16_bit_grey_keeps_its_upper_bits(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256 * 40, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 40, 255]


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif cannot be decoded \(pixel mode F has no fixed range"):
        open_picture(tmp_path / "a.tif")


def test_a_palette_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=1)
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, kind: str) -> None:
    first, second = (Image.new("RGB", (6, 6), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(tmp_path / "a", format=kind, save_all=True, append_images=[second], **options)
    assert open_picture(tmp_path / "a").getpixel((3, 3)) == (255, 0, 0)


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert open_picture(tmp_path / "a.tif").getpixel((0, 0)) == (255, 0, 0)


def test_a_header_that_asks_for_gigabytes_gets_what_the_file_has(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    content = bytearray(file.read_bytes())
    content[8:12] = (2**31 - 1).to_bytes(4, "big")  # the length of the first chunk
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.png"):
            open_picture(file)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
