"""Pictures of published records: paths beside the file, or bytes inside it, which are unpacked into the cache once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mirage.data.picture_files import picture_format, picture_size
from mirage.data.readers.records import Record
from mirage.data.row import ImageRef, ImageSource
from mirage.errors import UserError
from mirage.files import cache_dir, file_sha256
from mirage.safe_paths import is_file, stays_inside

AS_PUBLISHED = "as published"
# Pillow's name of a format -> file ending. A picture inside a data file has no ending of its own that can be trusted.
ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "MPO": ".jpg"}


def unpacked_dir() -> Path:
    """Where pictures from inside data files lie, by content hash: `pictures/` in the cache ($MIRAGE_CACHE)."""
    return cache_dir() / "pictures"


def unpack(content: bytes, *, ending: str) -> str:
    """Store a picture's bytes once; returns its path under `unpacked_dir()`, which holds the hash.

    Several processes may do so at a time: a file is there whole or not at all.
    """
    digest = hashlib.sha256(content).hexdigest()
    relative = f"images/{digest[:2]}/{digest}{ending}"
    target = unpacked_dir() / relative
    if not target.is_file() or target.stat().st_size != len(content):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(target)
    return relative


def image_list(record: Record, *names: str) -> list[Any]:
    """The pictures in the first of these fields that the record has: a list or one; null and "" are none."""
    value: Any = next((record.value[name] for name in names if record.value.get(name) not in (None, "")), [])
    return list(value) if isinstance(value, list) else [value]


def image_refs(record: Record, values: Sequence[Any]) -> tuple[tuple[ImageRef, ...], Path]:
    """References of a record's pictures and the folder their paths start from.

    A picture is a path (relative to the record's root) or `{"bytes": ..., "path": ...}` as Hugging Face `datasets`
    stores it. Raises `UserError` naming the record for one that is missing, no picture, or outside the root.
    """
    values = [_plain(value) for value in values]
    embedded = [isinstance(value, bytes) for value in values]
    if any(embedded) and not all(embedded):
        raise UserError(f"{record.location}: some of its pictures are bytes and some are paths; give one kind")
    if values and all(embedded):
        return tuple(_embedded(value, record) for value in values), unpacked_dir()
    return tuple(_beside(value, record) for value in values), record.root


def _plain(value: Any) -> Any:
    """The bytes of a stored picture, or its path when it has none."""
    if not isinstance(value, dict):
        return value
    content = value.get("bytes")
    return bytes(content) if isinstance(content, bytes | bytearray) and content else value.get("path")


def _embedded(content: bytes, record: Record) -> ImageRef:
    try:
        ending = ENDINGS[picture_format(content)]
    except UserError as error:
        raise UserError(f"{record.location}: {error}") from error
    return _reference(unpacked_dir(), unpack(content, ending=ending), record)


def _beside(name: Any, record: Record) -> ImageRef:
    if not isinstance(name, str) or not name:
        raise UserError(f"{record.location}: a picture must be a path or embedded bytes, found {name!r:.80}")
    if not stays_inside(name):
        raise UserError(f"{record.location}: image path {name!r:.200} must be relative and stay inside {record.root}")
    if not is_file(record.root / name):
        raise UserError(
            f"{record.location}: image {name:.200} is missing in {record.root}; unpack the pictures there, or set the "
            "source's image_dir to the folder that image paths start from"
        )
    return _reference(record.root, PurePosixPath(name).as_posix(), record)


def _reference(root: Path, relative: str, record: Record) -> ImageRef:
    path = root / relative
    try:
        width, height = picture_size(path)
    except UserError as error:
        raise UserError(f"{record.location}: {error}") from error
    return ImageRef(
        path=relative,
        sha256=file_sha256(path),
        width=width,
        height=height,
        source=ImageSource(kind="user", generator=AS_PUBLISHED),
        licence=AS_PUBLISHED,
        attribution=AS_PUBLISHED,
    )
