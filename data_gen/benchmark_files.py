"""Benchmark files as records of texts and pictures: MIS_Test, dataset folders, VLMEvalKit TSV, JSON, JSONL, Parquet."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mirage.data.picture_files import open_picture
from mirage.data.row import ImageRef
from mirage.data.sources import ROWS_FILE, read_rows
from mirage.errors import UserError
from mirage.evals.tasks.mis_files import find_file, load_file
from mirage.safe_paths import is_file, open_regular, printable, stays_inside
from mirage.strict_json import JsonError, parse_literal, read_json, read_json_lines

MIS_SPLITS = ("easy", "hard", "real")
_REMEDY = "download the file again"
FILE_SUFFIXES = (".tsv", ".csv", ".json", ".jsonl", ".parquet")
MAX_REFERENCE_CHARS = 64  # VLMEvalKit: a shorter `image` cell is the index of the row that holds the picture
SEED_DECIDES = ("drawn", "packaged")  # kinds of pictures that generator and seed decide to the pixel

_QUESTION = re.compile(r"^(?!system)(.*[ _-])?(question|query|prompt|instruction|request)s?(\s*\(.*\))?$")
_IMAGE = re.compile(r"^(image|img|picture)s?[_-]?(list|data|bytes)?_?\d*$")
_IMAGE_PATH = re.compile(r"^(image|img|picture)s?[_-]?(path|file|filename|name)s?_?\d*$")
_TURNS = ("conversations", "messages")
_IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)


@dataclass(frozen=True)
class BenchmarkImage:
    """A picture of a benchmark: a file, or its content; and what drew it, where that is known."""

    source: Path | bytes
    where: str
    drawing: str | None = None

    def open(self) -> Image.Image:
        """The decoded RGB picture. Raises UserError naming the record."""
        try:
            if isinstance(self.source, Path):
                return open_picture(self.source)
            return open_picture(None, content=self.source)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class BenchmarkRecord:
    """One record. Several texts are several prompts about the same pictures (MM-SafetyBench, VLGuard)."""

    id: str
    file: str
    texts: tuple[str, ...]
    images: tuple[BenchmarkImage, ...] = ()
    concepts: tuple[str, ...] = ()
    """What the pictures show, one word or phrase each; empty unless known of every picture."""


def drawing_identity(image: ImageRef) -> str | None:
    """Art and layout of a drawn picture (generator and seed decide both), or None for other kinds."""
    if image.source.kind not in SEED_DECIDES or image.source.seed is None:
        return None
    return f"{image.source.generator}#{image.source.seed}"


def benchmark_files(path: Path) -> tuple[Path, ...]:
    """The files of records at `path`: itself, `rows.jsonl`, or the published MIS files. Raises UserError for none."""
    if path.is_file() and path.suffix.lower() in FILE_SUFFIXES:
        return (path,)
    if path.is_dir():
        if (path / ROWS_FILE).is_file():
            return (path / ROWS_FILE,)
        found = tuple(file for split in MIS_SPLITS if (file := find_file(path, split)))
        if found:
            return found
    if not path.exists():
        raise UserError(f"no benchmark at {path}; name a file or a folder that exists")
    raise UserError(
        f"{path} is no benchmark that can be read: name a dataset folder (rows.jsonl), a MIS_Test folder "
        f"(mis_easy.json ...), or a file ending in {', '.join(FILE_SUFFIXES)}"
    )


def content_sha256(path: Path) -> bytes:
    """sha256 over the benchmark's files of records."""
    digest = hashlib.sha256()
    for file in benchmark_files(path):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.digest()


def read_benchmark(
    path: Path, *, image_root: Path | None = None, texts_only: bool = False
) -> Iterator[BenchmarkRecord]:
    """The records of a benchmark in file order; of a dataset folder those of the test splits.

    `image_root` is where a file's image paths start (default: beside the file); with `texts_only` pictures are left
    out. Raises UserError naming file and record for anything that cannot be read: nothing is passed over in silence.
    """
    for file in benchmark_files(path):
        if file.name == ROWS_FILE:
            records: Iterable[BenchmarkRecord] = _dataset_records(file.parent)
        elif path.is_dir():
            records = _mis_records(file)
        else:
            records = _table_records(file, image_root or file.parent, texts_only=texts_only)
        for record in records:
            if texts_only:
                record = BenchmarkRecord(record.id, record.file, record.texts, concepts=record.concepts)
            yield record


def _dataset_records(folder: Path) -> Iterator[BenchmarkRecord]:
    for row in read_rows(folder):
        if row.split.startswith("train"):
            continue
        images = tuple(
            BenchmarkImage(folder / image.path, f"{folder / ROWS_FILE}: row {row.id}", drawing_identity(image))
            for image in row.images
        )
        names = [image.concept for image in row.images]
        concepts = tuple(name for name in names if name) if all(names) else ()
        yield BenchmarkRecord(row.id, ROWS_FILE, (row.question,), images, concepts)


def _mis_records(file: Path) -> Iterator[BenchmarkRecord]:
    for sample in load_file(file):
        images = tuple(BenchmarkImage(path, f"{file}: id {sample.id}") for path in sample.image_paths)
        yield BenchmarkRecord(sample.id, file.name, (sample.question,), images)


def _table_records(file: Path, root: Path, *, texts_only: bool) -> Iterator[BenchmarkRecord]:
    reader = _RecordReader(file=file, root=root, texts_only=texts_only)
    count = 0
    for number, raw in enumerate(_raw_records(file)):
        count += 1
        yield reader.record(raw, number)
    if not count:
        raise UserError(f"{file}: holds no records; download the file again")


