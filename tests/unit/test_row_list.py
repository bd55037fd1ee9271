"""Rows kept by their place: the same rows as were read, little memory, and a file that changes is noticed."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mirage.config.schema import DataConfig, SourceConfig
from mirage.data.row_list import HeldRows, RowList
from mirage.data.sources import SourcedRow, load_mixture, read_source
from mirage.errors import UserError
from tests.support.dataset import write_dataset

SOURCES = (
    SourceConfig(split="train", epochs=1.5),
    SourceConfig(split="train_twins", pictures="one", weight=2.0, name="twins"),
    SourceConfig(split="train_general", pictures="none", max_samples=4),
)
MAX_BYTES_A_ROW = 250


def test_the_rows_are_those_that_were_read(shapes: Path) -> None:
    mixture = load_mixture(DataConfig(dir=shapes, sources=SOURCES, max_left_out=99), seed=3)
    entries = [entry for source in SOURCES for entry in read_source(source, shapes) if isinstance(entry, SourcedRow)]
    read = {(entry.source, entry.row.id): entry for entry in entries}
    assert len(mixture.rows) == 12 + 8 + 4 == len(list(mixture.rows))
    for number, entry in enumerate(mixture.rows):
        assert entry == read[entry.source, entry.row.id]
        assert mixture.rows.row_id(number) == entry.row.id and mixture.rows.location(number) == entry.location
        assert mixture.rows.sources[number] == entry.source
        assert mixture.rows.num_images[number] == len(entry.row.images)
    twice = mixture.rows.keys[:12]
    assert len(np.unique(twice)) == 8 and len(np.unique(mixture.rows.keys)) == 20
    assert [entry.row.id for entry in mixture.rows[3:5]] == [mixture.rows.row_id(3), mixture.rows.row_id(4)]
    taken = mixture.rows.take([20, 0, 12])
    assert [entry.source for entry in taken] == ["train_general", "train", "twins"]
    listed = list(mixture.not_drawn)
    assert len(listed) == len(mixture.not_drawn) > 0 and all(entry.row_id and entry.location for entry in listed)


def test_rows_without_a_line_of_their_own_are_kept_whole(shapes: Path) -> None:
    entries = list(read_source(SOURCES[1], shapes))
    held = HeldRows(name="twins", weight=2.0)
    for entry in entries:
        held.add(entry)  # type: ignore[arg-type]
    found = list(RowList.of(held, range(len(held))))
    assert [entry.row for entry in found] == [entry.row for entry in entries]  # type: ignore[union-attr]
    assert {(entry.source, entry.weight) for entry in found} == {("twins", 2.0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", seed_rows=4)


def opened(folder: Path) -> RowList:
    return load_mixture(DataConfig(dir=folder, sources=(SourceConfig(split="train"),)), seed=0).rows


def test_a_line_that_is_written_over_is_noticed(folder: Path) -> None:
    rows, file = opened(folder), folder / "rows.jsonl"
    content = file.read_bytes()
    place = content.index(b"discs roll")
    with file.open("r+b") as target:
        target.seek(place)
        target.write(b"discs role")
    number = content[:place].count(b"\n") + 1
    with pytest.raises(UserError, match=rf"rows\.jsonl:{number}: has changed since the run opened it"):
        list(rows)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="has changed since the run opened it"):
        rows[0]


def test_a_new_file_in_its_place_changes_nothing(folder: Path) -> None:
    rows, file = opened(folder), folder / "rows.jsonl"
    before = list(rows)
    (folder / "new").write_text("")
    (folder / "new").replace(file)
    assert list(rows) == before


def test_processes_that_are_forked_read_at_a_time(folder: Path) -> None:
    rows = opened(folder)
    wanted = [entry.row.id for entry in rows]
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            good = all([rows[number].row.id for number in range(len(rows))] == wanted for _ in range(50))
            os._exit(0 if good else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_a_row_costs_little_memory(folder: Path) -> None:
    """What is left of a row once it is read; as objects it would be 10 kB."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    row = json.loads(next(line for line in lines if '"split":"train"' in line))
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(1000):
            row["id"] = f"{number:016x}"
            file.write(json.dumps(row) + "\n")
    opened(folder)  # what is loaded once, whatever the number of rows
    measured = [_kept_bytes(folder) for _ in range(2)]
    # Reading a path interns its parts, and the interpreter's table of such texts grows all at once, by megabytes in a
    # process that holds many; never twice in a row.
    assert min(measured) < MAX_BYTES_A_ROW * 1000


def _kept_bytes(folder: Path) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        rows = opened(folder)
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(rows) == 1000
    return kept
