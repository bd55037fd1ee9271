"""Damaged documents out of good ones: fast mutators driven by one random source, and the same as hypothesis strategies.

A campaign of 100,000 cases a reader draws from `random.Random(seed)`, which costs microseconds a case. The tests give
the same functions hypothesis's own random source, so that a failing case is shrunk, and graft JSON values that
hypothesis makes into the document, which reaches combinations that no list of hostile values holds.
"""

from __future__ import annotations

import copy
import csv
import html
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Literal

from hypothesis import strategies as st

Kind = Literal["json", "jsonl", "text", "csv", "tsv", "zip", "binary"]
Mutator = Callable[[Random, bytes], bytes]

LONG_TEXT_CHARS = 3_000
PATHS = (
    "..", "../x.png", "images/../../x.png", "/etc/passwd", "/dev/zero", "/dev/stdin", "images", "images\\a.png",
    "~/a.png", "outside.png", "loop.png", "pipe.png", "a\x00b.png", "file:///etc/passwd",
    "http://localhost/a.png", "x" * 300 + ".png",
)  # fmt: skip
TEXTS = (
    "", " ", "\x00", "\ufeff", "\u2028", "\x85", "\r\n", "\ud800", "\udc80x", "\U0001f600", "e\u0301", "\u202e",
    "<image>", "<image>" * 40, "<think>", "null", "NaN", "1e999", "-1", "010", "=1+1", "'", '"', "a,b", "[",
    "{}", "[1, 2", "{{ 1 }}", "<script>alert(1)</script>", "%s%n", "sha256",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"))
TOKENS = (
    b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\r\n", b"\n\n", b"\xe2\x80\xa8", b"\xc2\x85",
    b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"0" * 400,
    b"{", b"}", b"[", b"]", b'"', b"\\", b"\\ud800", b"\\u0000", b",", b":", b"\t", b"'", b"- ", b"&a ", b"*a",
    b"<<: ", b"!!python/object:os.system ", b"---\n", b"%YAML 9\n", b"? ", b"| ", b"extends: ", b"#", b"null",
    b"true", b"../", b"//", b'"":', b"2001-99-99", b"\x1a", b"\x7f",
)  # fmt: skip


class _Twice(dict):
    """An object that is written with its keys once and its pairs twice."""

    def items(self) -> Any:
        return [*super().items(), *super().items()]


def hostile(random: Random) -> Any:
    """A value that a reader does not expect."""
    choice = random.randrange(12)
    if choice < 3:
        return random.choice(TEXTS)
    if choice < 5:
        return random.choice(NUMBERS)
    if choice < 7:
        return random.choice(PATHS)
    if choice == 7:
        return random.choice((None, True, False, [], {}, [[]], [None], {"": None}, {"type": "image", "index": 0}))
    if choice == 8:
        return random.choice("aé\u4e00\U0001f600 ") * random.randrange(LONG_TEXT_CHARS)
    if choice == 9:
        return [random.choice(NUMBERS)] * random.randrange(60)
    if choice == 10:
        return {random.choice((*TEXTS, *PATHS)): random.choice((*TEXTS, *NUMBERS)) for _ in range(random.randrange(5))}
    value: Any = random.choice(TEXTS)
    for _ in range(random.choice((3, 30, 70, 300))):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


def change_value(random: Random, value: Any) -> Any:
    """The JSON value with one place of it replaced, removed, repeated, moved or given twice."""
    places = list(_places(value))
    if not places:
        return hostile(random)
    box, key = random.choice(places)
    choice = random.randrange(10)
    if choice < 5:
        box[key] = hostile(random)
    elif choice == 5:
        del box[key]
    elif choice == 6:
        if isinstance(box, dict):
            box[random.choice((*TEXTS[:8], "id", "path", "type", "unknown"))] = hostile(random)
        else:
            box.insert(key, box[key])
    elif choice == 7:
        other_box, other_key = random.choice(places)
        box[key] = copy.deepcopy(other_box[other_key])
    elif choice == 8 and isinstance(box[key], dict):
        box[key] = _Twice(box[key])
    elif isinstance(box[key], str):
        text = box[key]
        at = random.randrange(len(text) + 1)
        box[key] = text[:at] + str(random.choice((*TEXTS, *PATHS))) + text[at:]
    else:
        box[key] = [box[key]]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield value, key
            yield from _places(item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield value, index
            yield from _places(item)


def _dumped(random: Random, value: Any) -> bytes:
    # Lone surrogates go out as escapes or, where raw, as bytes that are no UTF-8.
    text = json.dumps(value, ensure_ascii=random.random() < 0.7)
    return text.encode("utf-8", "surrogatepass")


def change_json(random: Random, content: bytes) -> bytes:
    """A JSON document with one to three places changed."""
    value = json.loads(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = change_value(random, value)
    return _dumped(random, value)


def change_jsonl(random: Random, content: bytes) -> bytes:
    """JSON lines with a line changed, repeated, dropped, torn, emptied, joined to the next or moved."""
    lines = content.rstrip(b"\n").split(b"\n")
    at = random.randrange(len(lines))
    choice = random.randrange(10)
    if choice < 6:
        lines[at] = change_json(random, lines[at])
    elif choice == 6:
        lines.insert(random.randrange(len(lines) + 1), lines[at])
    elif choice == 7:
        lines[at] = lines[at][: random.randrange(len(lines[at]) + 1)]
    elif choice == 8:
        lines.insert(at, random.choice((b"", b" ", b"null", b"[]", b"1", b'"a"', b"{}", b"//")))
    else:
        other = random.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    end = random.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"\r"))
    return end.join(lines) + random.choice((end, end, b""))


def _change_table(random: Random, content: bytes, delimiter: str) -> bytes:
    csv.field_size_limit(1 << 30)
    rows = list(csv.reader(io.StringIO(content.decode(), newline=""), delimiter=delimiter))
    for _ in range(random.choice((1, 1, 2))):
        row = random.choice(rows) if random.random() < 0.8 else rows[0]
        choice = random.randrange(8)
        if choice < 5 and row:
            row[random.randrange(len(row))] = str(hostile(random))
        elif choice == 5:
            row.append(str(hostile(random)))
        elif choice == 6 and row:
            row.pop(random.randrange(len(row)))
        else:
            rows.insert(random.randrange(len(rows) + 1), list(row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=random.choice(("\n", "\r\n")))
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def change_csv(random: Random, content: bytes) -> bytes:
    """A comma-separated table with cells, columns or rows changed."""
    return _change_table(random, content, ",")


def change_tsv(random: Random, content: bytes) -> bytes:
    """A tab-separated table with cells, columns or rows changed."""
    return _change_table(random, content, "\t")


def change_lines(random: Random, content: bytes) -> bytes:
    """Lines of text dropped, repeated, moved, indented, or with their value replaced."""
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    choice = random.randrange(6)
    if choice == 0:
        del lines[at]
    elif choice == 1:
        lines.insert(random.randrange(len(lines) + 1), lines[at])
    elif choice == 2:
        lines[at] = b" " * random.randrange(9) + lines[at]
    elif choice < 5:
        head, mark, _ = lines[at].partition(random.choice((b": ", b"=", b" ")))
        lines[at] = head + mark + _dumped(random, hostile(random))
    else:
        other = random.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    return b"\n".join(lines)


def change_archive(random: Random, content: bytes) -> bytes:
    """A zip file of XML with a part's bytes damaged, a text or a tag's value of it replaced, or a part left out."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    name = random.choice(list(parts))
    choice = random.randrange(8)
    if choice == 0:
        del parts[name]
    elif choice == 1:
        parts[name] = change_bytes(random, parts[name])
    else:
        values = list(re.finditer(rb">([^<>]*)<" if choice < 5 else rb'"([^"<>]*)"', parts[name]))
        place = random.choice(values).span(1) if values else (0, 0)
        escape = str if random.random() < 0.2 else html.escape
        new = escape(str(hostile(random))).encode("utf-8", "surrogatepass")
        parts[name] = parts[name][: place[0]] + new + parts[name][place[1] :]
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for part, data in parts.items():
            archive.writestr(zipfile.ZipInfo(part), data)
    return whole.getvalue()


def change_bytes(random: Random, content: bytes) -> bytes:
    """Bytes flipped, cut out, repeated, overwritten, inserted or cut off; another encoding; a deep nest."""
    choice = random.randrange(12)
    size = len(content)
    at = random.randrange(size + 1)
    span = random.choice((1, 1, 2, 4, 8, 64, 1024))
    if choice < 3 and size:
        changed = bytearray(content)
        for _ in range(random.choice((1, 1, 2, 8))):
            changed[random.randrange(size)] ^= 1 << random.randrange(8)
        return bytes(changed)
    if choice == 3:
        return content[:at]
    if choice == 4:
        return content[:at] + content[at + span :]
    if choice == 5:
        return content[: at + span] + content[at:]
    if choice < 8:
        return content[:at] + random.choice(TOKENS) + content[at:]
    if choice == 8 and size:
        filler = random.choice((b"\x00", b"\xff", bytes([random.randrange(256)])))
        return content[:at] + filler * min(span, size - at) + content[at + span :]
    if choice == 9:
        whole = content.decode("latin-1")
        return random.choice((b"\xef\xbb\xbf" + content, whole.encode("utf-16"), whole.encode("utf-32"), content[::-1]))
    if choice == 10:
        nest = random.choice((b"[", b"{", b'{"a":', b"[[", b"(", b"- ", b"a: {")) * random.choice((50, 500, 5_000))
        return content[:at] + nest + content[at:]
    run = random.choice((b"a", b" ", b"\n", b"\\", b'"', b"0", b",", b"\xc3\xa9")) * random.randrange(20_000)
    return content[:at] + run + content[at:]


_STRUCTURED: dict[Kind, tuple[Mutator, ...]] = {
    "json": (change_json, change_json, change_bytes),
    "jsonl": (change_jsonl, change_jsonl, change_bytes),
    "text": (change_lines, change_bytes),
    "csv": (change_csv, change_csv, change_bytes),
    "tsv": (change_tsv, change_tsv, change_bytes),
    "zip": (change_archive, change_archive, change_bytes),
    "binary": (change_bytes,),
}


def mutate(random: Random, content: bytes, kind: Kind) -> bytes:
    """`content`, a good document of this kind, damaged in one way or several; all but the first work on its bytes."""
    content = random.choice(_STRUCTURED[kind])(random, content)
    while random.random() < 0.3:
        content = change_bytes(random, content)
    return content


# Hypothesis


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=12),
    st.sampled_from((*TEXTS, *PATHS)),
)
JSON_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


@st.composite
def grafted(draw: st.DrawFn, content: bytes, kind: Kind) -> bytes:
    """A JSON document, or one of its lines, with a value that hypothesis makes in some place of it."""
    lines = content.rstrip(b"\n").split(b"\n") if kind == "jsonl" else [content]
    at = draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[at])
    box, key = draw(st.sampled_from(list(_places(value)) or [([value], 0)]))
    box[key] = draw(JSON_VALUES)
    lines[at] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


def documents(content: bytes, kind: Kind) -> st.SearchStrategy[bytes]:
    """Damaged forms of a good document."""
    mutated = st.randoms(use_true_random=False).map(lambda random: mutate(random, content, kind))
    return mutated | grafted(content, kind) if kind in ("json", "jsonl") else mutated
