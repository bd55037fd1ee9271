"""What the terminal shows while a run trains: loss, learning rate, speed, time left, and at its end what it came to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from mirage.tracking.console import ConsoleMode, Terminal, make_console
from mirage.tracking.pace import duration
from mirage.tracking.progress import NUM_LINES, Progress
from mirage.training.callbacks import Callback

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer


class ConsoleCallback(Callback):
    """Progress of the steps from the main rank, in the mode of the recipe's `tracking.console` unless given.

    The time left is that of the steps alone: evaluations and checkpoints on the way are not in it.
    """

    def __init__(
        self,
        mode: ConsoleMode | None = None,
        *,
        console: Terminal | None = None,
        num_lines: int = NUM_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode = mode
        self._console = console
        self._num_lines = num_lines
        self._clock = clock
        self._progress: Progress | None = None
        self._started_at = 0.0
        self._step = self._first_step = 0
        self._step_seconds = 0.0
        self._num_tokens = 0.0
        self._first_loss: float | None = None
        self._last: dict[str, float] = {}
        self._checkpoint: Path | None = None

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        self._console = self._console or make_console(self._mode or trainer.recipe.tracking.console)
        self._step = self._first_step = trainer.step
        self._started_at, self._step_seconds = self._clock(), 0.0
        origin = f"continues after step {trainer.step}" if trainer.step else "starts"
        self._console.say(
            f"{trainer.recipe.name} {origin}: {trainer.total_steps} steps, folder {trainer.run_dir}",
            event="start", what="train", name=trainer.recipe.name, step=trainer.step, total_steps=trainer.total_steps,
            run_dir=trainer.run_dir,
        )  # fmt: skip
        for part, kernel in trainer.kernels.items():
            self._console.say(f"{part}: {kernel}", event="kernel", part=part, kernel=kernel)
        if trainer.step < trainer.total_steps:
            self._progress = self._console.progress(
                "step", trainer.total_steps, done=trainer.step, num_lines=self._num_lines, seconds_between=0.0
            ).__enter__()

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if not trainer.is_main or not metrics or self._progress is None:
            return
        self._last |= metrics
        self._note_step(trainer.step, metrics)
        self._progress.update(
            trainer.step, at_seconds=self._step_seconds, note=describe(self._last), metrics=dict(self._last)
        )

    def on_checkpoint(self, trainer: Trainer, checkpoint: Path, step: int) -> None:
        if trainer.is_main and self._console:
            self._checkpoint = checkpoint
            self._console.say(
                f"checkpoint of step {step}: {checkpoint}", event="checkpoint", step=step, path=checkpoint
            )  # fmt: skip

    def on_end(self, trainer: Trainer) -> None:
        if trainer.is_main:
            self._stop(None)

    def on_close(self, trainer: Trainer, error: BaseException | None) -> None:
        # Without a console the run ended before its start, and the error itself is all there is to say.
        if not trainer.is_main or self._console is None:
            return
        self._stop(error)
        if error is None:
            self._say_summary(trainer)
            return
        self._console.say(
            f"stopped at step {trainer.step} of {trainer.total_steps}; the same command continues the run",
            event="stopped", step=trainer.step, total_steps=trainer.total_steps,
        )  # fmt: skip

    def _note_step(self, step: int, metrics: dict[str, float]) -> None:
        """Steps between two that are logged count as long, and as many tokens, as the logged one."""
        count, self._step = step - self._step, step
        self._step_seconds += count * _finite(metrics.get("train/step_seconds"))
        self._num_tokens += count * _finite(metrics.get("train/tokens"))
        if self._first_loss is None:
            self._first_loss = metrics.get("train/loss")

    def _say_summary(self, trainer: Trainer) -> None:
        assert self._console is not None
        took_seconds, loss = self._clock() - self._started_at, self._last.get("train/loss")
        last = "" if loss is None else f", last loss {loss:.4f}"
        self._console.say(
            f"{trainer.recipe.name} done: step {trainer.step} after {duration(took_seconds)}{last}", event="done"
        )
        facts = self._facts(trainer, took_seconds, loss)
        table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
        for name, text in _rows(facts):
            table.add_row(name, text)
        self._console.summary(table, what="train", **facts)

    def _facts(self, trainer: Trainer, took_seconds: float, loss: float | None) -> dict[str, Any]:
        """What the run came to, in this process; a resumed one counts what it has done itself."""
        return {
            "name": trainer.recipe.name,
            "step": trainer.step,
            "num_steps": trainer.step - self._first_step,
            "epoch": self._last.get("train/epoch"),
            "took_seconds": took_seconds,
            "step_seconds": self._step_seconds,
            "num_tokens": round(self._num_tokens) or None,
            "first_loss": self._first_loss,
            "last_loss": loss,
            "checkpoint": self._checkpoint,
        }

    def _stop(self, error: BaseException | None) -> None:
        if self._progress:
            self._progress.__exit__(type(error) if error else None, error, None)
            self._progress = None


def describe(metrics: dict[str, float]) -> str:
    """One line from a step's metrics, in a fixed order; what is not there is left out."""
    formats: dict[str, Callable[[float], str]] = {
        "train/epoch": lambda value: f"epoch {value:.2f}",
        "train/loss": lambda value: f"loss {value:.4f}",
        "train/lr": lambda value: f"lr {value:.2e}",
        "train/tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
        "train/mfu": lambda value: f"mfu {value:.0%}",
    }
    return "  ".join(show(metrics[name]) for name, show in formats.items() if name in metrics)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts as the table's lines; what is not known is left out."""
    epoch, tokens, seconds = facts["epoch"], facts["num_tokens"], facts["step_seconds"]
    rows = [
        ("steps", f"{facts['num_steps']:,}" + ("" if epoch is None else f", {epoch:.2f} epochs in all")),
        ("time", f"{duration(facts['took_seconds'])}, {duration(seconds)} of it in steps"),
    ]
    if tokens:
        rows.append(("tokens", f"{tokens:,}" + (f", {tokens / seconds:,.0f} a second" if seconds else "")))
    if facts["first_loss"] is not None:
        rows.append(("loss", f"{facts['first_loss']:.4f} to {facts['last_loss']:.4f}"))
    if facts["checkpoint"] is not None:
        rows.append(("checkpoint", str(facts["checkpoint"])))
    return rows
