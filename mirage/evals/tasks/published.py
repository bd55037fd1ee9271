"""Files of published benchmarks: JSON, CSV and Parquet rows that know where they stand, and the pictures they name."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mirage import strict_json
from mirage.data.readers.records import field_names
from mirage.data.row import Choice, Decision, ImagePart, Message, TextPart
from mirage.errors import UserError
from mirage.evals.task import Sample
from mirage.evals.tasks import parquet
from mirage.evals.tasks.embedded import keep_picture
from mirage.safe_paths import is_file, open_regular, stays_inside


@dataclass(frozen=True)
class Record:
    """One row of a published file, and the words that lead a reader to it."""

    value: Mapping[str, Any]
    where: str

    def text(self, *names: str) -> str:
        """The text under the first of these keys that the row has; whole numbers become text.

        Raises `UserError` naming the row, the key and what was found where there is none.
        """
        found = self.maybe(*names)
        if found is not None:
            return found
        name = next((name for name in names if name in self.value), None)
        if name is None:
            keys = " or ".join(repr(name) for name in names)
            raise UserError(f"{self.where}: has no key {keys}; its keys are {field_names(self.value)}")
        raise UserError(f"{self.where}: {name!r} must be text, found {self.value[name]!r:.80}")

    def maybe(self, *names: str) -> str | None:
        """As `text`, but None where the row has no such key or an empty value."""
        for name in names:
            value = self.value.get(name)
            if isinstance(value, str) and value.strip():
                return value
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
        return None

    def texts(self, *names: str) -> list[str]:
        """The texts under the first of these keys that the row has: a list, or one text as a list of one.

        Raises `UserError` for a missing key, an empty list or an entry that is no text.
        """
        name = next((name for name in names if self.value.get(name) not in (None, "", [])), None)
        if name is None:
            return [self.text(*names)]
        value = self.value[name]
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            if not isinstance(entry, str) or not entry.strip():
                raise UserError(f"{self.where}: {name!r} must be a list of texts, found {entry!r:.80}")
        return list(entries)


def find_file(folder: Path, names: Sequence[str], *, task: str, source: str) -> Path:
    """The first of these files in the folder. Raises `UserError` that says what to put where if there is none."""
    found = present_file(folder, names)
    if found is None:
        first, *others = names
        nor = f" (nor {', '.join(others)})" if others else ""
        raise UserError(f"task {task!r}: there is no {first} in {folder}{nor}. What belongs there: {source}")
    return found


def present_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these files in the folder, or None."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_text(path: Path) -> str:
    """A file's text; a byte order mark is skipped. Raises `UserError` for what is no UTF-8."""
    with open_regular(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); download the file again") from error


def read_json(path: Path) -> Any:
    """A JSON file's value; a byte order mark is skipped. Raises `UserError` naming file, line and column."""
    return strict_json.read_json(path, remedy="download the file again")


def json_records(value: Any, *, where: str) -> Iterator[Record]:
    """The objects of a list, or of a mapping from ids to objects (the id then stands under the key `_key`)."""
    if isinstance(value, dict):
        for key, entry in value.items():
            entry_where = f"{where}: entry {key!r:.80}"
            yield Record({"_key": key, **_object(entry, entry_where)}, entry_where)
        return
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list or an object of records, found {type(value).__name__}")
    for index, entry in enumerate(value):
        entry_where = f"{where}: record {index}"
        yield Record(_object(entry, entry_where), entry_where)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, found {value!r:.80}")
    return value


def csv_records(path: Path) -> Iterator[Record]:
    """The rows of a CSV file with a header; byte order mark and CRLF are taken. Raises `UserError` for broken rows."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            where = f"{path}: row {number} (line {reader.line_num})"
            if None in row or None in row.values():
                count = len([value for value in row.values() if isinstance(value, str)]) + len(row.get(None) or [])
                raise UserError(f"{where}: has {count} fields and the header names {len(reader.fieldnames or [])}")
            yield Record({key.strip(): value for key, value in row.items()}, where)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}; download the file again") from error


def parquet_records(path: Path, *, columns: tuple[str, ...]) -> Iterator[Record]:
    """The rows of a Parquet file that has these columns. Raises `UserError` for one that has not, or that is broken."""
    for number, row in enumerate(parquet.read_records(path, columns=columns)):
        yield Record(row, f"{path}: row {number}")


def picture_file(record: Record, value: str, *, key: str, roots: Sequence[Path], hint: str) -> Path:
    """The picture of this name below one of `roots`, with or without the last folder's name before it.

    Raises `UserError` for a path that leaves the folder and for a file that is not there; `hint` says what to do.
    """
    relative = PurePosixPath(value.strip())
    if not stays_inside(value.strip()):
        raise UserError(
            f"{record.where}: {key} must be a relative path inside the benchmark's folder, found {value!r:.200}"
        )
    for root in roots:
        names = [relative]
        if len(relative.parts) > 1 and relative.parts[0] == root.name:
            names.append(PurePosixPath(*relative.parts[1:]))
        for name in names:
            # Hub snapshots are symbolic links into a store beside them, so links are followed.
            if is_file(root / name):
                return root / name
    raise UserError(
        f"{record.where}: {key}: no file {value:.200} in {' or '.join(str(root) for root in roots)}; {hint}"
    )


def picture_bytes(record: Record, *names: str) -> Path | None:
    """The picture stored under one of these keys as Hugging Face `datasets` does, as a file; None where there is none.

    Raises `UserError` for bytes that are no picture.
    """
    for name in names:
        value = record.value.get(name)
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, bytes | bytearray) and content:
            return keep_picture(bytes(content), where=f"{record.where}: {name!r}").path
    return None


def make_sample(
    identity: str,
    text: str,
    images: Sequence[Path],
    *,
    category: str,
    sub_category: str = "all",
    cluster: str | None = None,
    decision: Decision | None = None,
    choice: Choice | None = None,
    meta: Mapping[str, str] | None = None,
) -> Sample:
    """One user turn: the pictures in their order, then the text unchanged. A cluster is the id unless given."""
    pictures = tuple(ImagePart(index=index) for index in range(len(images)))
    parts: tuple[ImagePart | TextPart, ...] = (*pictures, TextPart(text=text)) if text else pictures
    return Sample(
        id=identity,
        messages=(Message(role="user", content=parts),),
        image_paths=tuple(images),
        category=" ".join(category.split()),
        sub_category=" ".join(sub_category.split()),
        cluster=identity if cluster is None else cluster,
        concepts=(None,) * len(images),
        image_sha256=(None,) * len(images),
        decision=decision,
        choice=choice,
        meta=dict(meta or {}),
    )
