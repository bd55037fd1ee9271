"""The named moments of a run, for everything that is not the loop: evaluation, tracking, console."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer


class Callback:
    """Does nothing at every moment; override the ones you need. Called on every rank, in the order of the list."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process; `trainer.step` is 0 or the resumed step."""

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After an optimiser step; `metrics` are over all ranks, names like `train/loss`."""

    def on_checkpoint(self, trainer: Trainer, checkpoint: Path, step: int) -> None:
        """After READY is written (also for step 0's untouched model, when it is to be evaluated)."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step and its checkpoint."""

    def on_close(self, trainer: Trainer, error: BaseException | None) -> None:
        """Always last, also after an error; must not use collectives."""
