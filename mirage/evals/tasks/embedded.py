"""Pictures that lie inside a benchmark's files: written once into the cache folder, named by their content."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from mirage.data.picture_files import picture_format
from mirage.errors import UserError
from mirage.files import cache_dir, sync

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "MPO": "jpg"}


@dataclass(frozen=True)
class KeptPicture:
    """A picture file and the sha256 of its content (hex)."""

    path: Path
    sha256: str


def keep_picture(content: bytes, *, where: str) -> KeptPicture:
    """Write a picture's bytes to `<cache>/benchmarks/<sha256>.<ext>` unless it lies there; bytes are kept as they are.

    `where` names file and row in the message of the `UserError` raised for bytes that are no picture.
    """
    digest = hashlib.sha256(content).hexdigest()
    folder = cache_dir() / "benchmarks"
    path = folder / f"{digest}.{_extension(content, where=where)}"
    if not (path.is_file() and path.stat().st_size == len(content)):
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, content)
    return KeptPicture(path, digest)


def decode_base64(text: str, *, where: str) -> bytes:
    """The bytes of a base64 cell, with or without `data:image/png;base64,` in front. Raises `UserError`."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: the picture is not base64 ({error}); download the file again") from error


def _extension(content: bytes, *, where: str) -> str:
    try:
        return _EXTENSIONS[picture_format(content)]
    except UserError as error:
        raise UserError(f"{where}: {len(content)} bytes that are no picture ({error}); download it again") from error


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)
