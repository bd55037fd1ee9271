"""Compare two dataset folders by their manifests and rows: what was added, what went, what changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.store import MANIFEST_FILE, read_manifest
from mirage.data.row import Row
from mirage.data.sources import read_rows
from mirage.errors import UserError

ROWS_FILE = "rows.jsonl"
NOT_CONTENT = frozenset(("lineage", "checks"))
CONTENT_IN_MANIFEST = frozenset(("files", "content_sha256", "counts"))


@dataclass(frozen=True)
class ChangedRow:
    """A row that both folders have at one place (same split, question and pictures' seeds) with other fields."""

    id_before: str
    id_after: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class FolderDiff:
    """The difference of two folders. Rows are given by id, in the order of their folder."""

    same: bool
    """The manifests are equal, so every file is."""
    num_common: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[ChangedRow, ...]
    description: tuple[str, ...]
    """Keys of the manifests that differ, without those that follow from the rows."""


def diff_folders(before: Path, after: Path) -> FolderDiff:
    """What changed from one dataset folder to the other.

    A row's id is the hash of its split, pictures and messages. Rows whose id is gone and rows whose id is new are
    changed rows where they answer the same question about the same things; rows with the same id are changed where
    their label, tags or licence differ. Raises UserError for a folder that is no dataset.
    """
    manifests = [_manifest(folder) for folder in (before, after)]
    description = tuple(_differing(*manifests))
    if manifests[0]["content_sha256"] == manifests[1]["content_sha256"]:
        count = manifests[0].get("counts", {}).get("rows", 0)
        return FolderDiff(True, count, (), (), (), ())
    old, new = _rows(before), _rows(after)
    changed = [
        ChangedRow(row_id, row_id, fields)
        for row_id in old
        if row_id in new and (fields := _fields(old[row_id], new[row_id]))
    ]
    gone = {name: row for name, row in old.items() if name not in new}
    come = {name: row for name, row in new.items() if name not in old}
    partners: dict[tuple[Any, ...], list[str]] = {}
    for name, row in come.items():
        partners.setdefault(_place(row), []).append(name)
    for name, row in list(gone.items()):
        if partner := partners.get(_place(row)):
            other = partner.pop(0)
            changed.append(ChangedRow(name, other, _fields(row, come[other])))
            del gone[name], come[other]
    num_common = sum(name in new for name in old) - sum(row.id_before == row.id_after for row in changed)
    return FolderDiff(False, num_common, tuple(come), tuple(gone), tuple(changed), description)


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST_FILE).is_file():
        raise UserError(f"{folder} is no dataset folder (no {MANIFEST_FILE})")
    return read_manifest(folder)


def _rows(folder: Path) -> dict[str, Row]:
    return {row.id: row for row in read_rows(folder)}


def _place(row: Row) -> tuple[Any, ...]:
    """What stays when a row is made again with another answer or other pictures."""
    things = tuple(image.concept or image.sha256 for image in row.images)
    return row.split, row.question, things, row.twin_kind, row.tags.get("seed")


def _fields(before: Row, after: Row) -> tuple[str, ...]:
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return tuple(name for name in old if name != "id" and name not in NOT_CONTENT and old[name] != new[name])


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names = sorted({*before, *after} - CONTENT_IN_MANIFEST)
    return [name for name in names if before.get(name) != after.get(name)]
