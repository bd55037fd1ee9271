"""Tables of one picture, one question and one answer: SPA-VL, BeaverTails-V, and any other by its column names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mirage.config.schema import ColumnsConfig
from mirage.data.readers.build import build_pair
from mirage.data.readers.entry import Passed, SourcedRow
from mirage.data.readers.images import image_list
from mirage.data.readers.records import Record, field_names
from mirage.errors import UserError

SAFE_WORDS, UNSAFE_WORDS = ("yes", "true", "safe", "1"), ("no", "false", "unsafe", "0")


def read_spa_vl(record: Record) -> Iterator[SourcedRow]:
    """SPA-VL, Parquet or the JSON of its training code: the chosen answer is learnt, the rejected one is not used."""
    yield build_pair(
        record,
        record.text("question"),
        record.text("chosen"),
        _one_image(record),
        category=str(record.value.get("class1") or "General"),
        sub_category=str(record.value.get("class2") or ""),
    )


def read_beavertails_v(record: Record) -> Iterator[SourcedRow | Passed]:
    """BeaverTails-V: answers that are marked safe. Its unsafe answers exist to be told apart, never to be learnt."""
    marked = record.value.get("is_response_safe")
    word = str(marked).strip().lower()
    if word not in SAFE_WORDS + UNSAFE_WORDS:
        raise UserError(f"{record.location}: 'is_response_safe' must be yes or no, found {marked!r:.40}")
    if word in UNSAFE_WORDS:
        yield Passed(record.location, "its answer is marked unsafe")
        return
    yield build_pair(
        record,
        record.text("question"),
        record.text("response"),
        _one_image(record),
        category=str(record.value.get("category") or "General"),
    )


def read_table(record: Record, columns: ColumnsConfig) -> Iterator[SourcedRow]:
    """A record of a table whose columns the source names; reasoning in a column of its own goes before the answer."""
    answer = record.text(columns.answer)
    if columns.thought is not None:
        answer = f"{record.text(columns.thought).strip()}\n\n{answer}"
    category = record.text(columns.category) if columns.category is not None else "General"
    if columns.image is not None and columns.image not in record.value:
        raise UserError(
            f"{record.location}: has no {columns.image!r}; its fields are {field_names(record.value)}; set "
            "columns.image to the pictures' column, or to null for a table of text"
        )
    images = image_list(record, columns.image) if columns.image is not None else []
    yield build_pair(record, record.text(columns.question), answer, images, category=category)


def _one_image(record: Record) -> list[Any]:
    images = image_list(record, "image")
    if len(images) != 1:
        raise UserError(f"{record.location}: must have one 'image', found {len(images)}")
    return images