def _raw_records(file: Path) -> Iterator[Any]:
    suffix = file.suffix.lower()
    try:
        if suffix in (".tsv", ".csv"):
            yield from _delimited(file, delimiter="\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            yield from _parquet(file)
        elif suffix == ".jsonl":
            yield from (value for _, value in read_json_lines(file, remedy=_REMEDY))
        else:
            content = read_json(file, remedy=_REMEDY)
            if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
                content = [{"id": key, **value} for key, value in content.items()]
            if not isinstance(content, list):
                raise UserError(f"{file}: expected a JSON list of records, found {type(content).__name__}")
            yield from content
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({error}); {_REMEDY}") from error


def _delimited(file: Path, *, delimiter: str) -> Iterator[dict[str, str]]:
    before = csv.field_size_limit(sys.maxsize)  # a cell holds a whole picture in base64
    try:
        with io.TextIOWrapper(open_regular(file), encoding="utf-8-sig", newline="") as stream:
            yield from csv.DictReader(stream, delimiter=delimiter)
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=64):
            batch.validate(full=True)
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {_REMEDY}") from error


class _RecordReader:
    """Finds texts and pictures in records whose field names differ from benchmark to benchmark."""

    def __init__(self, *, file: Path, root: Path, texts_only: bool) -> None:
        self.file, self.root, self.texts_only = file, root, texts_only
        self._by_index: dict[str, tuple[BenchmarkImage, ...]] = {}

    def record(self, raw: Any, number: int) -> BenchmarkRecord:
        where = f"{self.file}: record {number}"
        if not isinstance(raw, dict):
            raise UserError(f"{where}: expected an object with fields, found {type(raw).__name__}")
        identity = str(
            next((raw[key] for key in ("index", "id", "question_id") if raw.get(key) not in (None, "")), number)
        )
        texts = tuple(dict.fromkeys(text for text in _texts(raw) if text.strip()))
        if not texts and isinstance(raw.get("text"), str):
            texts = (raw["text"],)
        if not texts:
            keys = ", ".join(sorted(map(str, raw))[:8])
            raise UserError(f"{where}: no question, query, prompt, instruction or conversation in it (fields: {keys})")
        images = () if self.texts_only else self._images(raw, f"{where} (id {identity})")
        self._by_index[identity] = images
        names = raw.get("concepts")
        concepts = tuple(map(str, names)) if isinstance(names, list) and len(names) == len(images) else ()
        return BenchmarkRecord(identity, self.file.name, texts, images, concepts)

    def _images(self, raw: dict[Any, Any], where: str) -> tuple[BenchmarkImage, ...]:
        for pattern in (_IMAGE, _IMAGE_PATH):
            fields = [raw[key] for key in raw if isinstance(key, str) and pattern.match(key.lower())]
            found = [image for value in fields for image in self._values(value, where)]
            if found:
                return tuple(found)
        return ()

    def _values(self, value: Any, where: str) -> Iterator[BenchmarkImage]:
        if value is None or value == "" or value != value:  # a missing cell, or NaN
            return
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            try:
                value = parse_literal(value)
            except JsonError as error:
                raise UserError(f"{where}: its list of pictures cannot be read; restore the file") from error
        if isinstance(value, list):
            for item in value:
                yield from self._values(item, where)
        elif isinstance(value, dict):
            if value.get("bytes"):
                yield BenchmarkImage(bytes(value["bytes"]), where)
            else:
                yield from self._values(value.get("path"), where)
        elif isinstance(value, bytes):
            yield BenchmarkImage(value, where)
        else:
            yield from self._from_text(str(value), where)

    def _from_text(self, value: str, where: str) -> Iterator[BenchmarkImage]:
        if len(value) <= MAX_REFERENCE_CHARS and value in self._by_index:
            yield from self._by_index[value]
        elif re.match(r"https?:", value):
            raise UserError(f"{where}: its picture is an address ({value[:60]}); download the pictures and name files")
        elif _IMAGE_SUFFIX.search(value):
            yield BenchmarkImage(self._inside(value, where), where)
        else:
            try:
                content = base64.b64decode(re.sub(r"^data:[^,]*,|\s", "", value), validate=True)
            except (binascii.Error, ValueError) as error:
                raise UserError(
                    f"{where}: {value[:40]!r} is neither the path of a picture nor a picture in base64"
                ) from error
            yield BenchmarkImage(content, where)

    def _inside(self, value: str, where: str) -> Path:
        if not stays_inside(value):
            raise UserError(f"{where}: image path {value!r:.200} must be relative and stay inside {self.root}")
        path = self.root / value
        if not is_file(path):
            raise UserError(
                f"{where}: no file {printable(path):.200}; unpack the pictures, or name the folder that paths begin in"
            )
        return path


def _texts(value: Any, key: str = "") -> Iterator[str]:
    """Prompts anywhere in a record: fields named like a question, and the user's turns of a conversation."""
    if isinstance(value, dict):
        for name, item in value.items():
            lowered = str(name).lower()
            if lowered in _TURNS and isinstance(item, list):
                yield from _user_turns(item)
            else:
                yield from _texts(item, lowered)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str) and _QUESTION.match(key):
        yield value


def _user_turns(turns: list[Any]) -> Iterator[str]:
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from", turn.get("role")) not in ("human", "user"):
            continue
        content = turn.get("value", turn.get("content"))
        parts = content if isinstance(content, list) else [content]
        yield "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part or "") for part in parts)
