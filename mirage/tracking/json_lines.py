"""JSON mode: standard output holds one JSON object a line and nothing else, for programs that follow a command."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from mirage.tracking.mirror import plain

# As a recipe's key, as a setting of `mirage evaluate`, and as an option of `python -m data_gen`.
_ASKS = ("tracking.console=json", "console=json")
_stream: TextIO | None = None


def asked_for(args: Sequence[str]) -> bool:
    """Whether a command line asks for JSON mode, known before it is understood: a mistake in it is told as JSON too."""
    return any(arg.lstrip("-") in _ASKS for arg in args) or ("--console", "json") in itertools.pairwise(args)


def claim_stdout() -> None:
    """Keep standard output for JSON lines: whatever else is printed, by libraries too, goes to standard error.

    For commands, once a process; a second call does nothing.
    """
    global _stream
    if _stream is not None:
        return
    real = sys.__stdout__
    if real is None or sys.stdout is not real or real.fileno() != 1:
        # Somebody else has it already, and reads what is written there.
        _stream = sys.stdout
        return
    real.flush()
    _stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def is_claimed() -> bool:
    """Whether this process speaks JSON on standard output."""
    return _stream is not None


def emit(event: str, fields: Mapping[str, Any], *, file: TextIO | None = None) -> None:
    """Write one line: `event`, then the fields in their order. Numbers that JSON cannot hold become text ("nan")."""
    target = file or _stream or sys.stdout
    record = {"event": event} | {name: _value(value) for name, value in fields.items()}
    target.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    target.flush()


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    if value is None or isinstance(value, bool | str | int):
        return value
    return str(value) if isinstance(value, os.PathLike) else plain(value)
