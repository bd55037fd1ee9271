"""The store of stage results by content key: one append-only JSONL a stage, safe against kills, with one writer."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from data_gen.sample import Sample
from mirage.data.row import canonical_json
from mirage.endpoint.failures import FailureKind, Usage
from mirage.errors import UserError
from mirage.strict_json import parse_json

Status = Literal["done", "dropped", "failed"]
STAGES_DIR = "stages"
LOCK_FILE = ".lock"
# Fields that hold a place in the plan: stored relative to the input's place, so that a result serves equal samples
# wherever they stand.
_PLACES = ("position", "twin_of")
_MERGED = ("checks", "tags")  # stored entry by entry: a result never carries over what another stage wrote


@dataclass(frozen=True)
class Record:
    """One stored result. A later record of the same key replaces an earlier one (a failure that was asked again)."""

    key: str
    status: Status
    samples: tuple[dict[str, Any], ...] = ()
    """done: each output as its difference from the input (`sample_delta`)."""
    reason: str = ""
    """dropped: why."""
    kind: FailureKind | None = None
    message: str = ""
    """failed: the class and what was found."""
    usage: Usage = field(default_factory=Usage)


def identity_sha256(identity: Mapping[str, Any]) -> str:
    """sha256 (hex) of a stage's identity, for `result_key`."""
    return hashlib.sha256(canonical_json(dict(identity)).encode()).hexdigest()


def result_key(*, stage: str, implementation: str, version: str, identity: str, root_seed: int, view: Any) -> str:
    """Content key of a result: sha256 (hex) over everything that decides it; `identity` is a hash of the stage's."""
    parts = [stage, implementation, version, identity, root_seed, view]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def sample_delta(before: Sample, after: Sample) -> dict[str, Any]:
    """The fields in which `after` differs from `before`, as JSON.

    Raises ValueError if `after` does not stand at or below the place of `before` in the plan.
    """
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    delta = {name: value for name, value in new.items() if name not in _PLACES and value != old[name]}
    for name in _MERGED:
        if name in delta:
            delta[name] = {
                key: new[name].get(key) for key in old[name] | new[name] if old[name].get(key) != new[name].get(key)
            }
    if after.position != before.position:
        delta["position"] = list(_below(before.position, after.position, name="position"))
    if after.twin_of != before.twin_of:
        delta["twin_of"] = (
            None if after.twin_of is None else list(_below(before.position, after.twin_of, name="twin_of"))
        )
    return delta


def _below(parent: tuple[int, ...], place: tuple[int, ...], *, name: str) -> tuple[int, ...]:
    if place[: len(parent)] != parent:
        raise ValueError(f"{name} {list(place)} of an output does not begin with the input's position {list(parent)}")
    return place[len(parent) :]


def apply_delta(before: Sample, delta: Mapping[str, Any]) -> Sample:
    """The sample that `sample_delta` was taken of. Raises pydantic's ValidationError if it is no valid sample."""
    fields = before.model_dump(mode="json") | {name: value for name, value in delta.items() if name not in _MERGED}
    for name in _MERGED:
        if name in delta:
            fields[name] = {key: value for key, value in (fields[name] | delta[name]).items() if value is not None}
    for name in _PLACES:
        if delta.get(name) is not None:
            fields[name] = [*before.position, *delta[name]]
    return Sample.model_validate(fields)


