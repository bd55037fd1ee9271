"""Columns side by side: the first is the reference, and every other one has its paired change against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mirage.config.schema import SelectConfig
from mirage.evals.metrics import Paired, Rate, TaskResult, compare_events
from mirage.evals.statistics.levels import ALPHA
from mirage.evals.statistics.multiplicity import finish_comparison
from mirage.evals.statistics.pooled import Pooled
from mirage.report.roles import Better, Role, better_of, headline, meaning_of, role_of
from mirage.report.run_folder import Evaluation, Run

Outcome = Literal["better", "worse", "changed", "within noise", "not comparable", "invalid"]
SYMBOLS: dict[Outcome, str] = {
    "better": "▲", "worse": "▼", "changed": "◆", "within noise": "≈", "not comparable": "–", "invalid": "✕",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One evaluation in the tables, with its changes against the first column's."""

    run: Run
    evaluation: Evaluation
    label: str
    changes: Mapping[tuple[str, str], Paired] = field(default_factory=dict)
    pooled: Mapping[str, Pooled] = field(default_factory=dict)
    warning: str = ""
    """Why this column and the reference are not of a kind, if they are not."""


@dataclass(frozen=True)
class Cell:
    """One rate in one column."""

    rate: Rate | None
    valid: bool
    num_unscored: int
    paired: Paired | None
    outcome: Outcome | None
    """None in the reference's column."""


@dataclass(frozen=True)
class Line:
    """One rate over all columns."""

    task: str
    metric: str
    role: Role
    better: Better
    meaning: str
    is_headline: bool
    cells: tuple[Cell, ...]


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """One run: its first and last evaluation. Several: the last of each; the first one is the reference."""
    if len(runs) == 1:
        run = runs[0]
        chosen = [run.first, run.last] if len(run.evaluations) > 1 else [run.last]
        pairs = [(run, evaluation, evaluation.label) for evaluation in chosen]
    else:
        pairs = [(run, run.last, f"{run.name}, {run.last.label}") for run in runs]
    reference = Column(*pairs[0])
    return [reference, *(_compared(Column(*pair), reference) for pair in pairs[1:])]


def _compared(column: Column, reference: Column) -> Column:
    """The column with its paired tests: those that it recorded, where they are against this very reference."""
    results, first = column.evaluation.results, reference.evaluation.results
    if results.baseline is not None and results.baseline.fingerprint == first.fingerprint:
        tasks, pooled = results.tasks, results.pooled
    else:
        tasks, pooled = paired_tests(column.evaluation, reference.evaluation, general=_general_patterns(column.run))
    changes = {(task, name): paired for task, result in tasks.items() for name, paired in result.comparison.items()}
    return Column(
        column.run, column.evaluation, column.label, changes, pooled, _mismatch(column.evaluation, reference.evaluation)
    )


def paired_tests(
    now: Evaluation, before: Evaluation, *, general: Sequence[str]
) -> tuple[dict[str, TaskResult], dict[str, Pooled]]:
    """The tests of `mirage evaluate baseline=...`, made from two evaluations' recorded verdicts.

    Samples are paired by task, id and question, so that models with different prompts can be compared. Rates over a
    part of the samples (both of a pair right) have no test here: which samples they count is not in the records.
    """
    found = {}
    for task, result in now.results.tasks.items():
        other = before.results.tasks.get(task)
        names = [] if other is None else [name for name in result.rates if _counts_all(result, other, name)]
        rows, old = _by_sample(now, task), _by_sample(before, task)
        comparison = compare_events(
            {key: row["events"] for key, row in rows.items()},
            {key: row["events"] for key, row in old.items()},
            metrics=names,
            clusters={key: str(row.get("cluster") or key) for key, row in rows.items()},
        )
        kept = {name: paired for name, paired in comparison.items() if paired.num_pairs}
        found[task] = result.model_copy(update={"comparison": kept})
    return finish_comparison(found, general=general)


def _by_sample(evaluation: Evaluation, task: str) -> dict[str, dict[str, Any]]:
    return {f"{row['id']}\n{row['question']}": row for row in evaluation.samples if row["task"] == task}


