"""The rows of a mixture without their text in memory: where each lies in its file, read again when it is asked for.

A million rows as objects are about 10 GB in each process; their places are 50 MB.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from mirage.data.readers.entry import SourcedRow
from mirage.data.row import Row, dump_row
from mirage.errors import UserError

# A row's key is its source's number above this many bits, its place in the source below.
_PLACE_BITS = 40
_CHUNK_BYTES = 1 << 24
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not trained on, and why: one line of `ledger.jsonl`."""

    source: str
    location: str
    row_id: str
    reason: str


class SourceRows:
    """The rows of one source, in order. Kept in memory of each: id, number of pictures, and what `_keep` stores."""

    def __init__(self, *, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        self.num_images = array("H")
        self._ids, self._id_ends = bytearray(), array("Q", [0])

    def __len__(self) -> int:
        return len(self.num_images)

    def add(self, entry: SourcedRow) -> None:
        """Take a row that has been found good."""
        self._keep(entry)
        self._ids += entry.row.id.encode("utf-8", "surrogatepass")
        self._id_ends.append(len(self._ids))
        self.num_images.append(min(len(entry.row.images), 0xFFFF))

    def row_id(self, place: int) -> str:
        """The row's id; nothing is read."""
        return self._ids[self._id_ends[place] : self._id_ends[place + 1]].decode("utf-8", "surrogatepass")

    def location(self, place: int) -> str:
        """Where the row was read."""
        raise NotImplementedError

    def load(self, place: int) -> SourcedRow:
        """The row itself."""
        raise NotImplementedError

    def digest(self, place: int) -> bytes:
        """16 bytes that change with the row: of what it is parsed from, which is not parsed."""
        raise NotImplementedError

    def _keep(self, entry: SourcedRow) -> None:
        raise NotImplementedError


class Lines:
    """The lines of a file by number, from 1. It stays open: a new file put in its place changes nothing."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        ends, size = [np.zeros(1, np.int64)], 0
        while chunk := os.pread(self._descriptor, _CHUNK_BYTES, size):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size + 1)
            size += len(chunk)
        # [lines + 1] int64: where each line begins, and where the last one ends.
        self._starts = np.unique(np.concatenate([*ends, np.array([size])]))

    def read(self, number: int) -> bytes:
        """A line with its end, or nothing where the file has fewer lines. Processes that are forked may read at a time.

        Raises `UserError` where the disk does not answer.
        """
        if number >= len(self._starts):
            return b""
        start, end = self._starts[number - 1 : number + 1].tolist()
        try:
            return os.pread(self._descriptor, end - start, start)
        except OSError as error:
            raise UserError(f"{self.file}:{number}: cannot be read ({error.strerror}); is the disk there?") from error


class FileRows(SourceRows):
    """Rows of a `rows.jsonl`: the number and the checksum of each line.

    `parse` makes a row of a line and its place; `view` names what else the row depends on.
    """

    def __init__(
        self,
        lines: Lines,
        parse: Callable[[bytes, int], SourcedRow | None],
        *,
        name: str,
        weight: float,
        view: str = "",
    ) -> None:
        super().__init__(name=name, weight=weight)
        self._lines, self._parse, self._view = lines, parse, view.encode()
        self._numbers, self._checksums = array("I"), array("I")

    def _keep(self, entry: SourcedRow) -> None:
        if entry.line is None:
            raise ValueError(f"{entry.location} does not say which line it is")
        self._numbers.append(entry.line)
        self._checksums.append(zlib.crc32(self._lines.read(entry.line)))

    def location(self, place: int) -> str:
        return f"{self._lines.file}:{self._numbers[place]}"

    def load(self, place: int) -> SourcedRow:
        """The row itself. Raises `UserError` where its line is not what it was when it was added."""
        entry = self._parse(self._line(place), self._numbers[place])
        if entry is None:
            raise self._changed(place)
        return entry

    def digest(self, place: int) -> bytes:
        """Of the view and the line. Raises `UserError` as `load` does."""
        return _digest(self._view + b"\n" + self._line(place))

    def _line(self, place: int) -> bytes:
        line = self._lines.read(self._numbers[place])
        if zlib.crc32(line) != self._checksums[place]:
            raise self._changed(place)
        return line

    def _changed(self, place: int) -> UserError:
        return UserError(
            f"{self.location(place)}: has changed since the run opened it; restore the file, run the same command "
            "again, and write a changed dataset to a new folder"
        )


class HeldRows(SourceRows):
    """Rows of the other formats, which have no line of their own to go back to: their JSON stays in memory."""

    def __init__(self, *, name: str, weight: float) -> None:
        super().__init__(name=name, weight=weight)
        self._rows: list[tuple[str, Path, bytes]] = []

    def _keep(self, entry: SourcedRow) -> None:
        self._rows.append((entry.location, entry.root, dump_row(entry.row).encode("utf-8", "surrogatepass")))

    def location(self, place: int) -> str:
        return self._rows[place][0]

    def load(self, place: int) -> SourcedRow:
        location, root, text = self._rows[place]
        row = Row.model_validate(json.loads(text.decode("utf-8", "surrogatepass")))
        return SourcedRow(row, root, location, self.name, self.weight)

    def digest(self, place: int) -> bytes:
        return _digest(self._rows[place][2])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class RowList(Sequence[SourcedRow]):
    """Rows of several sources in an order of their own; one can be in it several times. Indexing reads the row."""

    def __init__(self, parts: Sequence[SourceRows] = (), keys: np.ndarray | None = None) -> None:
        self._parts = tuple(parts)
        # [rows] int64; two rows are the same one exactly where their keys are.
        self.keys: np.ndarray = np.zeros(0, np.int64) if keys is None else keys

    @classmethod
    def of(cls, part: SourceRows, places: Sequence[int] | np.ndarray) -> RowList:
        """The rows of one source at these places."""
        return cls([part], np.asarray(places, np.int64))

    @classmethod
    def joined(cls, lists: Iterable[RowList]) -> RowList:
        """The lists one after the other."""
        parts: list[SourceRows] = []
        keys = [np.zeros(0, np.int64)]
        for item in lists:
            keys.append(item.keys + (len(parts) << _PLACE_BITS))
            parts += item._parts
        return cls(parts, np.concatenate(keys))

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, number: int) -> SourcedRow: ...
    @overload
    def __getitem__(self, number: slice) -> list[SourcedRow]: ...
    def __getitem__(self, number: int | slice) -> SourcedRow | list[SourcedRow]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        part, place = self._find(number)
        return part.load(place)

    def _find(self, number: int) -> tuple[SourceRows, int]:
        part, place = divmod(int(self.keys[number]), 1 << _PLACE_BITS)
        return self._parts[part], place

    def take(self, numbers: Sequence[int] | np.ndarray) -> RowList:
        """The rows of these numbers, in their order; nothing is read."""
        return RowList(self._parts, self.keys[np.asarray(numbers, np.int64)])

    def part(self, number: int) -> tuple[int, str]:
        """Which part of the list row `number` is from, and the name of its source."""
        found = int(self.keys[number] >> _PLACE_BITS)
        return found, self._parts[found].name

    @property
    def num_parts(self) -> int:
        """Sources behind the list."""
        return len(self._parts)

    def row_id(self, number: int) -> str:
        """The id of row `number`; nothing is read."""
        part, place = self._find(number)
        return part.row_id(place)

    def location(self, number: int) -> str:
        """Where row `number` was read."""
        part, place = self._find(number)
        return part.location(place)

    def digest(self, number: int) -> bytes:
        """16 bytes that change with row `number`; it is read and not parsed."""
        part, place = self._find(number)
        return part.digest(place)

    @property
    def weights(self) -> np.ndarray:
        """[rows] float64: the weight of each row's source."""
        return np.array([part.weight for part in self._parts] or [1.0], np.float64)[self.keys >> _PLACE_BITS]

    @property
    def sources(self) -> np.ndarray:
        """[rows] str: the name of each row's source."""
        names = np.array([part.name for part in self._parts] or [""])
        return names[self.keys >> _PLACE_BITS]

    @property
    def num_images(self) -> np.ndarray:
        """[rows] int64: pictures of each row."""
        part_of, places = self.keys >> _PLACE_BITS, self.keys & ((1 << _PLACE_BITS) - 1)
        found = np.zeros(len(self), np.int64)
        for number, part in enumerate(self._parts):
            own = part_of == number
            found[own] = np.frombuffer(part.num_images, np.uint16)[places[own]] if len(part) else 0
        return found


class LeftOutRows(Sequence[LeftOut]):
    """Rows that are not trained on, for one reason a part of the list; each entry is made when it is asked for."""

    def __init__(self, rows: RowList, reasons: Sequence[str]) -> None:
        self._rows, self._reasons = rows, tuple(reasons)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> LeftOut: ...
    @overload
    def __getitem__(self, number: slice) -> list[LeftOut]: ...
    def __getitem__(self, number: int | slice) -> LeftOut | list[LeftOut]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        part, name = self._rows.part(number)
        return LeftOut(name, self._rows.location(number), self._rows.row_id(number), self._reasons[part])
