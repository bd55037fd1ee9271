"""MIRage's own rows: `rows.jsonl` of a dataset folder, and the Parquet files that the export writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mirage.data.readers.entry import SourcedRow, explain
from mirage.data.readers.images import image_list, image_refs
from mirage.data.readers.records import Record
from mirage.data.row import Row
from mirage.errors import UserError
from mirage.strict_json import JsonError, json_lines, parse_json, read_json_lines

ROWS_FILE = "rows.jsonl"
# Column of the Parquet files with the whole row as JSON; the other columns are for other programs.
ROW_COLUMN = "row"
_REMEDY = "restore the line or write the dataset again"


def read_rows(folder: Path, *, splits: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a dataset folder, in file order; only those of `splits` when given.

    Raises `UserError` naming file and line for the first row that cannot be read.
    """
    path = folder / ROWS_FILE
    if not path.exists():
        raise UserError(f"{folder} is no dataset folder (no {ROWS_FILE}); write one with: make datagen OUT={folder}")
    for number, record in read_json_lines(path, remedy=_REMEDY):
        row = _validate_row(record, f"{path}:{number}")
        if splits is None or row.split in splits:
            yield row


def read_folder(folder: Path, split: str) -> Iterator[SourcedRow | UserError]:
    """Rows of one split of a dataset folder; a row that cannot be read comes as the `UserError` it would raise."""
    path = folder / ROWS_FILE
    if not path.exists():
        raise UserError(
            f"no dataset at {folder} (no {ROWS_FILE}). Write one with: make datagen OUT={folder}, "
            "or set data.dir to a folder that has one"
        )
    seen: set[bytes] = set()
    for number, record in json_lines(path, remedy=_REMEDY):
        # Rows of other splits are not validated: a mixture reads the file once for each of its parts.
        if isinstance(record, dict) and record.get("split") not in (split, None):
            continue
        try:
            entry = _sourced(record, folder, number)
            digest = hashlib.blake2b(entry.row.id.encode(), digest_size=16).digest()
            if digest in seen:
                raise UserError(f"{entry.location}: row id {entry.row.id!r:.80} occurs twice in its split; {_REMEDY}")
        except UserError as error:
            yield error
            continue
        seen.add(digest)
        yield entry


def parse_row(line: bytes, folder: Path, number: int) -> SourcedRow:
    """The row in a line that has been read before. Raises `UserError` for one that holds none."""
    try:
        return _sourced(parse_json(line), folder, number)
    except JsonError as error:
        raise UserError(f"{folder / ROWS_FILE}:{number}: not valid JSON ({error}); {_REMEDY}") from None


def _sourced(record: Any, folder: Path, number: int) -> SourcedRow:
    if isinstance(record, UserError):
        raise record
    location = f"{folder / ROWS_FILE}:{number}"
    return SourcedRow(_validate_row(record, location), folder, location, line=number)


def read_parquet_row(record: Record) -> Iterator[SourcedRow]:
    """A row from the export's Parquet files, the same as in `rows.jsonl`; its pictures are unpacked by content hash."""
    try:
        content = parse_json(record.text(ROW_COLUMN))
    except JsonError as error:
        raise UserError(f"{record.location}: column {ROW_COLUMN}: not valid JSON ({error}); export it again") from None
    row = _validate_row(content, record.location)
    stored = image_list(record, "images")
    if len(stored) != len(row.images):
        raise UserError(f"{record.location}: holds {len(stored)} pictures, its row {len(row.images)}; export it again")
    refs, root = image_refs(record, stored)
    images = list(row.images)
    for found, index in zip(refs, row.mark_order):  # the file has pictures in the order of their marks
        if found.sha256 != images[index].sha256:
            raise UserError(f"{record.location}: row {row.id}: a picture is not the row's; export the dataset again")
        images[index] = images[index].model_copy(update={"path": found.path})
    yield SourcedRow(row.model_copy(update={"images": tuple(images)}), root, record.location)


def _validate_row(record: Any, location: str) -> Row:
    try:
        return Row.model_validate(record)
    except ValidationError as error:
        raise UserError(f"{location}: {explain(error)}") from error
