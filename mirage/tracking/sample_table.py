"""A wandb table of samples: pictures side by side, the answer with its parts coloured; small enough for slow links."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mirage.data.picture_files import open_picture
from mirage.errors import UserError
from mirage.pages.document import shared

TEXT_COLUMNS = ("id", "task", "question", "answer", "verdict", "reason", "category", "changed")
PARTS_COLUMN = "answer_parts"
MAX_PNG_BYTES = 48 * 1024
"""A larger picture is sent as JPEG: photographs are a tenth of their PNG."""
_JPEG_QUALITY = 80
# Dark text on the light grounds of the report, so that it can be read whatever the page around it is.
_COLOURS = dict(re.findall(r"--(\w+): (#\w+)", shared("style.css").partition("@media")[0]))
_PLAIN = "#eeeeee"


@dataclass(frozen=True)
class SampleTable:
    """The table and what was left out of it."""

    table: Any
    num_rows: int
    num_pictures: int
    num_pictures_left_out: int
    """Because they cannot be read, or would go beyond the table's bytes."""
    num_bytes: int


def sample_table(rows: Sequence[Mapping[str, Any]], *, picture_pixels: int, max_bytes: int) -> SampleTable:
    """A `wandb.Table` of rows with the keys of SAMPLE_KEYS, and `parts` (see `parts_html`) where it is known.

    A picture's longest edge is at most `picture_pixels`; once the pictures reach `max_bytes` later ones are left out.
    """
    import wandb

    width = max((len(row["image_paths"]) for row in rows), default=0)
    has_parts = any(row.get("parts") for row in rows)
    columns = ["id", "task", *(f"picture_{number + 1}" for number in range(width)), "question", "answer"]
    columns += [PARTS_COLUMN] if has_parts else []
    table = wandb.Table(columns=[*columns, *TEXT_COLUMNS[4:]])
    num_bytes = shown = left_out = 0
    for row in rows:
        texts = [None if row[column] is None else str(row[column]) for column in TEXT_COLUMNS]
        pictures: list[Any] = []
        for path in row["image_paths"]:
            picture, size = _picture(Path(path), pixels=picture_pixels, room=max_bytes - num_bytes)
            pictures.append(picture)
            num_bytes += size
            shown += picture is not None
            left_out += picture is None
        pictures += [None] * (width - len(pictures))
        parts = [wandb.Html(parts_html(row.get("parts") or []), inject=False)] if has_parts else []
        table.add_data(*texts[:2], *pictures, *texts[2:4], *parts, *texts[4:])
    return SampleTable(table, len(rows), shown, left_out, num_bytes)


def parts_html(parts: Sequence[tuple[str | None, str]]) -> str:
    """An answer as a piece of HTML that needs nothing else: each part on its own ground, its name in words too.

    `parts` are (perceive, relate, risk, reply or None, text). All text is escaped.
    """
    pieces = []
    for name, text in parts:
        colour = _COLOURS.get(name or "", _PLAIN)
        label = f"<b>{escape(name)}</b> " if name else ""
        pieces.append(
            f'<span title="{escape(name or "answer")}" style="background:{colour};color:#111;padding:1px 3px">'
            f"{label}{escape(text)}</span>"
        )
    style = "font:14px/1.5 sans-serif;background:#fff;color:#111;white-space:pre-wrap;overflow-wrap:anywhere"
    return f'<meta charset="utf-8"><div style="{style}">{" ".join(pieces)}</div>'


def _picture(path: Path, *, pixels: int, room: int) -> tuple[Any, int]:
    """The picture and its bytes; (None, 0) where it cannot be read or has no room: the text still counts."""
    import wandb

    try:
        small = open_picture(path)
    except UserError:
        return None, 0
    small.thumbnail((pixels, pixels))
    kind, size = "png", _num_bytes(small, "PNG")
    if size > MAX_PNG_BYTES:
        kind, size = "jpg", _num_bytes(small, "JPEG", quality=_JPEG_QUALITY)
    if size > room:
        return None, 0
    return wandb.Image(small, file_type=kind), size


def _num_bytes(image: Any, kind: str, **options: Any) -> int:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.tell()
