"""What judges have said, on disk: append-only JSON lines by content key, so that no answer is judged twice."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mirage.strict_json import parse_json

Kind = Literal["reply", "schema", "refusal", "content_filter", "transient"]
# Failures that another call may well not meet; they are never written.
TRANSIENT = "transient"
SYNC_SECONDS = 1.0
_START = b'{"key": "'
_KIND = b'", "kind": "'
_KEY_CHARS = 64


@dataclass(frozen=True)
class Said:
    """What came of asking: the judge's own words (kind 'reply'), or the failure's class and why."""

    kind: Kind
    text: str


class VerdictCache:
    """One dictionary over several files, all of which receive what is put in; without files it is memory alone.

    A line is handed to the system as it is put, so kill -9 loses none; the disk is waited for once a second and at the
    end, so a power cut may lose the last second. Half a line, and a line that somebody damaged, count as never written.
    Of two lines with one key a reply counts before a failure, then the later file's, then the later line.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self.num_hits = 0
        self._lines: dict[str, bytes] = {}
        self._descriptors: list[int] = []
        self._lock = threading.Lock()
        self._synced_at = time.monotonic()
        for file in files:
            self._open(file)

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, key: str) -> Said | None:
        """What was said under this key, or None."""
        line = self._lines.get(key)
        if line is None:
            return None
        try:
            record = parse_json(line)
            said = Said(record["kind"], record["text"])
        except (ValueError, KeyError, TypeError):
            return None
        if record["key"] != key or not isinstance(said.text, str):
            return None
        self.num_hits += 1
        return said

    def put(self, key: str, said: Said, *, rubric: str, sample: str) -> None:
        """Keep what was said; transient failures are not kept. `rubric` and `sample` are for human readers."""
        if said.kind == TRANSIENT:
            return
        record = {"key": key, "kind": said.kind, "rubric": rubric, "sample": sample, "text": said.text}
        line = json.dumps(record).encode()
        with self._lock:
            self._lines[key] = line
            for descriptor in self._descriptors:
                # One call a line: processes that share a file do not cut into each other's lines.
                os.write(descriptor, line + b"\n")
            if time.monotonic() - self._synced_at > SYNC_SECONDS:
                self._synced_at = time.monotonic()
                threading.Thread(target=self._sync, daemon=True).start()

    def close(self) -> None:
        """Wait until all is on disk."""
        self._sync()
        with self._lock:
            for descriptor in self._descriptors:
                os.close(descriptor)
            self._descriptors = []

    def _sync(self) -> None:
        with self._lock:
            copies = [os.dup(descriptor) for descriptor in self._descriptors]
        for descriptor in copies:
            os.fsync(descriptor)
            os.close(descriptor)

    def _open(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        whole = content.split(b"\n")[:-1]
        for line in whole:
            self._add(line)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if content and not content.endswith(b"\n"):
            # What follows must not be read as the end of a line that a kill cut off.
            os.write(descriptor, b"\n")
        self._descriptors.append(descriptor)

    def _add(self, line: bytes) -> None:
        """Take a line up by its key, which stands first: verdicts are parsed when they are asked for."""
        end = len(_START) + _KEY_CHARS
        if not line.startswith(_START) or line[end : end + len(_KIND)] != _KIND or not line.endswith(b'"}'):
            return
        key = line[len(_START) : end].decode("ascii", "replace")
        old = self._lines.get(key)
        if old is None or _is_reply(line) or not _is_reply(old):
            self._lines[key] = line


def _is_reply(line: bytes) -> bool:
    return line.startswith(b'reply"', len(_START) + _KEY_CHARS + len(_KIND))
