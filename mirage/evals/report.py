"""Evaluations side by side: the table that `mirage evaluate`, a run and the demo end with, on screen or as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from mirage.errors import UserError
from mirage.evals import before_after
from mirage.evals.metrics import Paired, Rate, TaskResult
from mirage.evals.results import RESULTS_FILE, SAMPLES_FILE, Results, read_results, read_samples
from mirage.evals.tasks import find_task

_ARROWS = {"lower": "↓", "higher": "↑", "neither": ""}


@dataclass(frozen=True)
class _Sheet:
    """A table before it is drawn."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def run_results(run_dir: Path) -> list[Results]:
    """All evaluations of a run, by step. Raises `UserError` if there are none."""
    found = [read_results(path) for path in sorted((run_dir / "evals").glob(f"step-*/{RESULTS_FILE}"))]
    if not found:
        raise UserError(
            f"{run_dir} holds no evaluations (evals/step-*/{RESULTS_FILE}); evaluate one: mirage evaluate {run_dir}"
        )
    return sorted(found, key=lambda results: -1 if results.step is None else results.step)


def summary_table(run_dir: Path) -> Table:
    """The run's first and last evaluation side by side, for the terminal."""
    return results_table(_ends(run_results(run_dir)))


def summary_markdown(run_dir: Path) -> str:
    """The run's first and last evaluation side by side, an example with both answers, and where to look next."""
    ends = _ends(run_results(run_dir))
    parts = [results_markdown(ends).rstrip(), "", _examples(run_dir, ends), where_to_look(run_dir)]
    return "\n".join(part for part in parts if part is not None)


def _examples(run_dir: Path, ends: Sequence[Results]) -> str | None:
    """A risky and a harmless request with the answers of the run's first and last model; None with one evaluation."""
    if len(ends) < 2:
        return None
    folders = [run_dir / "evals" / f"step-{results.step:06d}" for results in ends]
    if not all((folder / SAMPLES_FILE).is_file() for folder in folders):
        return None
    pairs = before_after.find_pairs(*map(read_samples, folders))
    return before_after.pairs_markdown(pairs, titles=(_column(ends[0]), _column(ends[-1]))) if pairs else None


def where_to_look(run_dir: Path) -> str:
    """The files of a run that answer the next questions; only those that are there."""
    places = (
        ("report.html", "all of it as one page: tables, curves, every answer with its pictures"),
        ("evals/*/samples.jsonl", "every answer with its verdict, and whether it changed since step 0"),
        ("metrics.jsonl", "every number of every step"),
        ("wandb", f"the dashboard: `wandb leet {run_dir / 'wandb'}`, or `wandb sync` it later"),
        ("export", "the trained model, for plain transformers, peft and vLLM"),
        ("ledger.jsonl", "rows that were not trained on, and why (empty: none)"),
    )
    there = [f"- `{run_dir / place}`: {what}" for place, what in places if next(run_dir.glob(place), None)]
    return "\n".join(["Where to look next:", "", *there]) + "\n"


def _ends(results: Sequence[Results]) -> list[Results]:
    return [results[0], results[-1]] if len(results) > 1 else list(results)