class StageResults:
    """Results of one stage: an index of keys in memory, the records in the file.

    Every record is handed to the system at once, so that a killed process loses none that was put; `fsync` follows
    every `sync_records` records or `sync_seconds`, which bounds what a power cut can take.
    """

    def __init__(self, path: Path, *, sync_records: int = 64, sync_seconds: float = 2.0) -> None:
        """Open or create the file. A torn last line is cut off. Raises UserError if a line before it is damaged."""
        self.path = path
        self._sync_records, self._sync_seconds = sync_records, sync_seconds
        self._places: dict[str, tuple[int, int]] = {}
        self._num_unsynced, self._synced_at = 0, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._end = self._read_index()

    def _read_index(self) -> int:
        """Fill the index; returns the length of the whole lines, to which the file is cut."""
        end = 0
        torn = False
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if torn:
                    raise UserError(f"{self.path}:{number - 1}: the line is damaged; delete it and run again")
                key = _line_key(line)
                if key is None:
                    torn = True
                    continue
                self._places[key] = (end, len(line))
                end += len(line)
        if torn:
            os.ftruncate(self._file, end)
        return end

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def keys(self) -> Iterator[str]:
        """Keys in order of first writing."""
        return iter(self._places)

    def get(self, key: str) -> Record | None:
        """The latest record of a key. Raises UserError if its line was altered since the file was opened."""
        place = self._places.get(key)
        if place is None:
            return None
        line = os.pread(self._file, place[1], place[0])
        try:
            record = _parse(parse_json(line))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}: the record at byte {place[0]} cannot be read ({error}); delete it") from None
        return record

    def put(self, record: Record) -> None:
        """Append a record."""
        line = (canonical_json(_plain(record)) + "\n").encode()
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room and run again") from error
        self._places[record.key] = (self._end, len(line))
        self._end += len(line)
        self._num_unsynced += 1
        if self._num_unsynced >= self._sync_records or time.monotonic() - self._synced_at >= self._sync_seconds:
            self.sync()

    def sync(self) -> None:
        """Have the system put all records on disk."""
        if self._num_unsynced:
            os.fsync(self._file)
        self._num_unsynced, self._synced_at = 0, time.monotonic()

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        os.close(self._file)


def _line_key(line: bytes) -> str | None:
    """The key of a whole line, None for a torn one."""
    if not line.endswith(b"}\n"):
        return None
    try:
        content = parse_json(line)
    except ValueError:
        return None
    key = content.get("key") if isinstance(content, dict) else None
    return key if isinstance(key, str) and content.get("status") in get_args(Status) else None


def _plain(record: Record) -> dict[str, Any]:
    content: dict[str, Any] = {"key": record.key, "status": record.status, "usage": asdict(record.usage)}
    if record.status == "done":
        content["samples"] = list(record.samples)
    elif record.status == "dropped":
        content["reason"] = record.reason
    else:
        content |= {"kind": record.kind, "message": record.message}
    return content


def _parse(content: dict[str, Any]) -> Record:
    samples = tuple(content.get("samples", ()))
    kind = content.get("kind")
    if content["status"] == "failed" and kind not in get_args(FailureKind):
        raise ValueError(f"failure class {kind!r:.80}")
    return Record(
        key=content["key"],
        status=content["status"],
        samples=samples,
        reason=content.get("reason", ""),
        kind=kind,
        message=content.get("message", ""),
        usage=Usage(**content["usage"]),
    )


class RowStore:
    """All stages' results under one work folder, held by one process at a time. Use as a context manager."""

    def __init__(self, root: Path, *, sync_records: int = 64, sync_seconds: float = 2.0) -> None:
        self.root = root
        self._sync_records, self._sync_seconds = sync_records, sync_seconds
        self._stages: dict[str, StageResults] = {}
        self._lock = FileLock(root / LOCK_FILE, timeout=0)

    def __enter__(self) -> RowStore:
        """Take the folder. Raises UserError if another process holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"{self.root}: another process is writing there; wait for it or use another --out"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for results in self._stages.values():
            results.close()
        self._stages.clear()
        self._lock.release()

    def stage(self, name: str) -> StageResults:
        """The results of one stage, opened at first use. Only while the store is held."""
        assert self._lock.is_locked, "enter the store first"
        if name not in self._stages:
            self._stages[name] = StageResults(
                self.root / STAGES_DIR / f"{name}.jsonl",
                sync_records=self._sync_records,
                sync_seconds=self._sync_seconds,
            )
        return self._stages[name]

    def sync(self) -> None:
        """Have the system put everything on disk."""
        for results in self._stages.values():
            results.sync()


def read_results(root: Path) -> dict[str, list[Record]]:
    """Stage -> latest record of each key, for reports; takes no lock and changes nothing.

    A line that is being written while this reads is left out.
    """
    return {path.stem: read_stage(root, path.stem) for path in sorted((root / STAGES_DIR).glob("*.jsonl"))}


def read_stage(root: Path, name: str) -> list[Record]:
    """`read_results` of one stage; none where it has no results."""
    path = root / STAGES_DIR / f"{name}.jsonl"
    latest: dict[str, Record] = {}
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if _line_key(line) is not None:
            try:
                record = _parse(parse_json(line))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: a record cannot be read ({error}); delete its line") from None
            latest[record.key] = record
    return list(latest.values())
