"""Records of a dataset file or folder: JSON, JSON lines, Parquet, or what `Dataset.save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mirage.errors import UserError
from mirage.safe_paths import is_file, stays_inside
from mirage.strict_json import json_lines, read_json, read_json_object

_REMEDY = "mend it or download the file again"
BATCH_ROWS = 32  # a batch of rows with pictures inside is in memory at a time


@dataclass(frozen=True)
class Record:
    """One record, where it was read, and the folder its image paths start from."""

    value: dict[str, Any]
    location: str
    root: Path

    def text(self, name: str, *, where: str = "") -> str:
        """The text in a field. Raises `UserError` naming the record when it is missing, empty or no text."""
        found = self.value.get(name)
        if not isinstance(found, str) or not found.strip():
            what = f"has no {name!r}" if name not in self.value else f"{name!r} must be text, found {found!r:.80}"
            raise UserError(f"{self.location}{where}: {what}; its fields are {field_names(self.value)}")
        return found


def field_names(value: Mapping[str, Any]) -> str:
    """A record's keys for a message: at most 300 characters of them."""
    return f"{', '.join(map(str, islice(value, 50))):.300}"


def records(path: Path, *, default_file: str, split: str, image_dir: Path | None) -> Iterator[Record | UserError]:
    """The records of `path`: a file, or a folder with `default_file`, Parquet files of `split`, or a saved dataset.

    What is in a file is told by its ending alone. A record that is no object, or a line that is no JSON, comes as the
    `UserError` it would raise; a file that cannot be read raises.
    """
    for file in _files(path, default_file, split):
        for place, value in _values(file):
            location = f"{file}{place}"
            if isinstance(value, UserError):
                yield value
            elif isinstance(value, dict):
                yield Record(value, location, image_dir or file.parent)
            else:
                yield UserError(f"{location}: must be a JSON object, found {type(value).__name__}")


def _files(path: Path, default_file: str, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no {path}; set the source's path to {default_file} or to a folder with it")
    if (path / "dataset_dict.json").is_file():
        path = path / split
        if not path.is_dir():
            raise UserError(f"{path.parent} has no split {split!r}; it has {_names(path.parent.iterdir())}")
    if (path / "state.json").is_file():
        names = _saved_files(read_json_object(path / "state.json", remedy="save the dataset again"))
        if not names or not all(isinstance(name, str) and _is_name(name) for name in names):
            raise UserError(f"{path / 'state.json'}: names no data files; save the dataset again")
        return [path / name for name in names]
    if (path / default_file).is_file():
        return [path / default_file]
    parquet = sorted(path.rglob("*.parquet"))
    chosen = [file for file in parquet if file.stem == split or file.stem.startswith(f"{split}-")]
    if not chosen:
        found = f"Parquet files {_names(parquet)}" if parquet else _names(path.iterdir())
        raise UserError(
            f"{path} holds neither {default_file} nor {split}.parquet nor {split}-*.parquet (found: {found}); "
            "set the source's path to the file or folder, and its split to the one in the files' names"
        )
    return chosen


def _is_name(name: str) -> bool:
    return stays_inside(name) and Path(name).name == name and len(name) < 256


def _saved_files(state: dict[str, Any]) -> list[Any]:
    files = state.get("_data_files")
    entries = files if isinstance(files, list) else []
    return [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]


def _names(paths: Iterable[Path]) -> str:
    names = sorted({path.name for path in paths})
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def _values(file: Path) -> Iterator[tuple[str, Any]]:
    readers = {".json": _json_values, ".jsonl": _jsonl_values, ".parquet": _parquet_values, ".arrow": _arrow_values}
    if file.suffix not in readers:
        raise UserError(f"{file}: a source's file must end in .json, .jsonl or .parquet")
    if not is_file(file):
        raise UserError(f"{file} is missing; download or save the dataset again")
    yield from readers[file.suffix](file)


def _json_values(file: Path) -> Iterator[tuple[str, Any]]:
    values = read_json(file, remedy=_REMEDY)
    if not isinstance(values, list):
        raise UserError(f"{file}: must hold a JSON array of records, found {type(values).__name__}")
    for number, value in enumerate(values):
        yield f"[{number}]", value


def _jsonl_values(file: Path) -> Iterator[tuple[str, Any]]:
    for number, value in json_lines(file, remedy=_REMEDY):
        yield f":{number}", value


def _parquet_values(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            yield from _numbered(table.iter_batches(batch_size=BATCH_ROWS))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({error!s:.200}); download the file again") from error


def _arrow_values(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
            yield from _numbered(part for batch in batches for part in _slices(batch))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as Arrow ({error!s:.200}); save the dataset again") from error


def _slices(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS)


def _numbered(batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        # Offsets and texts are taken as the file has them: unchecked they may point outside of memory.
        batch.validate(full=True)
        for value in batch.to_pylist():
            yield f"[{number}]", value
            number += 1
