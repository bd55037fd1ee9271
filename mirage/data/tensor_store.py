"""Tensors in files by key: checked when read, written whole by any number of processes, held under a size limit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save

from mirage.errors import UserError
from mirage.strict_json import parse_json

LOGGER = logging.getLogger(__name__)
SIZE_FILE = "size_bytes"
_SUFFIX = ".safetensors"
_LENGTH = struct.Struct("<Q")


def content_key(*parts: object) -> str:
    """sha256, hex, of JSON values: the name under which something that depends on all of them is kept."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class TensorStore:
    """A folder of small safetensors files, one a key (64 hex digits), shared by processes and runs.

    A file carries the sha256 of its tensors; one that does not match, or is torn, counts as absent and is written
    again. `limit_bytes` bounds the folder: to make room, entries unused since `started` (when this object was made)
    go, least recently used first. Entries that the run itself uses stay and the new one is not stored, because a pass
    over more pictures than fit would otherwise push out each one just before its next use.
    Raises `UserError` for a folder that cannot be written.
    """

    def __init__(self, folder: Path, *, limit_bytes: int | None = None, setting: str) -> None:
        self.folder = folder.expanduser().absolute()
        self.limit_bytes = limit_bytes
        # A second of grace: file times come from a coarser clock.
        self.started = time.time() - 1
        self._full = False
        self.num_hits = self.num_misses = self.num_refused = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A file, not a question of rights: root may write everywhere, and a full disk says so here.
            probe = self.folder / f".probe.{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"{setting}: {self.folder} cannot be written ({error.strerror}); name another") from error

    def path(self, key: str) -> Path:
        """Where an entry lies; 256 folders keep each of them listable."""
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def __contains__(self, key: str) -> bool:
        """Whether there is a file; only `get` checks what is in it."""
        return self.path(key).exists()

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of `key`, or None where there are none or they are damaged."""
        path = self.path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            self.num_misses += 1
            return None
        tensors = _checked(content, key)
        if tensors is None:
            LOGGER.warning("%s is damaged and made again", path)
            self.num_misses += 1
            return None
        self.num_hits += 1
        return tensors

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Store tensors; False where the limit or the disk does not allow it. A cache never stops a run."""
        if self._full:
            self.num_refused += 1
            return False
        content = _sealed(tensors, key)
        path = self.path(key)
        partial = path.with_name(f".{key}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            if self.limit_bytes is not None and not self._make_room(len(content), path, self.limit_bytes):
                self._full = True
                self.num_refused += 1
                return False
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            LOGGER.warning("%s cannot take more (%s); going on without", self.folder, error.strerror)
            self._full = True
            self.num_refused += 1
            return False
        return True

    def _make_room(self, num_bytes: int, path: Path, limit_bytes: int) -> bool:
        """Count `num_bytes` in, under a lock. What was counted and never written is put right by the next sweep."""
        with FileLock(self.folder / ".lock"):
            counter = self.folder / SIZE_FILE
            held = _read_int(counter)
            if held is None:
                held = sum(size for _, size, _ in self._entries())
            grown = held + num_bytes - (path.stat().st_size if path.exists() else 0)
            if grown > limit_bytes:
                grown = self._sweep(limit_bytes - num_bytes) + num_bytes
            if grown > limit_bytes:
                return False
            counter.write_text(str(grown))
            return True

    def _sweep(self, target_bytes: int) -> int:
        """Remove entries unused since `started` until `target_bytes` are held; returns the bytes left."""
        entries = sorted(self._entries())
        held = sum(size for _, size, _ in entries)
        for used, size, path in entries:
            if held <= target_bytes or used >= self.started:
                break
            path.unlink(missing_ok=True)
            held -= size
        (self.folder / SIZE_FILE).write_text(str(held))
        return held

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every entry, and of partial files that nobody finished."""
        found = []
        for path in self.folder.glob("??/*"):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _seal(content: bytes) -> str:
    """sha256 of a safetensors file without its metadata: names, types, shapes and bytes of the tensors."""
    size = _LENGTH.unpack_from(content)[0]
    header = parse_json(content[_LENGTH.size : _LENGTH.size + size])
    header.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(memoryview(content)[_LENGTH.size + size :])
    return digest.hexdigest()


def _sealed(tensors: Mapping[str, torch.Tensor], key: str) -> bytes:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in no fixed order.
    return save(whole, metadata={"seal": f"{key} {_seal(save(whole))}"})


def _checked(content: bytes, key: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a file whose seal and key are right, else None."""
    try:
        size = _LENGTH.unpack_from(content)[0]
        metadata = parse_json(content[_LENGTH.size : _LENGTH.size + size])["__metadata__"]
        if metadata["seal"] != f"{key} {_seal(content)}":
            return None
        return load(content)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None
