"""The mirror on disk: every number of a run as one JSON line, exact across kills and resumes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mirage.errors import UserError
from mirage.files import write_atomic
from mirage.strict_json import parse_json

MIRROR_NAME = "metrics.jsonl"
REWOUND_NAME = "metrics.rewound.jsonl"

# A killed process loses nothing that was flushed; only a power cut can, and then at most this much.
_FSYNC_SECONDS = 5.0
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsFile:
    """`metrics.jsonl` of a run folder: lines `{"axis": ..., "step": ..., name: value, ...}`, each written once.

    A step that is logged again (after a kill and a resume) replaces its old line. `num_records` counts every line ever
    written, replaced ones too, so it only grows over the life of the run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        """Open for appending, after cutting off a torn last line. Raises UserError where a whole line is no JSON."""
        self.path = run_dir / MIRROR_NAME
        self._rewound = run_dir / REWOUND_NAME
        for path in (self.path, self._rewound):
            _cut_torn_tail(path)
        records = read_metrics(self.path)
        self.num_records = len(records) + len(read_metrics(self._rewound))
        self._known = {_identity(record) for record in records}
        self._file = self.path.open("ab")
        self._synced_at = time.monotonic()

    def append(self, axis: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line and flush it. Floats that JSON cannot hold are written as "nan", "inf" and "-inf"."""
        record = {"axis": axis, "step": int(step)} | {name: plain(value) for name, value in values.items()}
        identity = _identity(record)
        if identity in self._known:
            self._set_aside(lambda old: _identity(old) == identity)
        self._known.add(identity)
        self._file.write(_line(record))
        self._file.flush()
        self.num_records += 1
        if time.monotonic() - self._synced_at > _FSYNC_SECONDS:
            self._sync()

    def rewind(self, step: int) -> None:
        """Set aside, in `metrics.rewound.jsonl`, the lines after `step`: a resumed run writes them again."""
        self._set_aside(lambda record: record["step"] > step)

    def close(self) -> None:
        """Flush to the disk and close."""
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def _set_aside(self, is_old: Callable[[dict[str, Any]], bool]) -> None:
        records = [json.loads(line) for line in self.path.read_bytes().splitlines()]
        old = [record for record in records if is_old(record)]
        if not old:
            return
        # First the copy, then the cut: a kill between the two leaves a line in both files, never in none.
        with self._rewound.open("ab") as rewound:
            rewound.writelines(_line(record) for record in old)
            rewound.flush()
            os.fsync(rewound.fileno())
        kept = [record for record in records if not is_old(record)]
        self._file.close()
        write_atomic(self.path, b"".join(_line(record) for record in kept).decode())
        self._file = self.path.open("ab")
        self._known = {_identity(record) for record in kept}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a mirror file, non-finite values as floats again; empty where there is no file.

    A torn last line (the writer was killed) is left out. Raises UserError naming the line where any other is no JSON.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append({name: _restore(name, value) for name, value in record.items()})
        elif line.endswith(b"\n"):
            raise UserError(
                f"{path}, line {number}: no metrics record; remove the line, or restore the file from a copy"
            )
    return records


def plain(value: Any) -> int | float | str | None:
    """A JSON value from a number (also of numpy or a 0-d tensor), "nan", "inf", "-inf" as text; text stays text."""
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def is_finite(value: Any) -> bool:
    """Whether a metric's value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _cut_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    tail = content[content.rfind(b"\n") + 1 :]
    if not tail:
        return
    if _parse(tail) is not None:
        write_atomic(path, content.decode() + "\n")
    else:
        write_atomic(path, content[: len(content) - len(tail)].decode())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    valid = isinstance(record, dict) and isinstance(record.get("axis"), str) and isinstance(record.get("step"), int)
    return record if valid else None


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _identity(record: Mapping[str, Any]) -> tuple[str, int, frozenset[str]]:
    return record["axis"], record["step"], frozenset(record)


def _restore(name: str, value: Any) -> Any:
    return value if name == "axis" or not isinstance(value, str) else _NOT_FINITE.get(value, value)
