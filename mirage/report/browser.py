"""The samples as the page's browser wants them: every text once, answers of several evaluations beside one another.

The data is plain lists, so that ten thousand samples are read in a moment:

- `strings`: every question, reason and name, once; other lists refer to them by number.
- `answers`: every answer once, a text, or [part, text, part, text, ...] with the number of its part in `segments`.
- `sets`: the evaluations whose answers are there.
- `samples`: [task, id, category, sub-category, question, pictures, tags, cells], numbers of `strings` but for pictures
  (null where the page has no room for them; null in the list for one that is gone) and cells.
- a cell, one a set: null, or [answer, verdict, reason, 1 where it was cut].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mirage.evals.answer_parts import SEGMENTS, answer_parts
from mirage.pages.document import json_text
from mirage.report.pictures import Thumbnails
from mirage.report.run_folder import Evaluation, Run

MAX_SAMPLES = 12_000
MAX_SETS = 8
# Evaluations and samples to try, until the answers fit.
_TRIES = ((MAX_SETS, MAX_SAMPLES), (2, MAX_SAMPLES), (2, 6_000), (2, 3_000), (2, 1_000), (2, 200))
_PICTURES = 5
Pair = tuple[Run, Evaluation]
Rows = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Shown:
    """The browser's data and what it leaves out."""

    data: dict[str, Any]
    thumbnails: Thumbnails
    num_samples: int
    """Of all evaluations together."""
    num_shown: int
    num_pictured: int
    """Shown samples that have pictures and have them on the page."""
    num_with_pictures: int
    """Shown samples that have pictures."""
    skipped_sets: tuple[str, ...]


@dataclass
class _Table:
    """Values by number, each once."""

    values: list[Any] = field(default_factory=list)
    _numbers: dict[Any, int] = field(default_factory=dict)

    def __contains__(self, key: Any) -> bool:
        return key in self._numbers

    def add(self, key: Any, value: Any = None) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(key if value is None else value)
        return self._numbers[key]


def answer_sets(runs: Sequence[Run], most: int = MAX_SETS) -> tuple[list[Pair], list[str]]:
    """At most so many evaluations to show, the reference first, and the names of those left out.

    Of one run the first and the last and as many between as there is room for, evenly; of several the last of each,
    then their first ones.
    """
    if len(runs) == 1:
        every = [(runs[0], item) for item in runs[0].evaluations]
        places = list(range(len(every)))
        if len(every) > most:
            places = sorted({round(number * (len(every) - 1) / (most - 1)) for number in range(most)})
        chosen = [every[place] for place in places]
    else:
        every = [(run, run.last) for run in runs] + [(run, run.first) for run in runs if len(run.evaluations) > 1]
        chosen = every[: max(most, len(runs))]
    left_out = [set_name(pair, runs) for pair in every if all(pair[1] is not other[1] for other in chosen)]
    return chosen, left_out


def set_name(pair: Pair, runs: Sequence[Run]) -> str:
    """How an evaluation is called on the page."""
    run, evaluation = pair
    return evaluation.label if len(runs) == 1 else f"{run.name}, {evaluation.label}"


def browse(runs: Sequence[Run], *, limit_bytes: int) -> Shown:
    """The browser's data and pictures, in about so many bytes.

    Answers may take three quarters of them, pictures what is left. Where answers take more, evaluations between the
    first and the last are left out, then samples, evenly.
    """
    for most_sets, most_samples in _TRIES:
        sets, skipped = answer_sets(runs, most_sets)
        rows = [{(row["task"], row["id"]): row for row in evaluation.samples} for _, evaluation in sets]
        keys = list(dict.fromkeys(key for found in rows for key in found))
        num_samples = len(keys)
        shown = min(num_samples, most_samples)
        keys = [keys[number * num_samples // shown] for number in range(shown)]
        data = _data(rows, keys) | {"sets": [set_name(pair, runs) for pair in sets]}
        num_bytes = len(json_text(data))
        if num_bytes <= 0.75 * limit_bytes:
            break
    thumbnails = Thumbnails(limit_bytes=max(0, limit_bytes - num_bytes))
    num_pictured, num_with = _add_pictures(data["samples"], rows, keys, thumbnails)
    return Shown(data, thumbnails, num_samples, shown, num_pictured, num_with, tuple(skipped))


def _data(rows: Sequence[Rows], keys: Sequence[tuple[str, str]]) -> dict[str, Any]:
    strings, answers, samples = _Table(), _Table(), []
    for key in keys:
        row = _any_row(rows, key)
        named = [strings.add(row[name]) for name in ("task", "id", "category", "sub_category", "question")]
        cells = [_cell(found.get(key), strings, answers) for found in rows]
        samples.append([*named, None, strings.add(_tags(row)), cells])
    return {"segments": list(SEGMENTS), "strings": strings.values, "answers": answers.values, "samples": samples}


def _add_pictures(
    samples: list[list[Any]], rows: Sequence[Rows], keys: Sequence[tuple[str, str]], thumbnails: Thumbnails
) -> tuple[int, int]:
    """How many samples have a picture on the page, and how many have any. The tasks take turns."""
    places = {key: number for number, key in enumerate(keys)}
    num_pictured = num_with = 0
    for key in _spread(keys):
        paths = _any_row(rows, key)["image_paths"]
        shown = thumbnails.add(paths)
        samples[places[key]][_PICTURES] = shown
        num_with += bool(paths)
        num_pictured += any(number is not None for number in shown or ())
    return num_pictured, num_with


def _any_row(rows: Sequence[Rows], key: tuple[str, str]) -> dict[str, Any]:
    return next(found[key] for found in rows if key in found)


def _spread(keys: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The tasks in turn, so that each has pictures where there is no room for all."""
    by_task: dict[str, list[tuple[str, str]]] = {}
    for key in keys:
        by_task.setdefault(key[0], []).append(key)
    longest = max((len(found) for found in by_task.values()), default=0)
    return [found[place] for place in range(longest) for found in by_task.values() if place < len(found)]


def _tags(row: dict[str, Any]) -> str:
    tags = row.get("tags")
    return ", ".join(f"{name} {value}" for name, value in sorted(tags.items())) if isinstance(tags, dict) else ""


def _cell(row: dict[str, Any] | None, strings: _Table, answers: _Table) -> list[int] | None:
    if row is None:
        return None
    is_cut = int(row.get("finish") == "length")
    return [_answer(row["answer"], answers), strings.add(row["verdict"]), strings.add(row["reason"]), is_cut]


def _answer(text: str, answers: _Table) -> int:
    if text in answers:
        return answers.add(text)
    parts = answer_parts(text)
    flat = [item for kind, part in parts for item in (SEGMENTS.index(kind) if kind else -1, part)]
    return answers.add(text, text if len(parts) == 1 and parts[0][0] is None else flat)
