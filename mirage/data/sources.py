"""Readers: dataset folders, the published MIS_Train layout and LLaVA/ShareGPT JSON become rows with a location."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from mirage.config.schema import DataConfig, SourceConfig
from mirage.data.pictures import picture_size
from mirage.data.row import ImagePart, ImageRef, ImageSource, Message, Part, Row, TextPart, row_id
from mirage.errors import UserError

ROWS_FILE = "rows.jsonl"
IMAGE_MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class SourcedRow:
    """A row, the folder its image paths start from, and where it was read."""

    row: Row
    root: Path
    location: str
    source: str = "train"
    weight: float = 1.0

    @property
    def image_paths(self) -> list[Path]:
        """Absolute paths of the row's images, in order."""
        return [self.root / image.path for image in self.row.images]


@dataclass(frozen=True)
class LeftOut:
    """A row that is not trained on, and why: one line of `ledger.jsonl`."""

    source: str
    location: str
    row_id: str
    reason: str


@dataclass
class Mixture:
    """All rows of a run's sources, in order, and what was left out."""

    rows: list[SourcedRow] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def read_rows(folder: Path, *, splits: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a dataset folder, in file order; only those of `splits` when given.

    Raises `UserError` naming file and line for the first row that cannot be read.
    """
    for row, _ in _rows_with_location(folder, splits):
        yield row


def _rows_with_location(folder: Path, splits: Sequence[str] | None) -> Iterator[tuple[Row, str]]:
    path = folder / ROWS_FILE
    if not path.exists():
        raise UserError(f"{folder} is no dataset folder (no {ROWS_FILE}); write one with: make datagen OUT={folder}")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            location = f"{path}:{number}"
            row = _parse_row(line, location)
            if splits is None or row.split in splits:
                yield row, location


def _parse_row(line: str, location: str) -> Row:
    return _validate_row(_parse_line(line, location), location)


def _parse_line(line: str, location: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        kind = "the line ends too early" if not line.endswith("\n") else error.msg
        raise UserError(f"{location}: not valid JSON ({kind}); restore the line or write the dataset again") from error


def _validate_row(record: Any, location: str) -> Row:
    try:
        return Row.model_validate(record)
    except ValidationError as error:
        raise UserError(f"{location}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """A pydantic error as one line: field, what is wrong, what was found."""
    problems = []
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"]) or "row"
        message = item["msg"].removeprefix("Value error, ")
        found = "" if item["type"] in ("value_error", "missing") else f", found {str(item['input'])[:80]!r}"
        problems.append(f"{place}: {message}{found}")
    return "; ".join(problems)


def load_mixture(config: DataConfig, *, seed: int) -> Mixture:
    """Rows of all sources. Bad rows stop the run, or are listed in `left_out`, as `data.on_bad_row` says."""
    mixture = Mixture()
    for source in config.sources:
        rows = []
        for entry in read_source(source, config.dir):
            problem = _image_problem(entry) if isinstance(entry, SourcedRow) else None
            if isinstance(entry, SourcedRow) and problem is None:
                rows.append(entry)
                continue
            if config.on_bad_row == "error":
                raise problem or entry  # type: ignore[misc]
            left_out = entry if isinstance(entry, SourcedRow) else None
            mixture.left_out.append(
                LeftOut(
                    source=source.split,
                    location=left_out.location if left_out else "",
                    row_id=left_out.row.id if left_out else "",
                    reason=str(problem or entry),
                )
            )
        if not rows:
            raise UserError(f"source {source.split!r} of {source.path or config.dir} holds no rows")
        if source.max_samples is not None and source.max_samples < len(rows):
            chosen = sorted(random.Random(f"{seed}-{source.split}").sample(range(len(rows)), source.max_samples))
            rows = [rows[index] for index in chosen]
        mixture.rows += rows
    check_left_out(mixture.left_out, config.max_left_out)
    return mixture


def check_left_out(left_out: Sequence[LeftOut], limit: int) -> None:
    """Stop when more rows are left out than the recipe allows."""
    if len(left_out) > limit:
        first = left_out[0]
        raise UserError(
            f"{len(left_out)} rows cannot be trained on and data.max_left_out is {limit}. "
            f"The first: {first.location} {first.reason}"
        )


def read_source(source: SourceConfig, default_dir: Path) -> Iterator[SourcedRow | UserError]:
    """Rows of one source; a row that cannot be read comes as the `UserError` it would raise."""
    path = source.path or default_dir
    if source.format == "rows":
        yield from _read_folder(path, source)
    else:
        yield from _read_conversations(path, source)


def _read_folder(folder: Path, source: SourceConfig) -> Iterator[SourcedRow | UserError]:
    path = folder / ROWS_FILE
    if not path.exists():
        raise UserError(
            f"no dataset at {folder} (no {ROWS_FILE}). Write one with: make datagen OUT={folder}, "
            "or set data.dir to a folder that has one"
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            location = f"{path}:{number}"
            try:
                record = _parse_line(line, location)
                # Rows of other splits are not validated: a mixture reads the file once for each of its parts.
                if not isinstance(record, dict) or record.get("split") in (source.split, None):
                    row = _validate_row(record, location)
                    yield SourcedRow(row, folder, location, source.split, source.weight)
            except UserError as error:
                yield error


def _read_conversations(path: Path, source: SourceConfig) -> Iterator[SourcedRow | UserError]:
    """MIS_Train (`mis_train.json`, images beside it) and LLaVA/ShareGPT files: JSON arrays or JSON lines."""
    file = path / "mis_train.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"no {file}; set the source's path to a ShareGPT JSON file or to a folder with mis_train.json")
    for location, record in _records(file):
        try:
            yield _conversation_row(record, file, location, source)
        except UserError as error:
            yield error


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield f"{file}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{file}:{number}: not valid JSON ({error.msg})") from error
        return
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(records, list):
        raise UserError(f"{file}: must hold a JSON array of records, found {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"{file}[{number}]", record


def _conversation_row(record: Any, file: Path, location: str, source: SourceConfig) -> SourcedRow:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise UserError(f"{location}: has no 'conversations' list; a ShareGPT record needs one")
    names = record.get("image", record.get("images", []))
    names = [names] if isinstance(names, str) else list(names or ())
    images = tuple(_image_ref(file.parent, name, location) for name in names)
    messages = conversation_messages(
        record["conversations"], location=location, images_first=source.format == "mis_train"
    )
    try:
        row = Row(
            id=row_id(images, messages, split="train"),
            split="train",
            category=str(record.get("category", "General")),
            sub_category=str(record.get("sub_category", "")),
            images=images,
            messages=messages,
            licence=str(record.get("licence", "as published")),
        )
    except ValidationError as error:
        raise UserError(f"{location}: {explain(error)}") from error
    return SourcedRow(row, file.parent, location, source.split, source.weight)


def conversation_messages(conversations: Sequence[Any], *, location: str, images_first: bool) -> tuple[Message, ...]:
    """ShareGPT turns as messages, `<image>` marks numbered through the conversation.

    With `images_first` (MIS_Train), the marks and line breaks that open a turn become bare images, so that training
    and the MIS test render alike; otherwise the text is kept to the letter, as InternVL's own trainer does.
    """
    messages, count = [], 0
    for turn in conversations:
        role, value = ROLES.get(str(turn.get("from"))), turn.get("value")
        if role is None or not isinstance(value, str):
            raise UserError(
                f"{location}: a turn must have 'from' (human, gpt or system) and a text 'value', found {turn!r:.80}"
            )
        parts: list[Part] = []
        if images_first and role == "user":
            opening = re.match(rf"(?:{IMAGE_MARK}\s*)+", value)
            marks = value[: opening.end()].count(IMAGE_MARK) if opening else 0
            parts += [ImagePart(index=count + number) for number in range(marks)]
            count += marks
            value = value[opening.end() :] if opening else value
        for position, piece in enumerate(value.split(IMAGE_MARK)):
            if position:
                parts.append(ImagePart(index=count))
                count += 1
            if piece:
                parts.append(TextPart(text=piece))
        messages.append(Message(role=role, content=tuple(parts)))  # type: ignore[arg-type]
    return tuple(messages)


def _image_ref(root: Path, name: Any, location: str) -> ImageRef:
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{location}: image path {name!r} must be relative and stay inside {root}")
    path = root / name
    try:
        width, height = picture_size(path)
    except UserError as error:
        raise UserError(f"{location}: {error}") from error
    return ImageRef(
        path=PurePosixPath(name).as_posix(),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        width=width,
        height=height,
        source=ImageSource(kind="user", generator="as published"),
        licence="as published",
        attribution="as published",
    )


def _image_problem(entry: SourcedRow) -> UserError | None:
    """What is wrong with a row's pictures as far as their headers tell, or None."""
    for image, path in zip(entry.row.images, entry.image_paths):
        if not path.resolve().is_relative_to(entry.root.resolve()):
            return UserError(f"{entry.location}: image {image.path} leads outside {entry.root}")
        try:
            size = picture_size(path)
        except UserError as error:
            return UserError(f"{entry.location}: row {entry.row.id}: {error}")
        if size != (image.width, image.height):
            return UserError(
                f"{entry.location}: row {entry.row.id}: image {path} has {size[0]} x {size[1]} pixels, "
                f"the row says {image.width} x {image.height}"
            )
    return None
