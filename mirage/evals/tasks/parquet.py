"""Hugging Face Parquet files on this machine: found by split, checked for missing shards, read row by row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirage.errors import UserError
from mirage.evals.tasks.embedded import KeptPicture, keep_picture

_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.parquet$")
_BATCH_ROWS = 16


def find_files(folder: Path, *, split: str, subfolder: str = "") -> list[Path]:
    """The Parquet files of a split, in order: `<split>-00000-of-00003.parquet`, `<split>.parquet`, `<split>/*.parquet`.

    They lie in `folder/<subfolder>` or in a `data` folder there; an empty list without any. Raises `UserError` naming
    the shards that are missing.
    """
    base = folder / subfolder if subfolder else folder
    for place in (base, base / "data"):
        found = sorted(place.glob(f"{split}-*.parquet")) or sorted(place.glob(f"{split}.parquet"))
        found = found or sorted((place / split).glob("*.parquet"))
        if found:
            _check_shards(found)
            return found
    return []


def _check_shards(files: list[Path]) -> None:
    shards = [match for match in (_SHARD.match(path.name) for path in files) if match]
    totals = {int(match["total"]) for match in shards}
    if len(totals) > 1:
        raise UserError(f"{files[0].parent}: shards of different downloads lie together; keep one set of them")
    if not totals:
        return
    total, numbers = totals.pop(), {int(match["number"]) for match in shards}
    missing = [f"{shards[0]['stem']}-{n:05d}-of-{total:05d}.parquet" for n in range(total) if n not in numbers]
    if missing:
        raise UserError(f"{files[0].parent}: {len(missing)} of {total} shards are missing: {', '.join(missing[:3])}")


def read_records(path: Path, *, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of one file as dictionaries, a few at a time. Raises `UserError` for a missing column or a bad file."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                found = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: no column {', '.join(missing)}; it has: {found}")
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                batch.validate(full=True)
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error)[:120]}); download it again") from error


def picture_of(value: Any, *, where: str) -> KeptPicture | None:
    """A picture as `datasets` stores it (`{"bytes": ..., "path": ...}`), or raw bytes; None where there is none."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if value is None:
        return None
    if not isinstance(content, bytes) or not content:
        raise UserError(f"{where}: the picture's bytes are not in the file; download the Parquet form that holds them")
    return keep_picture(content, where=where)
