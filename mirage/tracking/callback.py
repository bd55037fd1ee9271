"""Sends each step's metrics to the tracker and closes it with the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirage.tracking.run import Tracker
from mirage.training.callbacks import Callback

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer


class TrackingCallback(Callback):
    """Train metrics on the `train` axis. Put it last, so that others still can log when a run ends."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._last: dict[str, float] = {}

    def on_start(self, trainer: Trainer) -> None:
        self.tracker.rewind(trainer.step)

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if metrics:
            self.tracker.log(metrics, axis="train", step=trainer.step)
            self._last = dict(metrics)

    def on_end(self, trainer: Trainer) -> None:
        self.tracker.summary({f"last/{name}": value for name, value in self._last.items()} | {"steps": trainer.step})

    def on_close(self, trainer: Trainer, error: BaseException | None) -> None:
        self.tracker.close(exit_code=0 if error is None else 1)
