"""Sources: the rows of a recipe's mixture, read in any of the known layouts, seen through views, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mirage.config.schema import DataConfig, SourceConfig
from mirage.data.mixing import draw, mixture_counts
from mirage.data.picture_files import open_picture, picture_size
from mirage.data.readers.answers import read_beavertails_v, read_spa_vl, read_table
from mirage.data.readers.conversations import read_messages, read_mis_train, read_sharegpt, read_think_in_safety
from mirage.data.readers.entry import Passed as Passed
from mirage.data.readers.entry import SourcedRow as SourcedRow
from mirage.data.readers.entry import explain as explain
from mirage.data.readers.images import unpack, unpacked_dir
from mirage.data.readers.records import Record, records
from mirage.data.readers.rows import ROWS_FILE as ROWS_FILE
from mirage.data.readers.rows import parse_row, read_folder, read_parquet_row
from mirage.data.readers.rows import read_rows as read_rows
from mirage.data.readers.vlguard import read_vlguard
from mirage.data.row_list import FileRows, HeldRows, LeftOutRows, Lines, RowList, SourceRows
from mirage.data.row_list import LeftOut as LeftOut
from mirage.data.views import BLACK_PICTURE, view_row
from mirage.errors import UserError
from mirage.safe_paths import leads_outside

Entry = SourcedRow | Passed | UserError
RecordReader = Callable[[Record], Iterator[SourcedRow | Passed]]

# Format -> the file that its published folder has, and the reader of one record. `rows` is read by itself.
FORMATS: dict[str, tuple[str, RecordReader]] = {
    "rows_parquet": ("train.parquet", read_parquet_row),
    "mis_train": ("mis_train.json", read_mis_train),
    "sharegpt": ("train.json", read_sharegpt),
    "messages": ("train.jsonl", read_messages),
    "vlguard": ("train.json", read_vlguard),
    "spa_vl": ("train.json", read_spa_vl),
    "beavertails_v": ("train.json", read_beavertails_v),
    "think_in_safety": ("train_data.json", read_think_in_safety),
}
TABLE_FILE = "train.json"


@dataclass
class Mixture:
    """All rows of a run's sources, in order; what was left out; what `max_samples`, `share`, `epochs` did not draw."""

    rows: RowList = field(default_factory=RowList)
    left_out: list[LeftOut] = field(default_factory=list)
    num_bad: int = 0
    """How many of `left_out` are bad rows, which `data.max_left_out` limits; the others go by a source's own rule."""
    not_drawn: Sequence[LeftOut] = ()


def load_mixture(config: DataConfig, *, seed: int) -> Mixture:
    """Rows of all sources. Bad rows stop the run, or are listed in `left_out`, as `data.on_bad_row` says.

    What a source's view or reader leaves out by its own rule is listed as well and does not count as bad.
    """
    mixture = Mixture()
    passed: list[LeftOut] = []
    parts: list[SourceRows] = []
    files: dict[Path, Lines] = {}
    # A picture is looked at once, though many rows show it.
    size_inside = lru_cache(maxsize=1 << 16)(partial(_size_inside, whole=config.check_pictures == "whole"))
    for source in config.sources:
        rows = _stored(source, config.dir, files)
        passed_before = len(passed)
        for entry in read_source(source, config.dir):
            problem = _image_problem(entry, size_inside) if isinstance(entry, SourcedRow) else None
            if isinstance(entry, SourcedRow) and problem is None:
                rows.add(entry)
            elif isinstance(entry, Passed):
                passed.append(LeftOut(source.name or source.split, entry.location, entry.row_id, entry.reason))
            elif config.on_bad_row == "error":
                raise problem or entry  # type: ignore[misc]
            else:
                mixture.left_out.append(_bad_row(source, entry, problem))
        if not len(rows):
            raise _no_rows(source, config.dir, passed[passed_before:])
        parts.append(rows)
    check_left_out(mixture.left_out, config.max_left_out)
    mixture.num_bad = len(mixture.left_out)
    mixture.left_out += passed
    mixture.rows, mixture.not_drawn = _drawn(parts, config.sources, seed=seed)
    return mixture


def _stored(source: SourceConfig, default_dir: Path, files: dict[Path, Lines]) -> SourceRows:
    """Where the rows of a source are put; sources of one file share what is known of its lines."""
    name, folder = source.name or source.split, source.path or default_dir
    if source.format != "rows" or not (folder / ROWS_FILE).is_file():
        return HeldRows(name=name, weight=source.weight)

    def parse(line: bytes, number: int) -> SourcedRow | None:
        entry = _viewed(parse_row(line, folder, number), source)
        return entry if isinstance(entry, SourcedRow) else None

    file = folder / ROWS_FILE
    if file not in files:
        files[file] = Lines(file)
    view = f"{source.pictures} {source.answers}"
    return FileRows(files[file], parse, name=name, weight=source.weight, view=view)


