"""What a reader yields: a row with its place, or the reason why a record is no part of the source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mirage.data.row import Row

MAX_PROBLEMS = 5
# pydantic words all problems or none, which for a million of them takes a minute and a gigabyte.
_MAX_LISTED = 10_000


@dataclass(frozen=True)
class SourcedRow:
    """A row, the folder its image paths start from, and where it was read."""

    row: Row
    root: Path
    location: str
    source: str = "train"
    weight: float = 1.0
    line: int | None = None
    """Its line in the file, from 1, where it can be read again by that."""

    @property
    def image_paths(self) -> list[Path]:
        """Absolute paths of the row's images, in order."""
        return [self.root / image.path for image in self.row.images]


@dataclass(frozen=True)
class Passed:
    """A sound record that the source leaves out by its own rule, such as an unsafe answer; no mistake."""

    location: str
    reason: str
    row_id: str = ""


def explain(error: ValidationError) -> str:
    """A pydantic error as one line: field, what is wrong, what was found; of many problems the first few."""
    if error.error_count() > _MAX_LISTED:
        return f"{error.error_count():,} problems; it has another form altogether"
    problems = []
    for item in error.errors(include_url=False)[:MAX_PROBLEMS]:
        place = f"{'.'.join(str(part) for part in item['loc']) or 'row':.120}"
        message = item["msg"].removeprefix("Value error, ")
        found = "" if item["type"] in ("value_error", "missing") else f", found {str(item['input'])[:80]!r}"
        problems.append(f"{place}: {message}{found}")
    num_more = error.error_count() - len(problems)
    return "; ".join(problems) + (f"; and {num_more} more" if num_more else "")
