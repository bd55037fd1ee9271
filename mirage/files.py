"""Files that are there whole or not at all, what they hold, their content hashes, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Where models and pictures that were made once lie between runs: $MIRAGE_CACHE, else ~/.cache/mirage."""
    return Path(os.environ.get("MIRAGE_CACHE") or Path.home() / ".cache" / "mirage")


def write_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file by way of a temporary one: a kill leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none: for what is shown, where a missing file is no fault."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sync(path: Path) -> None:
    """Have the system put a file's content, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
