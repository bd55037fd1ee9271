"""The review page: rows of a dataset folder with their pictures, to accept or reject; and what was decided."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, ValidationError

from data_gen.store import read_manifest
from mirage.data.row import Row
from mirage.data.sources import explain, read_rows
from mirage.errors import UserError
from mirage.files import write_atomic
from mirage.pages.document import page
from mirage.pages.templates import page_template
from mirage.strict_json import read_json_lines

PAGE_FILE = "index.html"
_FILES = ("review.html.jinja", "review.css", "review.js")
MAX_ROWS = 20_000  # about 30 MB of page; more than a person reads in one go


class Decision(BaseModel):
    """One line of a decisions file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    status: Literal["accepted", "rejected", "open"]
    note: str = ""


@dataclass(frozen=True)
class Reviewed:
    """What the decisions say about a dataset's rows, in row order."""

    kept: tuple[Row, ...]
    rejected: tuple[str, ...]
    orphaned: tuple[str, ...]
    """Siblings whose risky row was rejected: they go with it."""


def write_review(folder: Path, target: Path, *, splits: Sequence[str] | None = None, limit: int | None = None) -> int:
    """Write the page for a dataset folder into the folder `target`; returns how many rows it shows.

    `limit` rows are spread evenly over the chosen ones. Pictures stay where they are and are linked.
    """
    manifest = read_manifest(folder)
    rows = list(read_rows(folder, splits=splits))
    if not rows:
        raise UserError(f"{folder} has no rows of {', '.join(splits or ['any split'])}")
    most = min(limit or MAX_ROWS, MAX_ROWS)
    if len(rows) > most:
        rows = [rows[number * len(rows) // most] for number in range(most)]
    target.mkdir(parents=True, exist_ok=True)
    pictures = Path(os.path.relpath(folder.resolve(), target.resolve())).as_posix()
    data = {
        "dataset_sha256": manifest.get("content_sha256", ""),
        "rows": [_entry(row, pictures) for row in rows],
    }
    write_atomic(target / PAGE_FILE, _render(folder.name, data))
    return len(rows)


def _entry(row: Row, pictures: str) -> dict[str, Any]:
    details: dict[str, Any] = {"tags": row.tags, "checks": row.checks, "licence": row.licence}
    details["pictures"] = [{"licence": image.licence, "attribution": image.attribution} for image in row.images]
    if row.label is not None:
        details["label"] = row.label.model_dump(exclude_none=True)
    if row.choice is not None:
        details["choice"] = row.choice.model_dump()
    images = [
        {"src": f"{pictures}/{image.path}", "concept": image.concept, "kind": image.source.kind}
        for image in (row.images[index] for index in row.mark_order)
    ]
    return {
        "id": row.id,
        "split": row.split,
        "category": row.category,
        "sub_category": row.sub_category,
        "decision": row.label.decision if row.label else "",
        "kind": row.twin_kind or "",
        "phrasing": row.tags.get("phrasing", ""),
        "question": row.question,
        "answer": row.answer,
        "segments": row.segments.model_dump() if row.segments else None,
        "images": images,
        "details": details,
    }


def _render(title: str, data: Mapping[str, Any]) -> str:
    own = {name: (resources.files("data_gen.pages") / name).read_text("utf-8") for name in _FILES}
    body = page_template(own["review.html.jinja"]).render(title=title, num_rows=len(data["rows"]))
    return page(
        f"{title}: review",
        Markup(body),
        style=own["review.css"],
        script=own["review.js"],
        data={"data": data},
        linked_pictures=True,
    )


def read_decisions(file: Path) -> dict[str, Decision]:
    """Decisions by row id. Raises UserError naming the line that is wrong or decides a row twice."""
    decisions: dict[str, Decision] = {}
    for number, value in read_json_lines(file, remedy="save the decisions again"):
        try:
            decision = Decision.model_validate(value)
        except ValidationError as error:
            raise UserError(f"{file}:{number}: {explain(error)}") from None
        if decision.id in decisions:
            raise UserError(f"{file}:{number}: row {decision.id:.80} is decided twice")
        decisions[decision.id] = decision
    return decisions


def apply_decisions(rows: Sequence[Row], decisions: Mapping[str, Decision], *, where: str) -> Reviewed:
    """Rows that stay, with the decision among their checks. Raises UserError for decisions about unknown rows."""
    known = {row.id for row in rows}
    unknown = sorted(set(decisions) - known)
    if unknown:
        raise UserError(
            f"{where}: row {unknown[0]} is not in the dataset ({len(unknown)} such); another dataset's file?"
        )
    rejected = {name for name, decision in decisions.items() if decision.status == "rejected"}
    kept, orphaned = [], []
    for row in rows:
        if row.id in rejected:
            continue
        if row.twin_of in rejected:
            orphaned.append(row.id)
            continue
        decision = decisions.get(row.id)
        if decision is not None and decision.status == "accepted":
            note = f"accepted: {decision.note}" if decision.note else "accepted"
            row = row.model_copy(update={"checks": row.checks | {"review": note}})
        kept.append(row)
    return Reviewed(tuple(kept), tuple(row.id for row in rows if row.id in rejected), tuple(orphaned))