def _counts_all(result: TaskResult, other: TaskResult, name: str) -> bool:
    return name in other.rates and all(
        item.rates[name].n == item.num_samples - item.num_unscored for item in (result, other)
    )


def _general_patterns(run: Run) -> Sequence[str]:
    return select_patterns(run, "general")


def select_patterns(run: Run, axis: Role) -> tuple[str, ...]:
    """The recipe's `task:metric` patterns of an axis (eval.select), or the defaults."""
    recorded = run.recipe.get("eval", {}).get("select", {}) if isinstance(run.recipe.get("eval"), dict) else {}
    patterns = recorded.get(axis) if isinstance(recorded, dict) else None
    if isinstance(patterns, list) and all(isinstance(item, str) and item.count(":") == 1 for item in patterns):
        return tuple(patterns)
    return tuple(getattr(SelectConfig(), axis))


def _mismatch(one: Evaluation, reference: Evaluation) -> str:
    results, first = one.results, reference.results
    found = []
    if (results.judge.name, results.judge.version) != (first.judge.name, first.judge.version):
        found.append(
            f"scored by judge {results.judge.name}-v{results.judge.version}, the reference by "
            f"{first.judge.name}-v{first.judge.version}"
        )
    if results.data_sha256 != first.data_sha256:
        found.append("measured on other data or tasks than the reference")
    if results.max_samples != first.max_samples:
        found.append(f"eval.max_samples is {results.max_samples}, the reference's {first.max_samples}")
    return "; ".join(found)


def lines_of(columns: Sequence[Column]) -> list[Line]:
    """Every rate that any column has, by role, then in the tasks' order."""
    tasks: dict[str, TaskResult] = {}
    for column in reversed(columns):
        tasks |= {name: column.evaluation.results.tasks[name] for name in column.evaluation.results.tasks}
    order = [name for column in columns for name in column.evaluation.results.tasks]
    found = []
    for task in dict.fromkeys(order):
        head = headline(task, tasks[task])
        for metric in tasks[task].rates:
            found.append(
                Line(
                    task=task,
                    metric=metric,
                    role=role_of(task, tasks[task]),
                    better=better_of(task, metric),
                    meaning=meaning_of(task, metric),
                    is_headline=metric == head,
                    cells=tuple(_cell(column, columns[0], task, metric) for column in columns),
                )
            )
    roles: list[Role] = ["safety", "over_refusal", "general"]
    return sorted(found, key=lambda line: roles.index(line.role))


def _cell(column: Column, reference: Column, task: str, metric: str) -> Cell:
    result = column.evaluation.results.tasks.get(task)
    rate = result.rates.get(metric) if result is not None else None
    if result is None or rate is None:
        return Cell(None, True, 0, None, None if column is reference else "not comparable")
    if column is reference:
        return Cell(rate, result.valid, result.num_unscored, None, None)
    first = reference.evaluation.results.tasks.get(task)
    paired = column.changes.get((task, metric))
    valid = result.valid and (first is None or first.valid)
    outcome = outcome_of(paired, better=better_of(task, metric), valid=valid)
    return Cell(rate, result.valid, result.num_unscored, paired, outcome)


def outcome_of(paired: Paired | Pooled | None, *, better: Better, valid: bool = True) -> Outcome:
    """A change in one word.

    It counts as one only where the 95% interval of the change leaves out 0 and the corrected McNemar test says so too;
    everything else is within noise, whatever the two percentages look like.
    """
    if not valid:
        return "invalid"
    if paired is None or not paired.num_pairs or paired.delta_points is None:
        return "not comparable"
    low, high = paired.delta_low, paired.delta_high
    covers_zero = low is None or high is None or low <= 0 <= high
    if covers_zero or p_value_of(paired) >= ALPHA or paired.delta_points == 0:
        return "within noise"
    if better == "neither":
        return "changed"
    return "better" if (paired.delta_points < 0) == (better == "lower") else "worse"


def p_value_of(paired: Paired | Pooled) -> float:
    """Corrected for the number of rates where it could be."""
    return paired.p_value if paired.adjusted_p_value is None else paired.adjusted_p_value
