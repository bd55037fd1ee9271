"""JSON from outside: what is refused, in which words, and in how much memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from mirage.errors import UserError
from mirage.safe_paths import is_number, leads_outside, open_regular, printable, stays_inside
from mirage.strict_json import (
    MAX_LINE_BYTES,
    JsonError,
    json_lines,
    parse_json,
    parse_literal,
    read_json,
    read_json_object,
)

REFUSED = [
    (b'{"a": 1, "a": 2}', "the key 'a' is given twice"),
    (b"[NaN]", "NaN is no JSON value"),
    (b"[-Infinity]", "-Infinity is no JSON value"),
    (b"[1e999]", "the number 1e999 is too large"),
    (b"18446744073709551616", "does not fit into 64 bits"),
    (b"1" * 100_000, "does not fit into 64 bits"),
    (rb'"\ud800"', r"half of a surrogate pair \(\\ud800\)"),
    (b'"\xed\xa0\x80"', "no UTF-8 text"),
    (b'"\xff"', "no UTF-8 text: invalid start byte at byte 1"),
    ('"é"'.encode("utf-16"), "no UTF-8 text"),
    (b"[" * 65 + b"]" * 65, "more than 64 values inside each other"),
    (b'{"a":' * 100_000, "more than 64 values inside each other"),
    (b'{"a": ', "the text ends too early"),
    (b'"open', "the text ends too early"),
    (b"", "the text ends too early"),
    (b"[1,]", "Expecting value, column 4"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_refused(content: bytes, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse_json(content)


def test_taken() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n') == {"a": "é"}
    assert parse_json(rb'"\ud83d\ude00"') == "\U0001f600"
    assert parse_json(b"[18446744073709551615, -9223372036854775808]") == [2**64 - 1, -(2**63)]
    assert parse_json(b"[" * 64 + b"]" * 64)
    # Brackets in texts nest nothing, whatever is escaped around them.
    assert parse_json(b'["' + rb"\"[\\" * 200 + b'"]')
    assert parse_json(b"[Infinity, 1e999]", any_number=True) == [float("inf")] * 2


def test_many_backslashes_take_no_time() -> None:
    with pytest.raises(JsonError):
        parse_json(b"[" * 70 + b'"' + rb"\"" * 300_000 + b"\\")


def test_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'{\n"a": 1,\n}')
    with pytest.raises(UserError, match=r"a\.json:3: not valid JSON \(.*\); fetch it again"):
        read_json(file, remedy="fetch it again")
    file.write_bytes(b"[]")
    with pytest.raises(UserError, match=r"a\.json: must hold a JSON object, found list"):
        read_json_object(file)
    with pytest.raises(UserError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")


def test_lines_end_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"a": "x\u2028y\x85z"}\r\n\n  \n[1]\r\n{'.encode())
    found = list(json_lines(file, remedy="mend it"))
    assert found[:2] == [(1, {"a": "x\u2028y\x85z"}), (4, [1])]
    assert found[2][0] == 5 and isinstance(found[2][1], UserError)


def test_a_line_of_100_megabytes_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("wb") as out:
        out.write(b'{"a": 1}\n{"b": "')
        for _ in range(100):
            out.write(b"x" * 10**6)
        out.write(b'"}\n{"c": 2}\n')
    tracemalloc.start()
    try:
        found = list(json_lines(file, remedy="split it"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [number for number, _ in found] == [1, 2, 3] and found[2][1] == {"c": 2}
    assert str(found[1][1]).endswith("a.jsonl:2: the line is longer than 4 MiB; split it")
    assert peak < 4 * MAX_LINE_BYTES


def test_a_pipe_a_device_and_a_folder_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=f"is {kind}; a regular file is needed"):
            open_regular(path)
    with pytest.raises(UserError, match="cannot be opened"):
        open_regular(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="cannot be opened"):
        open_regular(tmp_path / "a\x00b")


@pytest.mark.parametrize("name", ["", ".", "..", "a/../b", "/a", "a\\b", "a\x00", "a\nb", "\ud800.png"])
def test_names_that_leave_the_folder_or_name_no_file(name: str) -> None:
    assert not stays_inside(name)


@pytest.mark.parametrize("name", ["a.png", "a/b c.png", "é\u202f.png", "..a", "a..b/c", "~"])
def test_names_that_stay(name: str) -> None:
    assert stays_inside(name)


def test_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "in").symlink_to(root / "file")
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    assert [leads_outside(root / name, root) for name in ("file", "in", "out", "loop")] == [False, False, True, False]
    (tmp_path / "link").symlink_to(root)
    assert not leads_outside(root / "file", tmp_path / "link")


def test_printable() -> None:
    assert printable("a\nb\x1b\ud800é") == "a\\nb\\x1b\\ud800é"


def test_numbers_that_int_takes() -> None:
    texts = ("0", "007", "9" * 18, "9" * 19, "1" * 5000, "²", "٣", "-1", "")
    assert [is_number(text) for text in texts] == [True, True, True, *[False] * 6]


def test_a_literal_holds_no_half_character() -> None:
    assert parse_literal("[1, {'a': (2, b'x')}, {3}]") == [1, {"a": (2, b"x")}, {3}]
    with pytest.raises(JsonError, match="half of a surrogate pair"):
        parse_literal(r"['a', '\ud800']")
