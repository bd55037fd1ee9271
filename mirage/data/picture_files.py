"""Picture files from outside, opened in one way: known formats, bounded size, upright, RGB; or one message."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mirage.errors import UserError
from mirage.safe_paths import open_regular, printable

# Pillow knows more formats; some of them start other programs (EPS) or have no bounds.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# By the header, before a pixel is unpacked: 201 MB as RGB, about three seconds. Cameras and scanners stay below.
MAX_PIXELS = 2**26
MAX_FILE_BYTES = 512 * 1024**2


def open_picture(path: Path | None, *, content: bytes | None = None) -> Image.Image:
    """An RGB image, EXIF rotation applied, transparency laid on white, of an animation the first frame.

    CMYK is converted without its colour profile; 16-bit grey keeps its upper 8 bits. Raises `UserError` for a file that
    is no picture, cannot be decoded whole, or has more than 67 million pixels. `content` is the file's bytes, where
    the caller has read them; without a path the message names their number.
    """
    with _image(path, content, fault="cannot be decoded") as image:
        return to_rgb(ImageOps.exif_transpose(image))


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file, which need not be one: for a hash, or a copy. Raises `UserError` beyond 512 MiB.

    A pipe or a device is refused, unread.
    """
    with _stream(path, None) as stream:
        num_bytes = stream.seek(0, io.SEEK_END)
        if num_bytes > MAX_FILE_BYTES:
            raise UserError(f"image {printable(path)} has {num_bytes:,} bytes, at most {MAX_FILE_BYTES:,} are read")
        stream.seek(0)
        return stream.read()


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of the upright picture, from its header. Raises `UserError` for a file that is none."""
    with _image(path, None, fault="cannot be read") as image:
        # Asking a PNG for EXIF decodes it whole; one that has any says so in its header.
        has_exif = image.format != "PNG" or "exif" in image.info
        lies_on_its_side = has_exif and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.height, image.width) if lies_on_its_side else (image.width, image.height)


def picture_format(content: bytes) -> str:
    """Pillow's name of the format of a picture's bytes. Raises `UserError` for bytes that are no picture."""
    with _image(None, content, fault="cannot be read") as image:
        return image.format or ""


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB, transparency laid on white. Raises `ValueError` for pixels without a fixed range."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode} has no fixed range; save it with 8 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colour = image.convert("RGBA")
        paper = Image.new("RGBA", colour.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, colour).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _image(path: Path | None, content: bytes | None, *, fault: str) -> Iterator[Image.Image]:
    """The opened picture; whatever its decoder raises inside the block becomes one `UserError`."""
    name = f"image {printable(path)}" if path is not None else f"a picture of {len(content or b'')} bytes"
    with _stream(path, content) as stream:
        num_bytes = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if num_bytes == 0:
            raise UserError(f"{name} is empty (0 bytes); restore the file")
        if num_bytes > MAX_FILE_BYTES:
            raise UserError(f"{name} has {num_bytes:,} bytes, at most {MAX_FILE_BYTES:,} are read; make it smaller")
        try:
            # Pillow warns where this module decides.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(stream, formats=FORMATS) as image:
                    _check_size(image, name)
                    yield image
        except UserError:
            raise
        except Image.DecompressionBombError as error:
            raise UserError(f"{name} has far more than the {MAX_PIXELS:,} pixels that are read") from error
        except Image.UnidentifiedImageError as error:
            raise UserError(
                f"{name} {fault} (it is none of {', '.join(FORMATS)}, or its header is damaged); restore the file"
            ) from error
        except Exception as error:  # decoders raise many types on damaged files
            raise UserError(f"{name} {fault} ({' '.join(str(error).split())[:200]}); restore the file") from error


def _stream(path: Path | None, content: bytes | None) -> BinaryIO:
    if content is not None:
        return io.BytesIO(content)
    assert path is not None, "a path or the content"
    try:
        return _KnownSize(open_regular(path))
    except UserError as error:
        raise UserError(f"image {error}; write the dataset again or unpack its images") from error


class _KnownSize(io.BufferedReader):
    """A file that asks for no more memory than it has bytes left: a damaged header asks it for gigabytes."""

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file.detach())
        self._num_bytes = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._num_bytes - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{name} has {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are read; make it smaller"
        )
