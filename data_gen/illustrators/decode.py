"""Turn a picture from outside into plain PNG bytes: upright, RGB, of bounded size, without anything but pixels."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image, ImageOps

from data_gen.pictures import PNG_LEVEL, Picture
from mirage.data.picture_files import to_rgb
from mirage.errors import UserError
from mirage.safe_paths import open_regular

VERSION = "1"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
MAX_FILE_BYTES = 64 * 2**20
# A picture is refused by the size in its header, before a byte of it is unpacked.
MAX_PIXELS = 64_000_000
MAX_ASPECT = 100


def read_picture_bytes(path: Path, *, where: str) -> bytes:
    """A picture file's bytes, at most `MAX_FILE_BYTES`. Raises UserError naming `where` for what is no such file."""
    try:
        with open_regular(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            # `check_header` and `decode_picture` say what is wrong with so large a file.
            return file.read() if num_bytes <= MAX_FILE_BYTES else file.read(MAX_FILE_BYTES + 1)
    except (OSError, UserError) as error:
        raise UserError(f"{where} cannot be read ({error})") from error


def check_header(content: bytes, *, where: str) -> None:
    """Look at a picture's header only. Raises UserError naming `where` for what is no picture that can be used."""
    with _opened(content, where=where):
        pass


def decode_picture(content: bytes, *, where: str, max_edge_pixels: int) -> Picture:
    """The picture as PNG: EXIF rotation applied, transparency laid on white, longer edge at most `max_edge_pixels`.

    The same bytes give the same PNG under the same Pillow. Metadata (place, device, colour profile) is left behind.
    Raises UserError naming `where` for anything that is not a single readable picture.
    """
    image = _opened(content, where=where)
    try:
        rgb = to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise many types on damaged files
        raise UserError(f"{where} cannot be decoded ({error}); replace or remove the file") from error
    longer = max(rgb.size)
    if longer > max_edge_pixels:
        size = tuple(max(1, edge * max_edge_pixels // longer) for edge in rgb.size)
        rgb = rgb.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    return encode_rgb(rgb)


def encode_rgb(image: Image.Image) -> Picture:
    """An RGB image as PNG with nothing but its pixels."""
    bare = Image.frombytes("RGB", image.size, image.tobytes())
    buffer = io.BytesIO()
    bare.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return Picture(png=buffer.getvalue(), width=image.width, height=image.height)


def _opened(content: bytes, *, where: str) -> Image.Image:
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{where} has {len(content)} bytes, at most {MAX_FILE_BYTES} are read; make it smaller")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        num_frames = getattr(image, "n_frames", 1)
    except Image.DecompressionBombError as error:
        raise UserError(f"{where} has far more than the {MAX_PIXELS} pixels that are read; make it smaller") from error
    except Exception as error:  # decoders raise many types on files that are something else
        kinds = ", ".join(FORMATS)
        raise UserError(f"{where} is no picture ({kinds} are read); replace or remove the file") from error
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{where} has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read; make it smaller"
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UserError(f"{where} is a strip of {image.width} x {image.height} pixels; replace or remove the file")
    if num_frames != 1:
        raise UserError(f"{where} has {num_frames} frames or pages; save the one to use as a picture of its own")
    return image
