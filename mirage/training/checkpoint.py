"""Checkpoints: written aside, synced, renamed, then marked READY with the hash of every file.

checkpoint-000200/
  READY            manifest: step, fingerprint of the weights, sha256 of every file
  recipe.json      the resolved recipe
  model/           what plain transformers, peft and vLLM load
  resume/          optimiser state and random state; only MIRage reads it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mirage.errors import UserError, describe_refusal
from mirage.files import file_sha256, sync, write_atomic
from mirage.strict_json import JsonError, parse_json

READY = "READY"
NAME = re.compile(r"^checkpoint-(\d{6,})$")
LEASE_SUFFIX = ".lease"
_NUM_HASHED_TOGETHER = 8
# Of an evaluation that waits; it needs no process that holds it.
WAITING_LEASE = f"evaluation{LEASE_SUFFIX}"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimiser steps."""
    return f"checkpoint-{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """The step a checkpoint folder's name tells."""
    match = NAME.match(folder.name)
    if match is None:
        raise UserError(f"{folder} is not named like a checkpoint (checkpoint-000200)")
    return int(match[1])


def aside_name(step: int) -> str:
    """Folder that a checkpoint is written in before it is renamed."""
    return f".{checkpoint_name(step)}.partial"


def fingerprint(hashes: Mapping[str, str]) -> str:
    """Identity of the weights: 16 hex digits over the hashes of the model's safetensors files."""
    weights = {name: value for name, value in sorted(hashes.items()) if name.endswith(".safetensors")}
    weights = {name: value for name, value in weights.items() if not name.startswith("resume/")}
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16]


def publish(
    aside: Path, final: Path, *, step: int, hashes: Mapping[str, str] | None = None, is_due: bool = True
) -> None:
    """Make the folder written at `aside` the checkpoint `final`: rename, READY. One process calls it.

    `hashes` are the sha256 of all its files, which are on the disk then; without them both is seen to here. READY of
    one that the recipe does not make due, which a signal asked for, says so.
    """
    if hashes is None:
        hashes = synced_hashes([path for path in aside.rglob("*") if path.is_file()], relative_to=aside)
    hashes = dict(sorted(hashes.items()))
    if final.exists():
        shutil.rmtree(final)
    aside.replace(final)
    sync(final.parent)
    manifest = {"step": step, "fingerprint": fingerprint(hashes), "files": hashes}
    if not is_due:
        manifest["on_signal"] = True
    write_atomic(final / READY, json.dumps(manifest, indent=2) + "\n")


def synced_hashes(files: Iterable[Path], *, relative_to: Path) -> dict[str, str]:
    """sha256 by relative name of files that have reached the disk."""
    listed = list(files)
    # Waiting for the disk and hashing leave Python to others: large files are done side by side.
    with ThreadPoolExecutor(_NUM_HASHED_TOGETHER) as pool:
        digests = list(pool.map(_synced_sha256, listed))
    return {path.relative_to(relative_to).as_posix(): digest for path, digest in zip(listed, digests)}


def _synced_sha256(path: Path) -> str:
    sync(path)
    return file_sha256(path)


class Written:
    """What a rank could not write, to be told to all ranks once they have met in every collective."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Around writing: keeps the first reason why it failed. Any other error is raised."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.reason = self.reason or describe_refusal(error) or f"{type(error).__name__}: {error}"


def read_ready(folder: Path) -> dict[str, Any] | None:
    """The READY manifest of a checkpoint, or None for a folder that was never finished."""
    try:
        found = parse_json((folder / READY).read_bytes())
    except (FileNotFoundError, NotADirectoryError, JsonError):
        return None
    return found if isinstance(found, dict) else None


def ready_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folders = [path for path in run_dir.glob("checkpoint-*") if NAME.match(path.name) and read_ready(path)]
    return sorted(folders, key=checkpoint_step)


def due_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints that the recipe made due, oldest first: those that are measured and counted."""
    return [path for path in ready_checkpoints(run_dir) if not (read_ready(path) or {}).get("on_signal")]


def last_resumable(run_dir: Path) -> Path | None:
    """The newest finished checkpoint that training can continue from."""
    return next((path for path in reversed(ready_checkpoints(run_dir)) if (path / "resume").is_dir()), None)


def remove_torn(run_dir: Path) -> None:
    """Remove what an interrupted write left: folders aside, and checkpoints without READY.

    READY comes whole or not at all; raises `UserError` for a damaged one, since what it marks may be whole.
    """
    for path in [*run_dir.glob(".checkpoint-*.partial"), *run_dir.glob(".*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in run_dir.glob("checkpoint-*"):
        if NAME.match(path.name) and read_ready(path) is None:
            if (path / READY).exists():
                raise UserError(f"{path / READY} is damaged; restore it from a copy, or remove {path.name} yourself")
            shutil.rmtree(path)


def leases(folder: Path) -> list[Path]:
    """Lease files that evaluations hold on a checkpoint: that of one which waits, and locks of those under way.

    The lock of a process that was killed is free, and its file no lease any more.
    """
    found = sorted(folder.glob(f"*{LEASE_SUFFIX}"))
    return [path for path in found if path.name == WAITING_LEASE or _is_locked(path)]


def _is_locked(path: Path) -> bool:
    lock = FileLock(path)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def retire(run_dir: Path, *, keep_last: int) -> list[Path]:
    """Remove trained checkpoints older than the newest `keep_last`, save those under a lease. Returns what went.

    One that a signal asked for goes, uncounted, as soon as there is a newer one.

    READY goes first, so that a removal cut short leaves a folder that nothing takes for a checkpoint.
    """
    due = [path for path in due_checkpoints(run_dir) if checkpoint_step(path) > 0]
    on_signal = [path for path in ready_checkpoints(run_dir)[:-1] if (read_ready(path) or {}).get("on_signal")]
    gone = [path for path in (*due[:-keep_last], *on_signal) if not leases(path)]
    for path in gone:
        (path / READY).unlink()
        shutil.rmtree(path)
    return gone
