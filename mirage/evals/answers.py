"""Answers on disk: one JSON line each, appended batch by batch, so that a killed evaluation goes on where it stood."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mirage.errors import UserError
from mirage.strict_json import parse_json


@dataclass(frozen=True)
class Answer:
    """What the model wrote. `key` names everything the text depends on; `finish` is 'length' when it was cut off.

    `failure` says why there is no answer (a server's filter, say); the text is then empty and is not scored.
    """

    key: str
    text: str
    num_tokens: int
    finish: Literal["stop", "length"]
    failure: str | None = None


class AnswerStore:
    """All ranks' `answers-<rank>.jsonl` in a folder: reads every one, appends to its own."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self.folder = folder
        self.path = folder / f"answers-{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)

    def read(self) -> dict[str, Answer]:
        """Every answer written so far, by key. A torn last line (a process was killed) is as if never written."""
        answers: dict[str, Answer] = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            for number, line in enumerate(_whole_lines(path.read_bytes()), start=1):
                answer = _parse(line, path=path, number=number)
                answers[answer.key] = answer
        return answers

    def append(self, answers: Iterable[Answer]) -> None:
        """Write answers at the end and wait until they are on disk."""
        lines = "".join(json.dumps(_record(answer), ensure_ascii=False, sort_keys=True) + "\n" for answer in answers)
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())


def _record(answer: Answer) -> dict[str, Any]:
    return {name: value for name, value in asdict(answer).items() if value is not None}


def _whole_lines(content: bytes) -> list[bytes]:
    return content.split(b"\n")[:-1]


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    if not content.endswith(b"\n") and content:
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _parse(line: bytes, *, path: Path, number: int) -> Answer:
    try:
        answer = Answer(**parse_json(line))
        if not (isinstance(answer.key, str) and isinstance(answer.text, str) and isinstance(answer.num_tokens, int)):
            raise TypeError("a field has the wrong type")
        return answer
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: line {number} is damaged; delete the file to generate its answers again") from error
