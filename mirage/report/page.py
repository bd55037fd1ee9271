"""The report as one HTML file: everything that was collected, put into the template and the shared document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mirage.errors import UserError
from mirage.evals.answer_parts import answer_parts
from mirage.evals.before_after import find_pairs
from mirage.evals.results import Results
from mirage.files import write_atomic
from mirage.pages.document import page
from mirage.pages.templates import page_template
from mirage.report.browser import Shown, browse
from mirage.report.cards import Facts, data_card, environment_card, recipe_card, recipe_differences
from mirage.report.comparison import SYMBOLS, Column, Line, columns_of, lines_of, p_value_of
from mirage.report.figures import evaluation_charts, pareto_charts, training_charts
from mirage.report.heat import heat_maps
from mirage.report.roles import ROLES
from mirage.report.run_folder import Run, read_runs
from mirage.report.words import Paragraph, judge_notices, p_text, summarise, what_was_trained

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
MAX_MB = 20
_ARROWS = {"lower": "↓", "higher": "↑", "neither": ""}
_KINDS = {"better": "▲ better", "worse": "▼ worse", "changed": "◆ changed", "noise": "≈", "warning": "⚠", "plain": "·"}
_SECTIONS = (
    ("summary", "Summary"), ("numbers", "Numbers"), ("trade-off", "What safety costs"), ("categories", "By category"),
    ("curves", "Curves"), ("examples", "Examples"), ("samples", "Samples"), ("data-card", "Data"), ("recipe", "Recipe"),
    ("environment", "Environment"),
)  # fmt: skip


@dataclass(frozen=True)
class Written:
    """What was written, and its summary for the terminal."""

    path: Path
    num_bytes: int
    coverage: str
    trained: tuple[str, ...]
    paragraphs: tuple[Paragraph, ...]
    results: tuple[Results, ...]
    """Of the columns."""


@dataclass(frozen=True)
class _Cards:
    data: Facts
    recipe: Facts
    environment: Facts


def write_report(folders: Sequence[Path], out: Path | None = None, *, max_mb: float = MAX_MB) -> Written:
    """Write the report of one run, or of several side by side, and return what it says.

    `out` is `report.html` in the run's folder, or `comparison.html` in that of the first of several. The file is at
    most about `max_mb` megabytes: what has no room (pictures first) is left out, and the page says so. Raises
    `UserError` for folders without evaluations and for damaged files; the old file then stays.
    """
    runs = read_runs(folders)
    target = out or runs[0].folder / (REPORT_FILE if len(runs) == 1 else COMPARISON_FILE)
    if not target.parent.is_dir():
        raise UserError(f"out={target}: there is no folder {target.parent}; make it first")
    if target.is_dir():
        raise UserError(f"out={target} is a folder; name a file, such as {target / REPORT_FILE}")
    columns = columns_of(runs)
    lines = lines_of(columns)
    shown = browse(runs, limit_bytes=int(max_mb * 1e6))
    paragraphs, trained = tuple(summarise(columns, lines)), tuple(what_was_trained(run) for run in runs)
    coverage = coverage_text(shown, max_mb=max_mb, runs=runs)
    body = _body(runs, columns, lines, shown, paragraphs=paragraphs, trained=trained, coverage=coverage)
    title = ", ".join(run.name for run in runs)
    right = min(len(shown.data["sets"]) - 1, 1 if len(runs) > 1 else len(shown.data["sets"]) - 1)
    data = {"samples-data": shown.data | {"default_right": right}, "pictures-data": shown.thumbnails.uris}
    text = page(f"{title}: MIRage report", body, style=_own("report.css"), script=_own("report.js"), data=data)
    write_atomic(target, text)
    results = tuple(column.evaluation.results for column in columns)
    return Written(target, len(text.encode()), coverage, trained, paragraphs, results)


def coverage_text(shown: Shown, *, max_mb: float, runs: Sequence[Run]) -> str:
    """What of the samples, their pictures and the evaluations is in the file, in words."""
    text = (
        f"All {shown.num_samples:,} samples are here"
        if shown.num_shown == shown.num_samples
        else f"{shown.num_shown:,} of {shown.num_samples:,} samples are here, taken evenly"
    )
    if shown.num_with_pictures:
        missing = shown.num_with_pictures - shown.num_pictured
        text += f", {shown.num_pictured:,} with" if missing else ", with"
        text += " small copies of their pictures"
        text += f" and {missing:,} without" if missing else ""
    text += f" (the file's limit is {max_mb:g} MB)."
    if shown.thumbnails.num_missing:
        text += f" {shown.thumbnails.num_missing:,} picture files were missing or unreadable."
    if shown.skipped_sets:
        text += f" Left out for size: {', '.join(shown.skipped_sets)}."
    for run in runs:
        if run.num_passed_over:
            num_read = len(run.evaluations)
            text += f" {num_read:,} of the {num_read + run.num_passed_over:,} evaluations of {run.name} are here, "
            text += "taken evenly, with the first and the last."
    return text


def _body(
    runs: Sequence[Run],
    columns: Sequence[Column],
    lines: Sequence[Line],
    shown: Shown,
    *,
    paragraphs: Sequence[Paragraph],
    trained: Sequence[str],
    coverage: str,
) -> Markup:
    parts: dict[str, Any] = {
        "pareto": pareto_charts(runs),
        "heat": heat_maps(columns),
        "training": training_charts(runs),
        "over_steps": evaluation_charts(runs),
        "examples": _examples(columns, shown),
    }
    there = {"trade-off": parts["pareto"], "categories": parts["heat"], "examples": parts["examples"]}
    there["curves"] = parts["training"] or parts["over_steps"]
    text = _template().render(
        **parts,
        title=", ".join(run.name for run in runs) if len(runs) == 1 else f"{len(runs)} runs side by side",
        sections=[section for section in _SECTIONS if there.get(section[0], True)],
        trained=trained,
        paragraphs=paragraphs,
        kinds=_KINDS,
        notices=judge_notices(columns),
        columns=columns,
        roles=_by_role(lines),
        every_line=lines,
        averages=_averages(columns),
        symbols=SYMBOLS,
        arrows=_ARROWS,
        coverage=coverage,
        cards=[(run.name, _Cards(data_card(run), recipe_card(run), environment_card(run))) for run in runs],
        cards_named=len(runs) > 1,
        differences=recipe_differences(runs) if len(runs) > 1 else [],
        run_names=[run.name for run in runs],
        one=_one,
        signed=lambda value: f"{value:+.1f}",
        span=lambda low, high: "–" if low is None else f"{low:.1f} to {high:.1f}",
        p_text=p_text,
        p_value=p_value_of,
    )
    return Markup(text)


def _one(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _by_role(lines: Sequence[Line]) -> list[tuple[str, list[tuple[str, list[Line]]]]]:
    found = []
    for role, title in ROLES.items():
        tasks: dict[str, list[Line]] = {}
        for line in lines:
            if line.role == role:
                tasks.setdefault(line.task, []).append(line)
        if tasks:
            found.append((title, list(tasks.items())))
    return found


def _averages(columns: Sequence[Column]) -> list[tuple[str, list[float | None]]]:
    names = {
        (task, name): None
        for column in columns
        for task, result in column.evaluation.results.tasks.items()
        for name in result.averages
    }
    found = []
    for task, name in names:
        results = [column.evaluation.results.tasks.get(task) for column in columns]
        values = [result.averages.get(name) if result is not None and result.valid else None for result in results]
        found.append((f"{task} {name}", values))
    return found


def _examples(columns: Sequence[Column], shown: Shown) -> list[dict[str, Any]]:
    """A risky and a harmless request with the answers of the first two columns."""
    if len(columns) < 2:
        return []
    strings = shown.data["strings"]
    places = {(strings[sample[0]], strings[sample[1]]): number for number, sample in enumerate(shown.data["samples"])}
    pairs = find_pairs(columns[0].evaluation.samples, columns[1].evaluation.samples)
    return [
        {
            "what": pair.what,
            "sample": places.get((pair.after["task"], pair.after["id"]), -1),
            "question": pair.after["question"],
            "sides": [
                {
                    "title": column.label,
                    "verdict": row["verdict"],
                    "reason": row["reason"],
                    "parts": answer_parts(row["answer"]),
                }
                for column, row in zip(columns, (pair.before, pair.after))
            ],
        }
        for pair in pairs
    ]


@cache
def _template() -> jinja2.Template:
    return page_template(_own("report.html.jinja"), trim=True)


@cache
def _own(name: str) -> str:
    return (resources.files("mirage.report") / name).read_text("utf-8")
