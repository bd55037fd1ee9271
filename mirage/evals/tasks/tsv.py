"""VLMEvalKit's TSV files: rows read one by one, pictures inside them written to the cache, references resolved."""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mirage.errors import UserError
from mirage.evals.tasks.embedded import KeptPicture, decode_base64, keep_picture
from mirage.safe_paths import is_file, open_regular, printable, stays_inside
from mirage.strict_json import JsonError, parse_literal

# A cell holds a whole picture, or a list of them.
MAX_CELL_CHARS = 1 << 30
# A picture cell this short is the index of the row whose pictures it shares (upstream vlmeval/dataset/image_base.py).
MAX_REFERENCE_CHARS = 64
# The column in which `mirage export-task` writes the sample itself.
EXCHANGED = "mirage"
_SKIPPED = frozenset(("image", "image_path"))


@dataclass(frozen=True)
class TsvRow:
    """One row: `cells` without the pictures, by column; empty cells are left out.

    Columns are in lower case but for the options A..Z, and `l2_category` is `l2-category`.
    """

    index: str
    where: str
    cells: dict[str, str]
    pictures: tuple[KeptPicture | Path, ...]

    @property
    def options(self) -> dict[str, str]:
        """The options that are there, by letter. A letter may be missing between two others."""
        return {letter: self.cells[letter] for letter in string.ascii_uppercase if letter in self.cells}


def read_rows(path: Path) -> list[TsvRow]:
    """All rows with a picture, in file order; files of many GB pass through memory row by row.

    Rows without a picture in a file that has them are left out, as upstream does (`skip_noimg`), but for this
    project's own. Raises `UserError`
    for a file that is no such table, a repeated index, or a picture that cannot be had.
    """
    rows: list[TsvRow] = []
    references: dict[str, str] = {}
    seen: set[str] = set()
    has_pictures = False
    for where, cells in _tables(path):
        index = cells["index"]
        if index in seen:
            raise UserError(f"{where}: index {index!r} occurs twice; indices must differ")
        seen.add(index)
        pictures, reference = _pictures(cells, folder=path.parent, stem=path.stem, where=where)
        if reference is not None:
            references[index] = reference
        has_pictures = has_pictures or bool(_SKIPPED & cells.keys())
        rows.append(TsvRow(index, where, {k: v for k, v in cells.items() if k not in _SKIPPED}, pictures))
    if not rows:
        raise UserError(f"{path} has no rows; download the file again")
    rows = _resolve(rows, references)
    return [row for row in rows if row.pictures or EXCHANGED in row.cells] if has_pictures else rows


def _tables(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, cells) row by row; empty cells and pandas' `nan` are left out."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARS))
    with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        try:
            header = [_column(name) for name in next(reader, [])]
            _check_header(header, path)
            for number, values in enumerate(reader, start=1):
                if not values:
                    continue
                where = f"{path}: row {number} (line {reader.line_num})"
                if len(values) != len(header):
                    raise UserError(f"{where}: {len(values)} cells, the header has {len(header)}; download it again")
                cells = {name: value for name, value in zip(header, values, strict=True) if _is_there(value)}
                for needed in ("index", "question"):
                    if needed not in cells:
                        raise UserError(f"{where}: the {needed} is empty")
                yield f"{path}: index {cells['index']}", cells
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a tab-separated UTF-8 table after line {reader.line_num}: {error}") from error


def _column(name: str) -> str:
    name = name.strip()
    if len(name) == 1 and name in string.ascii_uppercase:
        return name
    lower = name.lower()
    return "l2-category" if lower == "l2_category" else lower


def _check_header(header: list[str], path: Path) -> None:
    missing = [name for name in ("index", "question") if name not in header]
    if missing:
        found = ", ".join(header[:12])[:200]
        raise UserError(f"{path}: no column {' and '.join(missing)}; a VLMEvalKit TSV has them, found: {found}")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: column {', '.join(repeated)} occurs twice")


def _is_there(value: str) -> bool:
    return bool(value.strip()) and value.strip() not in ("nan", "NaN")


def _pictures(
    cells: dict[str, str], *, folder: Path, stem: str, where: str
) -> tuple[tuple[KeptPicture | Path, ...], str | None]:
    """The row's pictures, or the index of the row that has them."""
    cell = cells.get("image")
    if cell is not None:
        if len(cell) <= MAX_REFERENCE_CHARS and not cell.startswith("["):
            return (), cell.strip()
        items = _listed(cell, where=where)
        return tuple(keep_picture(decode_base64(item, where=where), where=where) for item in items), None
    names = _listed(cells["image_path"], where=where) if "image_path" in cells else []
    return tuple(_inside(name, folder=folder, stem=stem, where=where) for name in names), None


def _listed(cell: str, *, where: str) -> list[str]:
    """One item, or the items of a list as JSON or Python writes it (upstream evaluates the text as code)."""
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    try:
        items = parse_literal(text)
    except JsonError as error:
        raise UserError(f"{where}: the picture cell begins with [ and is {error}") from error
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{where}: the picture cell must be a list of texts")
    return items


def _inside(name: str, *, folder: Path, stem: str, where: str) -> Path:
    """A picture file beside the table, or in images/<table>/ or images/ beside it."""
    if not stays_inside(name):
        raise UserError(f"{where}: image_path {name!r:.200} must be a relative path inside {folder}")
    places = (folder / name, folder / "images" / stem / name, folder / "images" / name)
    found = next((place for place in places if is_file(place)), None)
    if found is None:
        raise UserError(
            f"{where}: no picture {printable(places[0]):.300}; put the pictures beside {folder / (stem + '.tsv')}"
        )
    return found


def _resolve(rows: list[TsvRow], references: dict[str, str]) -> list[TsvRow]:
    pictures = {row.index: row.pictures for row in rows if row.index not in references}
    resolved = []
    for row in rows:
        reference = references.get(row.index)
        if reference is None:
            resolved.append(row)
            continue
        if not pictures.get(reference):
            raise UserError(f"{row.where}: the picture is that of index {reference!r}, and no such row has one")
        resolved.append(replace(row, pictures=pictures[reference]))
    return resolved
