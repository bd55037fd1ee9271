"""The end of an evaluation in the terminal: its table, or for programs its numbers, and where the rest lies."""

from __future__ import annotations

from pathlib import Path

from mirage.evals.report import results_table
from mirage.evals.results import Results
from mirage.tracking.console import Terminal


def show_results(
    console: Terminal, results: Results, *, file: Path | None = None, before: Results | None = None
) -> None:
    """Print the results beside those of the baseline `before`; `file` is their results.json.

    In JSON mode a `summary` with the flat numbers that tracking gets too (`eval/<task>/<metric>`, percent).
    """
    table = results_table([before, results] if before is not None else [results])
    console.summary(
        table,
        what="evaluation",
        checkpoint=results.checkpoint,
        step=results.step,
        judge=results.judge.name,
        invalid={task: result.invalid_reason for task, result in results.tasks.items() if not result.valid},
        metrics=results.metrics(),
        file=file,
    )
    if file is not None and console.mode != "json":
        console.say(f"results: {file}")
