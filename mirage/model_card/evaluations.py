"""The evaluations that a card reports: found by the weights' fingerprint, grouped, as tables and as metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mirage.config.schema import SelectConfig
from mirage.errors import UserError
from mirage.evals.guards import GUARDS_FILE
from mirage.evals.report import results_markdown
from mirage.evals.results import RESULTS_FILE, Results, read_first, read_results
from mirage.evals.statistics.pooled import match_rates
from mirage.files import read_object
from mirage.model_card.text import plain, strip_html

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

GROUPS = ("Safety", "Over-refusal", "General ability", "Other")
_TASK_TYPE = "image-text-to-text"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the exported weights, step 0's to compare with, and what the guards said of it."""

    name: str
    results: Results
    before: Results | None = None
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """Tables of one evaluation by group, and its notes, as Markdown."""

    title: str
    tables: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def find_evaluations(folders: Sequence[Path], *, fingerprint: str) -> tuple[list[Evaluation], list[str]]:
    """Evaluations of these weights, the run's own before those with other settings; and why others cannot be read."""
    found: list[Evaluation] = []
    unreadable: list[str] = []
    for folder in folders:
        try:
            results = read_results(folder)
            if results.fingerprint == fingerprint:
                found.append(Evaluation(folder.name, results, _before(folder, results), _alarms(folder, results)))
        except UserError:
            unreadable.append(f"the evaluation {folder.name} is damaged or of another version, and is left out")
    found.sort(key=lambda item: (not item.name.startswith("step-"), item.name))
    return found, unreadable


def evaluation_folders(source: Path) -> list[Path]:
    """Where evaluations of a checkpoint's `model` folder lie, or of a weights folder."""
    places = [source.parent.parent / "evals", source.parent / f"{source.name}-evals"]
    return sorted(path.parent for place in places for path in place.glob(f"*/{RESULTS_FILE}"))


def sections(evaluations: Sequence[Evaluation], *, select: SelectConfig) -> list[Section]:
    """Each evaluation's tables by group."""
    return [_section(evaluation, select) for evaluation in evaluations]


def headlines(evaluations: Sequence[Evaluation], *, select: SelectConfig) -> list[tuple[str, str]]:
    """By group, the first evaluation's first rate of each task with its interval, and step 0's."""
    if not evaluations:
        return []
    results, before = evaluations[0].results, evaluations[0].before
    groups = group_tasks(results, select)
    return [
        (group, "; ".join(_headline(task, results, before) for task in tasks))
        for group, tasks in groups.items()
        if tasks and group != "Other"
    ]


def _headline(task: str, results: Results, before: Results | None) -> str:
    name, rate = next(iter(results.tasks[task].rates.items()), ("", None))
    if rate is None or rate.percent is None or not results.tasks[task].valid:
        return f"{task} has no valid figure"
    first = before.tasks[task].rates.get(name) if before is not None and task in before.tasks else None
    was = f", {first.percent:.1f}% at step 0" if first is not None and first.percent is not None else ""
    return f"{task} {name} {rate.percent:.1f}% [{rate.ci_low:.1f}, {rate.ci_high:.1f}]{was}"


def group_tasks(results: Results, select: SelectConfig) -> dict[str, list[str]]:
    """Tasks by group: of the recipe's patterns, the first that names a rate of the task decides."""
    patterns = {"Safety": select.safety, "Over-refusal": select.over_refusal, "General ability": select.general}
    named = {group: {task for task, _ in match_rates(results.tasks, found)} for group, found in patterns.items()}
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for task in results.tasks:
        groups[next((group for group in patterns if task in named[group]), "Other")].append(task)
    return groups


def eval_results(evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    """The first evaluation's rates for the hub's metadata, percent; tasks that are void have no number."""
    from huggingface_hub import EvalResult

    found = []
    for evaluation in evaluations[:1]:
        for task, result in evaluation.results.tasks.items():
            for name, rate in result.rates.items():
                if not result.valid or rate.percent is None or rate.ci_low is None or rate.ci_high is None:
                    continue
                found.append(
                    EvalResult(
                        task_type=_TASK_TYPE,
                        dataset_type=task,
                        dataset_name=task,
                        metric_type=name,
                        metric_name=f"{name} (%)",
                        metric_value=round(rate.percent, 2),
                        metric_args={"n": rate.n, "ci95": [round(rate.ci_low, 2), round(rate.ci_high, 2)]},
                    )
                )
    return found


def _section(evaluation: Evaluation, select: SelectConfig) -> Section:
    shown = [evaluation.before, evaluation.results] if evaluation.before is not None else [evaluation.results]
    notes = results_markdown(shown).partition("\n\n")[2].splitlines()
    tables = tuple(
        (group, strip_html(_table(shown, tasks)))
        for group, tasks in group_tasks(evaluation.results, select).items()
        if tasks
    )
    return Section(_title(evaluation), tables, tuple(plain(note.removeprefix("- ")) for note in notes if note))


def _table(shown: Sequence[Results], tasks: Sequence[str]) -> str:
    parts = [
        results.model_copy(update={"tasks": {task: results.tasks[task] for task in tasks if task in results.tasks}})
        for results in shown
    ]
    return results_markdown(parts).partition("\n\n")[0]


def _title(evaluation: Evaluation) -> str:
    results = evaluation.results
    step = f"Step {results.step}" if results.step is not None else results.checkpoint
    engine = getattr(results.decoding, "engine", "transformers")
    size = "all samples" if results.max_samples is None else f"at most {results.max_samples} samples a task"
    return plain(f"{step}, judge {results.judge.name}-v{results.judge.version}, {engine}, {size}")


def _before(folder: Path, results: Results) -> Results | None:
    try:
        return read_first(folder, results)
    except UserError:
        return None


def _alarms(folder: Path, results: Results) -> tuple[str, ...]:
    kept = read_object(folder / GUARDS_FILE)
    if kept.get("request") != results.request:
        return ()
    return tuple(_alarm(alarm) for alarm in kept.get("alarms") or () if isinstance(alarm, Mapping))


def _alarm(alarm: Mapping[str, object]) -> str:
    before, now = alarm.get("baseline_percent"), alarm.get("percent")
    numbers = f" ({before:.1f}% to {now:.1f}%)" if isinstance(before, float) and isinstance(now, float) else ""
    return f"{alarm.get('rate')}{numbers}"
