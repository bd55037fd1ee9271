"""Read filled-in label sheets with their key: what each person said of each answer, and what the judge said."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from mirage.data.readers.entry import explain
from mirage.errors import UserError
from mirage.evals.calibration.sheet import KEY_SUFFIX, KEY_VERSION
from mirage.safe_paths import open_regular
from mirage.strict_json import read_json_object

UNSURE = "unsure"
_LABEL = "label"


@dataclass(frozen=True)
class Labelled:
    """One answer with the judge's verdict and the labels of people by name; weight: answers that it stands for."""

    item: str
    source: str
    task: str
    verdict: str
    weight: float
    labels: Mapping[str, str]

    @property
    def reference(self) -> str | None:
        """The label that most people gave; None where none did, or two labels tie."""
        counts = Counter(self.labels.values()).most_common(2)
        if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
            return None
        return counts[0][0]


@dataclass(frozen=True)
class Sheet:
    """Everything that a report needs; `strata` has (size, drawn) by (source, task, verdict)."""

    items: tuple[Labelled, ...]
    labellers: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]
    strata: Mapping[tuple[str, str, str], tuple[int, int]]
    sources: Mapping[str, Mapping[str, Any]]


def read_sheet(paths: Sequence[Path], *, key: Path | None = None) -> Sheet:
    """The labels of one or more copies of a sheet. A labeller is a column `label_NAME`, or a file with column `label`.

    The key is the one beside the first file, by name or the only one there. Raises `UserError` naming file and line
    for an unknown item or label, a labeller who occurs twice, a missing key, or a sheet without any label.
    """
    if not paths:
        raise UserError("name at least one filled-in sheet")
    content = _read_key(key or _find_key(paths[0]))
    options = {task: tuple(found) for task, found in content["options"].items()}
    given: dict[str, dict[str, str]] = {}
    for path in paths:
        for name, found in _read_labels(path, content["items"], options).items():
            if name in given:
                raise UserError(f"{path}: labels of {name!r} are in another file too; rename the column or the file")
            given[name] = found
    given = {name: found for name, found in given.items() if found}
    if not given:
        raise UserError(f"{paths[0]}: no line has a label; fill in the column {_LABEL!r}")
    strata = {
        (item["source"], item["task"], item["verdict"]): (int(item["size"]), int(item["drawn"]))
        for item in content["strata"]
    }
    return Sheet(
        items=tuple(_weighted(content["items"], given, strata)),
        labellers=tuple(given),
        options=options,
        strata=strata,
        sources=content["sources"],
    )


def _weighted(
    items: Mapping[str, Mapping[str, str]],
    given: Mapping[str, Mapping[str, str]],
    strata: Mapping[tuple[str, str, str], tuple[int, int]],
) -> list[Labelled]:
    """Each answer stands for the others of its stratum; those that nobody could label pass their weight to the rest."""
    found = []
    for item, entry in items.items():
        labels = {name: labels[item] for name, labels in given.items() if item in labels}
        found.append(Labelled(item, entry["source"], entry["task"], entry["verdict"], 0.0, labels))
    told = Counter((one.source, one.task, one.verdict) for one in found if one.reference is not None)
    weighted = []
    for one in found:
        stratum = (one.source, one.task, one.verdict)
        weight = strata[stratum][0] / told[stratum] if one.reference is not None else 0.0
        weighted.append(Labelled(one.item, one.source, one.task, one.verdict, weight, one.labels))
    return weighted


def _find_key(sheet: Path) -> Path:
    own = sheet.with_name(sheet.stem + KEY_SUFFIX)
    if own.is_file():
        return own
    others = sorted(sheet.parent.glob(f"*{KEY_SUFFIX}"))
    if len(others) != 1:
        raise UserError(f"{sheet}: found {len(others)} keys (*{KEY_SUFFIX}) beside it; name the sheet's: key=FILE")
    return others[0]


def _read_key(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no key at {path}; the sheet's export wrote it beside the sheet")
    content = read_json_object(path, remedy="export the sheet again")
    if content.get("schema_version") != KEY_VERSION:
        raise UserError(f"{path}: not a key of version {KEY_VERSION}; export the sheet again")
    try:
        key = _Key.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: not a key ({explain(error)}); export the sheet again") from error
    strata = {(item.source, item.task, item.verdict) for item in key.strata}
    for name, item in key.items.items():
        if item.task not in key.options or (item.source, item.task, item.verdict) not in strata:
            raise UserError(f"{path}: item {name!r:.80} is of no task or stratum of the key; export the sheet again")
    return content


class _KeyItem(BaseModel):
    source: str
    task: str
    verdict: str


class _KeyStratum(_KeyItem):
    size: int = Field(ge=0)
    drawn: int = Field(ge=0)


class _Key(BaseModel):
    options: dict[str, list[str]]
    items: dict[str, _KeyItem]
    strata: list[_KeyStratum]
    sources: dict[str, dict[str, Any]]


def _read_labels(
    path: Path, items: Mapping[str, Mapping[str, str]], options: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, str]]:
    """The labels in one file by labeller and item."""
    if not path.is_file():
        raise UserError(f"no sheet at {path}")
    rows = list(_table(path))
    header = list(rows[0][1]) if rows else []
    names = {column: _labeller(column, path) for column in header if _is_label(column)}
    if "item" not in header or not names:
        raise UserError(f"{path}: the first line must have the columns 'item' and {_LABEL!r} or '{_LABEL}_NAME'")
    found: dict[str, dict[str, str]] = {name: {} for name in names.values()}
    for line, row in rows[1:]:
        item, where = row.get("item") or "", f"{path}: line {line}"
        if item not in items:
            raise UserError(f"{where}: item {item!r:.80} is not in the key; is it the key of this sheet?")
        for column, name in names.items():
            label = row.get(column, "").strip().casefold()
            if not label or label == UNSURE:
                continue
            known = {option.casefold(): option for option in options[items[item]["task"]]}
            if label not in known:
                choices = ", ".join(known.values())
                given = f"{row[column]!r:.80}"
                raise UserError(f"{where}: {column} is {given}; use one of {choices}, {UNSURE!r} or nothing")
            if item in found[name]:
                raise UserError(f"{where}: item {item} occurs twice")
            found[name][item] = known[label]
    return found


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, cells by column) of a sheet; the first is the header itself. Rows may lack their last cells."""
    with open_regular(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save the sheet as CSV in UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = next(reader, [])
        yield 1, dict(zip(header, header, strict=True))
        for cells in reader:
            if cells:
                yield reader.line_num, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}; save the sheet again") from error


def _is_label(column: str | None) -> bool:
    return column is not None and (column == _LABEL or column.startswith(f"{_LABEL}_"))


def _labeller(column: str, path: Path) -> str:
    return path.stem if column == _LABEL else column.removeprefix(f"{_LABEL}_")
