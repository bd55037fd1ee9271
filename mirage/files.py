"""Files that are there whole or not at all, what they hold, their content hashes, and the cache folder."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from mirage.errors import UserError
from mirage.strict_json import read_json


def cache_dir() -> Path:
    """Where models and pictures that were made once lie between runs: $MIRAGE_CACHE, else ~/.cache/mirage."""
    return Path(os.environ.get("MIRAGE_CACHE") or Path.home() / ".cache" / "mirage")


def write_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Write a UTF-8 text file, or its pieces, by way of a temporary one: a kill leaves the old content or the new."""
    temporary = temporary_of(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def temporary_of(path: Path) -> Path:
    """The name beside `path` that this process writes it under first.

    What processes that were killed while they wrote `path` have left there is removed: those of this machine, as of
    another one's nobody here knows whether they live.
    """
    host = socket.gethostname()
    for left in path.parent.glob(f".{glob.escape(f'{path.name}.{host}')}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(OSError):
                left.unlink()
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none: for what is shown, where a missing file is no fault."""
    try:
        content = read_json(path, any_number=True)
    except UserError:
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
