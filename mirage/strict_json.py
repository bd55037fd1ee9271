"""JSON from outside, read in one strict way: what Python's reader guesses, lets through or chokes on is refused."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirage.errors import UserError
from mirage.safe_paths import open_regular

# A line holds one record of text; pictures lie in files of their own.
MAX_LINE_BYTES = 4 * 1024**2
# Deeper than any document that is read here, and shallow enough for every recursive reader behind this one.
MAX_DEPTH = 64
# Whole numbers that other readers of JSON hold exactly enough: signed and unsigned 64 bits.
_INT_RANGE = range(-(2**63), 2**64)
_MAX_INT_CHARS = 20
_BOM = b"\xef\xbb\xbf"
# A string, whole or cut off, or a run of anything that is no bracket.
_NO_BRACKETS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^\[\]{}"]++', re.DOTALL)
_PAIR = re.compile(r"\[\]|\{\}")


class JsonError(ValueError):
    """The text is no JSON that is taken; `line` (from 1) is set where the place is known."""

    def __init__(self, message: str, *, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def parse_json(content: bytes | str, *, any_number: bool = False) -> Any:
    """The value of a JSON text in UTF-8; a byte order mark is skipped. Raises `JsonError`.

    Refused besides broken JSON: a key given twice in one object, NaN and Infinity (also as 1e999), whole numbers
    beyond 64 bits, lone surrogates (no UTF-8 can hold them), more than 64 values inside each other. With `any_number`
    NaN, infinities and long numbers are taken, as other programs' settings have them.
    """
    text = _decoded(content) if isinstance(content, bytes) else content.removeprefix("\ufeff")
    if is_too_deep(text):
        raise JsonError(f"more than {MAX_DEPTH} values inside each other, or brackets that do not match")
    try:
        value = (_ANY_NUMBER if any_number else _DECODER).decode(text)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        kind = "the text ends too early" if is_cut else error.msg
        raise JsonError(f"{kind}, column {error.colno}", line=error.lineno) from None
    except JsonError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise JsonError(str(error)) from None
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(value)
    return value


def parse_literal(text: str) -> Any:
    """A list, text or number as Python writes it, as tables of Python programs hold them. Raises `JsonError`.

    No code is run (`ast.literal_eval`).
    """
    if is_too_deep(text):
        raise JsonError(f"more than {MAX_DEPTH} values inside each other, or brackets that do not match")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise JsonError(f"no list: {str(error)[:80]}") from None
    _refuse_surrogates(value)
    return value


def read_json(path: Path, *, remedy: str = "restore it from a copy", any_number: bool = False) -> Any:
    """The value in a JSON file. Raises `UserError` naming file and line; `remedy` says what to do."""
    with open_regular(path) as file:
        content = file.read()
    try:
        return parse_json(content, any_number=any_number)
    except JsonError as error:
        place = path if error.line is None else f"{path}:{error.line}"
        raise UserError(f"{place}: not valid JSON ({error}); {remedy}") from None


def read_json_object(path: Path, *, remedy: str = "restore it from a copy", any_number: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` as `read_json` does, and for any other value."""
    value = read_json(path, remedy=remedy, any_number=any_number)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, found {type(value).__name__}; {remedy}")
    return value


def json_lines(path: Path, *, remedy: str = "restore the line") -> Iterator[tuple[int, Any]]:
    """(number, value) of each line of a JSON lines file, numbered from 1; empty lines are passed over.

    A line that is no JSON, or longer than 4 MiB, comes as the `UserError` it would raise: the caller decides. Lines end
    at a line feed and nowhere else, with or without a carriage return before it. At most one line is in memory.
    """
    for number, line in text_lines(path):
        where = f"{path}:{number}"
        if line is None:
            yield number, UserError(f"{where}: the line is longer than {MAX_LINE_BYTES // 1024**2} MiB; {remedy}")
        elif line.strip():
            try:
                yield number, parse_json(line)
            except JsonError as error:
                yield number, UserError(f"{where}: not valid JSON ({error}); {remedy}")


def read_json_lines(path: Path, *, remedy: str = "restore the line") -> Iterator[tuple[int, Any]]:
    """As `json_lines`, but the first line that cannot be read raises."""
    for number, value in json_lines(path, remedy=remedy):
        if isinstance(value, UserError):
            raise value
        yield number, value


def text_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number, line with its end) of a file, from 1; None for a line longer than 4 MiB, which is never held."""
    with open_regular(path) as file:
        number = 1
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
                yield number, line
            else:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield number, None
            number += 1


def _decoded(content: bytes) -> str:
    try:
        return content.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JsonError(f"no UTF-8 text: {error.reason} at byte {error.start}", line=line) from None


def is_too_deep(text: str) -> bool:
    """Whether a text's brackets, outside strings, stand more than `MAX_DEPTH` deep. No recursion; linear time."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    brackets = _NO_BRACKETS.sub("", text)
    for _ in range(MAX_DEPTH):
        without_leaves = _PAIR.sub("", brackets)
        if len(without_leaves) == len(brackets):
            return len(brackets) > MAX_DEPTH
        brackets = without_leaves
    return bool(brackets)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JsonError(f"the key {twice[:80]!r} is given twice in one object")
    return fields


def _whole_number(digits: str) -> int:
    number = int(digits) if len(digits) <= _MAX_INT_CHARS else None
    if number is None or number not in _INT_RANGE:
        raise JsonError(f"the number {digits[:24]}... does not fit into 64 bits; write it as text")
    return number


def _finite_number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise JsonError(f"the number {digits[:24]} is too large")
    return number


def _refuse_constant(name: str) -> Any:
    raise JsonError(f"{name} is no JSON value; write null or a number")


def _refuse_surrogates(value: Any) -> None:
    try:
        # A Python literal may hold what JSON cannot, which its reader refuses.
        json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True).encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x}"
        raise JsonError(f"half of a surrogate pair ({found}), which is no character") from None


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates,
    parse_int=_whole_number,
    parse_float=_finite_number,
    parse_constant=_refuse_constant,
)
_ANY_NUMBER = json.JSONDecoder(object_pairs_hook=_without_duplicates)