def results_table(results: Sequence[Results]) -> Table:
    """Evaluations side by side, oldest first; differences are the last one's against its own baseline.

    Two evaluations fit into 80 columns: a task's name and n stand on a line above its metrics.
    """
    sheet = _sheet(results)
    table = Table(title="evaluation", caption="\n".join(sheet.notes), box=box.SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding, table.title_justify, table.caption_justify = True, "left", "left"
    table.add_column("%", no_wrap=True)
    for name in sheet.header[3:]:
        table.add_column(name, justify="right", no_wrap=True)
    shown = count = ""
    for task, metric, judged, *cells in sheet.rows:
        if task != shown:
            table.add_row(f"{task} (n {judged})", style="bold")
            shown, count = task, judged
        # Rates over pairs and groups have an n of their own.
        table.add_row(f"  {metric}" if judged == count else f"  {metric} (n {judged})", *cells)
    return table


def results_markdown(results: Sequence[Results]) -> str:
    """As `results_table`, in markdown."""
    sheet = _sheet(results, with_least=True)
    lines = [sheet.header, ["---"] * 2 + ["---:"] * (len(sheet.header) - 2), *sheet.rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(f"- {note}" for note in sheet.notes) + "\n"


def category_markdown(results: Results, task: str) -> str:
    """A task's rates by category and sub-category with n, as markdown."""
    result = results.tasks[task]
    metrics = list(result.rates)
    lines = [["category", "n", *metrics], ["---", "---:", *["---:"] * len(metrics)]]
    groups = {**result.by_category, **{f"　{name}": group for name, group in result.by_sub_category.items()}}
    for name, group in sorted(groups.items(), key=lambda item: item[0].strip("　")):
        lines.append([name, str(group.num_samples), *(_percent(group.rates[metric]) for metric in metrics)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _sheet(results: Sequence[Results], *, with_least: bool = False) -> _Sheet:
    """`with_least` adds the smallest change that each test could have found, for which a terminal has no room."""
    last = results[-1]
    compared = any(result.comparison for result in last.tasks.values())
    header = ["task", "metric, %", "n", *(_column(item) for item in results)]
    header += ["change", "p", *(["detectable"] if with_least else [])] if compared else []
    rows = []
    for task, result in last.tasks.items():
        for name in result.rates:
            cells = [_cell(item.tasks.get(task), name) for item in results]
            row = [task, f"{name}{_arrow(task, name)}", str(result.rates[name].n), *cells]
            paired = result.comparison.get(name)
            changes = [*_change(paired), *([_least(paired)] if with_least else [])]
            rows.append(row + (changes if compared else []))
        for name in result.averages:
            cells = [_average(item.tasks.get(task), name) for item in results]
            judged = str(result.num_samples - result.num_unscored)
            rows.append([task, f"{name} (average)", judged, *cells, *(["-", "-"] if compared else [])])
    return _Sheet(header, rows, _notes(last))


def _column(results: Results) -> str:
    return results.checkpoint if results.step is None else f"step {results.step}"


def _arrow(task: str, metric: str) -> str:
    try:
        known = find_task(task).metrics
    except UserError:  # a task of another version
        known = ()
    better = next((item.better for item in known if item.name == metric), "neither")
    return f" {_ARROWS[better]}".rstrip()


def _cell(result: TaskResult | None, metric: str) -> str:
    """'3.4 [2.0, 5.8]'; with unscored samples the bounds follow, and an invalid task says so."""
    if result is None or metric not in result.rates:
        return "-"
    rate = result.rates[metric]
    if not result.valid:
        return f"invalid ({_bounds(rate)})"
    if rate.percent is None:
        return "-"
    text = f"{rate.percent:.1f} [{rate.ci_low:.1f}, {rate.ci_high:.1f}]"
    return f"{text} ({_bounds(rate)})" if result.num_unscored else text


def _average(result: TaskResult | None, name: str) -> str:
    """An average of rates has no interval here."""
    if result is None or name not in result.averages:
        return "-"
    return f"{result.averages[name]:.1f}" if result.valid else "invalid"


def _bounds(rate: Rate) -> str:
    return "no samples" if rate.bound_low is None else f"{rate.bound_low:.1f} to {rate.bound_high:.1f}"


def _percent(rate: Rate) -> str:
    return "-" if rate.percent is None else f"{rate.percent:.1f}"


def _change(paired: Paired | None) -> list[str]:
    if paired is None or paired.delta_points is None:
        return ["-", "-"]
    p_value = paired.p_value if paired.adjusted_p_value is None else paired.adjusted_p_value
    return [f"{paired.delta_points:+.1f}", "<0.001" if p_value < 0.001 else f"{p_value:.3f}"]


def _least(paired: Paired | None) -> str:
    return "-" if paired is None or paired.detectable_points is None else f"{paired.detectable_points:.1f}"


def _notes(results: Results) -> list[str]:
    notes = [
        "In brackets: Wilson's 95% interval; p: exact McNemar test on the same samples against step 0, corrected for "
        "the number of rates (Benjamini-Hochberg)."
    ]
    for name, pooled in results.pooled.items():
        change, p_value = pooled.delta_points, pooled.adjusted_p_value or pooled.p_value
        notes.append(
            f"{name}, mean of {len(pooled.rates)} rates: {change:+.1f} points [{pooled.delta_low:+.1f}, "
            f"{pooled.delta_high:+.1f}], p {'<0.001' if p_value < 0.001 else f'{p_value:.3f}'}."
        )
    for task, result in results.tasks.items():
        if result.invalid_reason:
            notes.append(f"{task} is invalid: {result.invalid_reason}. ( ) bounds count them all one way or the other.")
    cut = [f"{task} {result.num_truncated}" for task, result in results.tasks.items() if result.num_truncated]
    if cut:
        notes.append(f"Answers cut at {results.decoding.max_new_tokens} tokens: {', '.join(cut)}.")
    notes.append(f"Judge {results.judge.name}-v{results.judge.version}. {results.judge.notice}")
    return notes
