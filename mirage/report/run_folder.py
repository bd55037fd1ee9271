"""Reads a run folder for a report: evaluations, training metrics, recipe, summary; one clear error where it cannot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mirage.errors import UserError
from mirage.evals.guards import Alarm, read_alarms
from mirage.evals.results import RESULTS_FILE, Results, read_results, read_samples
from mirage.strict_json import read_json_object
from mirage.tracking.mirror import MIRROR_NAME, read_metrics
from mirage.tracking.redact import redact
from mirage.tracking.run import SUMMARY_NAME

# Of one run: more points than a curve shows, and 100 MB of results.
MAX_EVALUATIONS = 300
# What the report reads of each line of samples.jsonl.
_SAMPLE_TEXT = ("task", "id", "question", "answer", "verdict", "reason", "category", "sub_category")


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint's evaluation. Its answers are read when they are asked for, and kept."""

    folder: Path
    results: Results
    alarms: tuple[Alarm, ...]

    @property
    def label(self) -> str:
        """'step 200', or the checkpoint's name where it has no step."""
        return self.results.checkpoint if self.results.step is None else f"step {self.results.step:,}"

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of samples.jsonl. Raises `UserError` where the file is missing or damaged."""
        rows = read_samples(self.folder)
        for number, row in enumerate(rows, start=1):
            wrong = _wrong_field(row)
            if wrong:
                raise UserError(f"{self.folder / 'samples.jsonl'}: line {number} {wrong}; run the evaluation again")
        return rows


@dataclass(frozen=True)
class Run:
    """What one folder recorded. Recipe and summary have their secrets hidden."""

    name: str
    folder: Path
    evaluations: tuple[Evaluation, ...]
    recipe: dict[str, Any]
    summary: dict[str, Any]
    training: tuple[dict[str, Any], ...]
    """Records of the train axis, by step."""
    num_passed_over: int = 0
    """Evaluations between the first and the last that were not read, as there are too many for a page."""

    @property
    def first(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, in order, each with a name that no other one has.

    A folder is a run's, or that of one evaluation (it has results.json). Raises `UserError` for a folder that is none,
    holds no evaluation, is given twice, or has a damaged file.
    """
    if not folders:
        raise UserError("name at least one run folder")
    resolved = [folder.expanduser().resolve() for folder in folders]
    twice = next((folder for number, folder in enumerate(resolved) if folder in resolved[:number]), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice")
    return [_read_run(folder, name) for folder, name in zip(resolved, short_names(resolved), strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' paths below the deepest one that holds them all."""
    if len(folders) == 1:
        return [folders[0].name or str(folders[0])]
    above = Path(os.path.commonpath(folders))
    return [folder.relative_to(above).as_posix() if folder != above else folder.name for folder in folders]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the run_dir of a run")
    alone = (folder / RESULTS_FILE).is_file()
    places = [folder] if alone else sorted(path.parent for path in (folder / "evals").glob(f"step-*/{RESULTS_FILE}"))
    if not places:
        raise UserError(
            f"{folder} holds no evaluations (evals/step-*/{RESULTS_FILE}); evaluate one: mirage evaluate {folder}"
        )
    read = _evenly(places)
    evaluations = [Evaluation(place, read_results(place), tuple(read_alarms(place))) for place in read]
    evaluations.sort(key=lambda item: -1 if item.results.step is None else item.results.step)
    records = read_metrics(folder / MIRROR_NAME)
    training = sorted((record for record in records if record["axis"] == "train"), key=lambda record: record["step"])
    return Run(
        name=name,
        folder=folder,
        evaluations=tuple(evaluations),
        recipe=redact(read_object(folder / "recipe.json")),
        summary=redact(read_object(folder / SUMMARY_NAME)),
        training=tuple(training),
        num_passed_over=len(places) - len(read),
    )


def _evenly(places: Sequence[Path]) -> list[Path]:
    """At most `MAX_EVALUATIONS` of the folders, the first and the last among them, by the step in their names."""
    ordered = sorted(places, key=lambda place: (len(place.name), place.name))
    if len(ordered) <= MAX_EVALUATIONS:
        return ordered
    last = len(ordered) - 1
    return [ordered[number * last // (MAX_EVALUATIONS - 1)] for number in range(MAX_EVALUATIONS)]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file. Raises `UserError` for anything else."""
    return read_json_object(path, remedy="restore it from a copy, or delete it") if path.is_file() else {}


def _wrong_field(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "is no JSON object"
    for name in _SAMPLE_TEXT:
        if not isinstance(row.get(name), str):
            return f"has no text {name!r}"
    paths = row.get("image_paths")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return "has no list 'image_paths'"
    if not (row.get("events") is None or isinstance(row["events"], list)):
        return "has no list 'events'"
    return None