def _drawn(
    parts: Sequence[SourceRows], sources: Sequence[SourceConfig], *, seed: int
) -> tuple[RowList, Sequence[LeftOut]]:
    """The rows that the mixture takes of each source, and those that it does not."""
    taken, rest, reasons = [], [], []
    for part, source, count in zip(parts, sources, mixture_counts([len(part) for part in parts], sources)):
        own_seed = seed if source.seed is None else source.seed
        drawn = draw(range(len(part)), count, seed=own_seed, split=source.split, limit=source.max_samples)
        taken.append(RowList.of(part, drawn))
        others = np.setdiff1d(np.arange(len(part)), taken[-1].keys)
        used = len(part) - len(others)
        reasons.append(f"the source gives {used:,} of its {len(part):,} rows, drawn by the seed, and not this one")
        rest.append(RowList.of(part, others))
    return RowList.joined(taken), LeftOutRows(RowList.joined(rest), reasons)


def _bad_row(source: SourceConfig, entry: SourcedRow | UserError, problem: UserError | None) -> LeftOut:
    found = entry if isinstance(entry, SourcedRow) else None
    return LeftOut(
        source=source.name or source.split,
        location=found.location if found else "",
        row_id=found.row.id if found else "",
        reason=str(problem or entry),
    )


def _no_rows(source: SourceConfig, default_dir: Path, passed: Sequence[LeftOut]) -> UserError:
    why = f"; {len(passed)} are left out, the first because: {passed[0].reason}" if passed else ""
    return UserError(f"source {source.split!r} of {source.path or default_dir} holds no rows{why}")


def check_left_out(left_out: Sequence[LeftOut], limit: int, *, before: int = 0) -> None:
    """Stop when more rows are left out, with those `before`, than the recipe allows."""
    if left_out and len(left_out) + before > limit:
        first = left_out[0]
        raise UserError(
            f"{len(left_out) + before} rows cannot be trained on and data.max_left_out is {limit}. "
            f"The first: {first.location} {first.reason}"
        )


def read_source(source: SourceConfig, default_dir: Path) -> Iterator[Entry]:
    """Rows of one source under its view; a row that cannot be read comes as the `UserError` it would raise."""
    path = source.path or default_dir
    for entry in read_folder(path, source.split) if source.format == "rows" else _read_records(path, source):
        yield _viewed(entry, source) if isinstance(entry, SourcedRow) else entry


def _read_records(path: Path, source: SourceConfig) -> Iterator[Entry]:
    read: RecordReader
    if source.format == "table":
        default_file, read = TABLE_FILE, partial(read_table, columns=source.columns)
    else:
        default_file, read = FORMATS[source.format]
    for record in records(path, default_file=default_file, split=source.split, image_dir=source.image_dir):
        if isinstance(record, UserError):
            yield record
            continue
        try:
            yield from read(record)
        except UserError as error:
            yield error


def _viewed(entry: SourcedRow, source: SourceConfig) -> SourcedRow | Passed:
    row = view_row(entry.row, pictures=source.pictures, answers=source.answers)
    if isinstance(row, str):
        return Passed(entry.location, f"{row}", entry.row.id)
    root = entry.root
    if source.pictures == "black":
        unpack(BLACK_PICTURE, ending=".png")
        root = unpacked_dir()
    return replace(entry, row=row, root=root, source=source.name or source.split, weight=source.weight)


def _size_inside(root: Path, name: str, *, whole: bool) -> tuple[int, int] | None:
    """Pixels of a picture below `root`, or None where its links lead out of it. Raises `UserError`.

    With `whole` the picture is decoded, which finds one that is cut off.
    """
    path = root / name
    if leads_outside(path, root):
        return None
    return open_picture(path).size if whole else picture_size(path)


def _image_problem(entry: SourcedRow, size_inside: Callable[[Path, str], tuple[int, int] | None]) -> UserError | None:
    """What is wrong with a row's pictures as far as their headers tell, or None."""
    for image in entry.row.images:
        try:
            size = size_inside(entry.root, image.path)
        except UserError as error:
            return UserError(f"{entry.location}: row {entry.row.id}: {error}")
        if size is None:
            return UserError(f"{entry.location}: image {image.path} leads outside {entry.root}")
        if size != (image.width, image.height):
            return UserError(
                f"{entry.location}: row {entry.row.id}: image {entry.root / image.path} has {size[0]} x {size[1]} "
                f"pixels, the row says {image.width} x {image.height}"
            )
    return None
