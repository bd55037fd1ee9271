"""The report's summary in words, by fixed rules from the numbers: what was trained, what changed, what is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mirage.report.comparison import Cell, Column, Line, Outcome, outcome_of, p_value_of
from mirage.report.roles import ROLES
from mirage.report.run_folder import Run
from mirage.tracking.mirror import is_finite

Kind = Literal["better", "worse", "changed", "noise", "warning", "plain"]
_KINDS: dict[Outcome, Kind] = {
    "better": "better", "worse": "worse", "changed": "changed", "within noise": "noise",
    "not comparable": "plain", "invalid": "warning",
}  # fmt: skip
# Beside its headline rate a risky task has the rate of answers that see nothing, which must not pass unseen.
_ALSO = ("hr",)


@dataclass(frozen=True)
class Sentence:
    """One line of the summary. `kind` says how it is marked."""

    text: str
    kind: Kind = "plain"


@dataclass(frozen=True)
class Paragraph:
    """Some lines under a title."""

    title: str
    sentences: Sequence[Sentence]


def what_was_trained(run: Run) -> str:
    """The run in one sentence, from its recipe and summary; what they do not say is left out."""
    recipe = run.recipe
    if not recipe:
        return f"{run.name}: an evaluation of {run.last.results.checkpoint}, without a recipe."
    model, data = _part(recipe, "model"), _part(recipe, "data")
    lora = model.get("lora")
    parts = model.get("train")
    how = "LoRA adapters on" if lora else "all weights of"
    where = " and ".join(map(str, parts)) if isinstance(parts, list) and parts else "the model"
    text = f"{run.name}: recipe {recipe.get('name', '?')} trains {how} {where} of {model.get('path', '?')}"
    steps, rows, seen = (run.summary.get(key) for key in ("steps", "data/rows", "data/samples_seen"))
    last = run.last.results.step
    if steps or last:
        text += f" for {steps or last:,} steps"
    if rows:
        text += f" on {rows:,} rows of {data.get('dir', '?')}"
        sources = _sources(run)
        text += f" ({', '.join(f'{name} {count:,}' for name, count in sources)})" if sources else ""
    epochs = run.training[-1].get("train/epoch") if run.training else None
    if seen and isinstance(epochs, float):
        text += f"; {seen:,} samples seen, {epochs:.3g} epochs"
    return f"{text}."


def _sources(run: Run) -> list[tuple[str, int]]:
    found = []
    for key, value in run.summary.items():
        parts = key.split("/")
        if len(parts) == 3 and parts[0] == "data" and parts[2] == "rows" and isinstance(value, int):
            found.append((parts[1], value))
    return found


def _part(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    value = recipe.get(name)
    return value if isinstance(value, dict) else {}


def summarise(columns: Sequence[Column], lines: Sequence[Line]) -> list[Paragraph]:
    """What changed against the first column, then all that stands between the reader and trusting it."""
    found: list[Paragraph] = []
    if len(columns) == 1:
        found.append(Paragraph(f"One evaluation, {columns[0].label}: nothing can be said of a change", _levels(lines)))
    for number, column in enumerate(columns[1:], start=1):
        title = f"{column.label} against {columns[0].label}"
        found.append(Paragraph(title, [*_changes(number, lines), *_pooled(column)]))
    doubts = [doubt for column in columns for doubt in _doubts(column)]
    runs = {column.run.name: column.run for column in columns}
    doubts += [doubt for run in runs.values() for doubt in _training_doubts(run)]
    if doubts:
        found.append(Paragraph("To know before you quote a figure", doubts))
    return found


def _levels(lines: Sequence[Line]) -> list[Sentence]:
    return [
        Sentence(f"{ROLES[line.role]}: {line.task} {line.metric} {_level(line.cells[0])}.")
        for line in lines
        if line.is_headline
    ]


def _level(cell: Cell) -> str:
    rate = cell.rate
    if rate is None or rate.percent is None:
        return "was not measured"
    return f"is {rate.percent:.1f}% [{rate.ci_low:.1f}, {rate.ci_high:.1f}] of {rate.n}"


def _changes(number: int, lines: Sequence[Line]) -> list[Sentence]:
    """The headline rates of one column: first what changed, by task, then what is noise and what has no test."""
    shown = [line for line in lines if line.is_headline or line.metric in _ALSO]
    groups: dict[tuple[str, Outcome], list[str]] = {}
    for line in shown:
        outcome = line.cells[number].outcome
        if outcome in ("better", "worse", "changed"):
            groups.setdefault((f"{_name(line)} {_verb(line, number)}", outcome), []).append(_change(line, number))
    found = [Sentence(f"{what}: {'; '.join(items)}.", _KINDS[outcome]) for (what, outcome), items in groups.items()]
    for role, title in ROLES.items():
        noise = [line for line in shown if line.role == role and line.cells[number].outcome == "within noise"]
        if noise:
            items = "; ".join(_noise(line, number) for line in noise)
            found.append(Sentence(f"{title}, within noise: {items}.", "noise"))
    whys: tuple[tuple[Outcome, str], ...] = (
        ("invalid", "Invalid on one side, too many answers without a verdict"),
        ("not comparable", "No paired test, because both sides do not share judged samples"),
    )
    for outcome, why in whys:
        names = list(dict.fromkeys(line.task for line in shown if line.cells[number].outcome == outcome))
        if names:
            found.append(Sentence(f"{why}: {', '.join(names)}.", _KINDS[outcome]))
    return found


def _pooled(column: Column) -> list[Sentence]:
    found = []
    for name, pooled in column.pooled.items():
        outcome = outcome_of(pooled, better="higher")
        verb = "fell" if pooled.delta_points < 0 else "rose"
        verdict = "within noise" if outcome == "within noise" else verb
        found.append(
            Sentence(
                f"{name}, mean of {len(pooled.rates)} rates, {verdict}: {change_text(pooled)}, "
                f"{p_text(p_value_of(pooled))}.",
                _KINDS[outcome],
            )
        )
    return found


def _name(line: Line) -> str:
    """'Attack success' where the rate's meaning begins with a name, else the rate itself."""
    name, colon, _ = line.meaning.partition(":")
    return f"{name[:1].upper()}{name[1:]} ({line.metric})" if colon else line.metric.capitalize()


