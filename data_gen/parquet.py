"""The Hugging Face export: Parquet files with pictures inside, which need nothing of the folder they were made from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_gen.stages.export import SPLITS
from data_gen.stages.licences import check_licences
from mirage.config.yaml_tree import YamlError, parse_plain_yaml
from mirage.data.readers.rows import ROW_COLUMN, read_rows
from mirage.data.row import ImagePart, Message, Row, dump_row
from mirage.errors import UserError
from mirage.files import file_sha256, sync, write_atomic

VERSION = "1"
SHARD_BYTES = 400_000_000  # about what the hub recommends for a file (500 MB)
ROWS_PER_GROUP = 100  # rows that a reader has in memory at a time
CARD_FILE = "README.md"


@dataclass(frozen=True)
class ParquetExport:
    """What was written: rows by split, and files with their sha256, relative to the folder."""

    counts: dict[str, int]
    files: dict[str, str]


def export_parquet(folder: Path, out: Path, *, shard_bytes: int = SHARD_BYTES) -> ParquetExport:
    """Write a dataset folder as `out/data/<split>-00000-of-00001.parquet` with a card that names the splits.

    `datasets.load_dataset(out)` and a source with `format: rows_parquet` read it, also after `folder` is gone: pictures
    are stored as bytes (`datasets` itself would store paths and nothing else). The column `row` holds each row whole;
    the others are for programs that do not know it. Same rows, same bytes, under the same pyarrow. Raises `UserError`
    for a row or picture without licence, a picture that is not the row's, or an `out` that is there already.
    """
    rows = list(read_rows(folder))
    if not rows:
        raise UserError(f"{folder} holds no rows; there is nothing to export")
    check_licences(rows, where=str(folder))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; remove it or name another folder")
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "data").mkdir(parents=True)
    counts = {split: _write_split(folder, rows, split, aside, shard_bytes) for split in SPLITS}
    counts = {split: count for split, count in counts.items() if count}
    write_atomic(aside / CARD_FILE, _card(folder, rows, list(counts)))
    files = {
        path.relative_to(aside).as_posix(): file_sha256(path) for path in sorted(aside.rglob("*")) if path.is_file()
    }
    if out.exists():
        out.rmdir()
    aside.rename(out)
    sync(out.parent)
    return ParquetExport(counts=counts, files=files)


def features() -> Any:
    """The columns, as `datasets.Features`."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    return Features(
        {
            "id": text,
            "category": text,
            "sub_category": text,
            "images": List(Image()),
            "messages": List({"role": text, "content": List({"type": text, "text": text})}),
            "decision": text,
            "risk_in": text,
            "risk": text,
            "twin_of": text,
            "licence": text,
            "attributions": List(text),
            ROW_COLUMN: text,
        }
    )


def _write_split(folder: Path, rows: Sequence[Row], split: str, aside: Path, shard_bytes: int) -> int:
    chosen = [row for row in rows if row.split == split]
    shards = _shards(folder, chosen, shard_bytes)
    for number, shard in enumerate(shards):
        _write_shard(folder, shard, aside / "data" / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
    return len(chosen)


def _shards(folder: Path, rows: Sequence[Row], shard_bytes: int) -> list[list[Row]]:
    """Rows in order, cut where their pictures would pass `shard_bytes`."""
    shards: list[list[Row]] = []
    size = 0
    for row in rows:
        num_bytes = sum(_path(folder, row, index).stat().st_size for index in range(len(row.images)))
        if not shards or size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += num_bytes
    return shards


def _path(folder: Path, row: Row, index: int) -> Path:
    path = folder / row.images[index].path
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: row {row.id}: image {path} is missing or lies outside; write the dataset again")
    return path


def _write_shard(folder: Path, rows: Sequence[Row], target: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features().arrow_schema
    with pq.ParquetWriter(target, schema) as writer:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            records = [_record(folder, row) for row in rows[start : start + ROWS_PER_GROUP]]
            writer.write_table(pa.Table.from_pylist(records, schema=schema))
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _record(folder: Path, row: Row) -> dict[str, Any]:
    # Pictures in the order of their marks, which is how chat programs match the two.
    label = row.label
    return {
        "id": row.id,
        "category": row.category,
        "sub_category": row.sub_category,
        "images": [_stored_picture(folder, row, index) for index in row.mark_order],
        "messages": [_message(message) for message in row.messages],
        "decision": label.decision if label else None,
        "risk_in": label.risk_in if label else None,
        "risk": label.risk if label else None,
        "twin_of": row.twin_of,
        "licence": row.licence,
        "attributions": [row.images[index].attribution for index in row.mark_order],
        ROW_COLUMN: dump_row(row),
    }


def _stored_picture(folder: Path, row: Row, index: int) -> dict[str, Any]:
    path = _path(folder, row, index)
    if file_sha256(path) != row.images[index].sha256:
        raise UserError(f"{folder}: row {row.id}: image {path} is not the one that its row says; write it again")
    return {"bytes": path.read_bytes(), "path": path.name}


def _message(message: Message) -> dict[str, Any]:
    parts = [
        {"type": "image", "text": None} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.content
    ]
    return {"role": message.role, "content": parts}


def _card(folder: Path, rows: Sequence[Row], splits: Sequence[str]) -> str:
    """The dataset's own card, its header extended by the splits' files; a short one where there is none."""
    path = folder / CARD_FILE
    header, body = _split_card(path.read_text(encoding="utf-8")) if path.is_file() else ({}, "")
    licences = sorted({row.licence for row in rows})
    header.setdefault("license", licences[0].lower() if len(licences) == 1 else "other")
    header["configs"] = [
        {
            "config_name": "default",
            "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
        }
    ]
    body = body or f"# Rows of a MIRage dataset\n\nLicences: {', '.join(licences)}.\n"
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n{body}"


def _split_card(text: str) -> tuple[dict[str, Any], str]:
    if not text.startswith("---\n") or "\n---\n" not in text[4:]:
        return {}, text
    header, _, body = text[4:].partition("\n---\n")
    try:
        loaded = parse_plain_yaml(header)
    except YamlError as error:
        raise UserError(f"{CARD_FILE}: its header is {error}; mend the card, or remove it") from None
    return (dict(loaded) if isinstance(loaded, dict) else {}), body
