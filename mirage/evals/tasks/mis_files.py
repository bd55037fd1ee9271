"""The published MIS_Test layout: mis_easy.json, mis_hard.json, mis_real.json beside their image folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mirage.data.row import ImagePart, Message, TextPart
from mirage.errors import UserError
from mirage.evals.categories import canonical_category
from mirage.evals.task import Sample
from mirage.safe_paths import is_file, printable, stays_inside
from mirage.strict_json import read_json

IMAGE_MARK = "<image>"


class _Record(BaseModel):
    """One record as published (Hugging Face Tuwhy/MIS_Test); `id` is missing from the card's feature list."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)

    id: str | None = None
    question: str
    category: str
    sub_category: str
    image_path1: str
    image_path2: str


def find_file(data_dir: Path, split: str) -> Path | None:
    """`mis_<split>.json` in the folder or in its `mis_test/`, or None."""
    candidates = (data_dir / f"mis_{split}.json", data_dir / "mis_test" / f"mis_{split}.json")
    return next((path for path in candidates if path.is_file()), None)


def load_file(path: Path) -> list[Sample]:
    """The samples of one published file. Raises `UserError` naming the file and the record for anything unreadable."""
    samples: dict[str, Sample] = {}
    for index, raw in enumerate(_read_records(path)):
        sample = _sample(raw, index=index, path=path)
        if sample.id in samples:
            raise UserError(f"{path}: record {index}: id {sample.id!r} occurs twice; ids must differ")
        samples[sample.id] = sample
    if not samples:
        raise UserError(f"{path}: the list is empty; download the file again")
    return list(samples.values())


def _read_records(path: Path) -> list[Any]:
    records = read_json(path, remedy="download the file again")
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a JSON list of records, found {type(records).__name__}")
    return records


def _sample(raw: Any, *, index: int, path: Path) -> Sample:
    try:
        record = _Record.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "record"
        raise UserError(f"{path}: record {index}: {key}: {first['msg']}") from error
    where = f"{path}: record {index}" + (f" (id {record.id})" if record.id is not None else "")
    images = tuple(
        _image_path(value, key=key, where=where, folder=path.parent)
        for key, value in (("image_path1", record.image_path1), ("image_path2", record.image_path2))
    )
    identity = record.id if record.id is not None else str(index)
    return Sample(
        id=identity,
        messages=(Message(role="user", content=_content(record.question, where=where)),),
        image_paths=images,
        category=canonical_category(record.category),
        sub_category=canonical_category(record.sub_category),
        cluster=identity,
        concepts=(None, None),
        image_sha256=(None, None),
        decision="refuse",
    )


def _content(question: str, *, where: str) -> tuple[TextPart | ImagePart, ...]:
    """Two images, then the question unchanged (upstream evaluation/inference_vllm.py), unless it places them itself."""
    pieces = question.split(IMAGE_MARK)
    if len(pieces) == 1:
        if not question.strip():
            raise UserError(f"{where}: question is empty")
        return ImagePart(index=0), ImagePart(index=1), TextPart(text=question)
    if len(pieces) != 3:
        raise UserError(f"{where}: question holds {len(pieces) - 1} {IMAGE_MARK} marks and the record has 2 images")
    parts = (TextPart(text=pieces[0]), ImagePart(index=0), TextPart(text=pieces[1]), ImagePart(index=1),
             TextPart(text=pieces[2]))  # fmt: skip
    return tuple(part for part in parts if isinstance(part, ImagePart) or part.text)


def _image_path(value: str, *, key: str, where: str, folder: Path) -> Path:
    if not stays_inside(value):
        raise UserError(f"{where}: {key} {value!r:.200} must be a relative path inside {folder}")
    path = folder / value
    if not is_file(path):
        raise UserError(f"{where}: {key}: no file {printable(path)}; unpack the image archives beside {folder.name}/")
    return path