def _verb(line: Line, number: int) -> str:
    paired = line.cells[number].paired
    return "fell" if paired is not None and (paired.delta_points or 0) < 0 else "rose"


def _change(line: Line, number: int) -> str:
    paired = line.cells[number].paired
    assert paired is not None and paired.delta_points is not None and paired.baseline_percent is not None
    now = paired.baseline_percent + paired.delta_points
    return (
        f"{line.task} {paired.baseline_percent:.1f}% → {now:.1f}% ({change_text(paired)}, {p_text(p_value_of(paired))})"
    )


def _noise(line: Line, number: int) -> str:
    paired = line.cells[number].paired
    assert paired is not None
    least = "" if paired.detectable_points is None else f" (found from {paired.detectable_points:.1f} on)"
    return f"{line.task} {line.metric} {change_text(paired)}{least}"


def change_text(paired: Any) -> str:
    """'-82.1 points [-89.9, -67.8]'."""
    if paired.delta_points is None:
        return "no pairs"
    interval = "" if paired.delta_low is None else f" [{paired.delta_low:+.1f}, {paired.delta_high:+.1f}]"
    return f"{paired.delta_points:+.1f} points{interval}"


def p_text(p_value: float) -> str:
    """'p 0.012' or 'p <0.001'."""
    return "p <0.001" if p_value < 0.001 else f"p {p_value:.3f}"


def _doubts(column: Column) -> list[Sentence]:
    """Invalid tasks, unscored and cut answers, alarms: never left out of the summary."""
    results, found = column.evaluation.results, list[Sentence]()
    if column.warning:
        found.append(Sentence(f"{column.label}: {column.warning}.", "warning"))
    for task, result in results.tasks.items():
        if not result.valid:
            found.append(Sentence(f"{column.label}: {task} is invalid, {result.invalid_reason}.", "warning"))
        elif result.num_unscored:
            found.append(
                Sentence(
                    f"{column.label}: {task} has {result.num_unscored:,} unscored of {result.num_samples:,} answers; "
                    "the table's bounds count them all one way and the other."
                )
            )
        if result.num_truncated:
            found.append(
                Sentence(
                    f"{column.label}: {result.num_truncated:,} of {result.num_samples:,} answers of {task} were cut at "
                    f"{results.decoding.max_new_tokens} tokens."
                )
            )
    found += [Sentence(f"{column.label}, guard: {alarm.message}.", "warning") for alarm in column.evaluation.alarms]
    return found


def _training_doubts(run: Run) -> list[Sentence]:
    """Logged steps whose loss is no number."""
    broken = [record["step"] for record in run.training if not is_finite(record.get("train/loss", 0.0))]
    if not broken:
        return []
    text = f"{run.name}: the loss of {len(broken):,} logged steps is no finite number, first at step {broken[0]:,}."
    return [Sentence(text, "warning")]


def judge_notices(columns: Sequence[Column]) -> list[str]:
    """Who scored, and what that means; each judge once."""
    judges = [column.evaluation.results.judge for column in columns]
    return list(dict.fromkeys(f"Judge {judge.name}-v{judge.version}. {judge.notice}" for judge in judges))
