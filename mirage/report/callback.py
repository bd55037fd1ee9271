"""The end of a run: its report is written where its results lie, and nothing that goes wrong there stops the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mirage.errors import UserError
from mirage.tracking.console import Terminal, make_console
from mirage.training.callbacks import Callback

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer


class ReportCallback(Callback):
    """Writes `report.html` after the last evaluation; comes after the callbacks whose work it shows."""

    def on_end(self, trainer: Trainer) -> None:
        """On the main rank, where there is an evaluation."""
        if trainer.is_main:
            report_run(trainer.run_dir, make_console(trainer.recipe.tracking.console))


def report_run(run_dir: Path, console: Terminal) -> None:
    """Write a run's report and say where it is; where it cannot be written, say why and how to try again."""
    if next((run_dir / "evals").glob("step-*/results.json"), None) is None:
        return
    from mirage.report.page import write_report  # statistics and drawing, which training does without

    try:
        written = write_report([run_dir])
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        console.error(f"no report: {reason}; try again with `mirage report {run_dir}`")
        return
    size = f"{written.num_bytes / 1e6:.1f} MB"
    console.say(f"report: {written.path} ({size})", event="report", path=str(written.path), num_bytes=written.num_bytes)
