"""Samples from a dataset folder (rows.jsonl + images/), for every task that reads one."""

from __future__ import annotations

from pathlib import Path

from mirage.data.row import Row, Split
from mirage.errors import UserError
from mirage.evals.categories import canonical_category
from mirage.evals.task import Card, Sample
from mirage.safe_paths import is_file, leads_outside

ROWS_FILE = "rows.jsonl"
# Tags of a row that samples.jsonl repeats: what is new about it and what it is a sibling of, to break results down by.
# fmt: off
GROUP_TAGS = ("holdout", "structure", "style", "object_pair", "class_pair", "asks_about",
              "sibling_kind", "sibling_of", "twin_of")
# fmt: on
OWN_CARD = Card(size="as the dataset folder has", licence="Apache-2.0", source="`make datagen`; eval.data_dir names it")


def load_split(folder: Path, split: Split, *, task: str) -> list[Sample]:
    """The samples of one split, in file order.

    Raises `UserError` for an unreadable row, a missing image, a repeated id, or a split without rows.
    """
    from mirage.data.sources import read_rows  # loads torch, which a list of tasks does not need

    samples: dict[str, Sample] = {}
    for row in read_rows(folder, splits=(split,)):
        if row.id in samples:
            raise UserError(f"{folder / ROWS_FILE}: row id {row.id!r} occurs twice in split {split!r}; ids must differ")
        samples[row.id] = sample_of_row(row, folder)
    if not samples:
        raise UserError(
            f"{folder / ROWS_FILE} has no rows of split {split!r}, which task {task!r} needs; "
            f"take {task!r} out of eval.tasks or name another eval.data_dir"
        )
    return list(samples.values())


def sample_of_row(row: Row, folder: Path) -> Sample:
    """One row as a sample: what the model is asked, and what its scorer needs."""
    if row.prompt[-1:] == () or row.prompt[-1].role != "user":
        raise UserError(f"{folder / ROWS_FILE}: row {row.id}: the prompt does not end with a user turn")
    paths = tuple(folder / image.path for image in row.images)
    for path in paths:
        if not is_file(path) or leads_outside(path, folder):
            raise UserError(
                f"{folder / ROWS_FILE}: row {row.id}: image {path.relative_to(folder)} is missing or leads outside; "
                "make the dataset again or copy its images/ folder"
            )
    concepts = tuple(image.concept for image in row.images)
    named = sorted(concept for concept in concepts if concept is not None)
    return Sample(
        id=row.id,
        messages=row.prompt,
        image_paths=paths,
        category=canonical_category(row.category),
        sub_category=canonical_category(row.sub_category),
        cluster="|".join(named) if len(named) == len(concepts) and named else row.id,
        concepts=concepts,
        image_sha256=tuple(image.sha256 for image in row.images),
        decision=row.label.decision if row.label else None,
        risk=row.label.risk if row.label else None,
        choice=row.choice,
        meta=dict(row.tags) | ({"twin_of": row.twin_of} if row.twin_of else {}),
    )
