"""Sends each step's metrics to the tracker, with what the run used and made, and closes it with the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mirage.tracking.alerts import StepAlerts, stop_alert
from mirage.tracking.artifacts import base_card, checkpoint_card, dataset_card
from mirage.tracking.console import make_console
from mirage.tracking.environment import environment
from mirage.tracking.run import Tracker
from mirage.training.callbacks import Callback
from mirage.training.checkpoint import checkpoint_step, due_checkpoints

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer


class TrackingCallback(Callback):
    """Train metrics on the `train` axis, alerts, artifacts of the data, the base model and each checkpoint.

    Opens the run's tracker and leaves it in `trainer.tracker` for the others.
    """

    def __init__(self, tracker: Tracker | None = None) -> None:
        self._tracker = tracker
        self._last: dict[str, float] = {}
        self._alerts: StepAlerts | None = None

    def on_start(self, trainer: Trainer) -> None:
        if self._tracker is None:
            self._tracker = Tracker.open(
                trainer.run_dir,
                trainer.recipe.tracking,
                name=trainer.recipe.name,
                recipe=trainer.recipe.model_dump(mode="json"),
                is_main=trainer.is_main,
            )
            if trainer.is_main:
                make_console(trainer.recipe.tracking.console).print(self._tracker.where, markup=False, soft_wrap=True)
        trainer.tracker = self._tracker
        self._alerts = StepAlerts(self._tracker.config.alerts)
        self._tracker.rewind(trainer.step)
        self._tracker.summary(
            {f"kernels/{part}": kernel for part, kernel in trainer.kernels.items()}
            | (environment(trainer.device, num_processes=trainer.world_size) if trainer.is_main else {})
        )
        if self._tracker.wandb_id is not None:
            self._log_what_is_used(trainer)
            for checkpoint in due_checkpoints(trainer.run_dir):
                self._log_checkpoint(checkpoint)

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self._tracker and metrics:
            self._tracker.log(metrics, axis="train", step=trainer.step)
            self._last = dict(metrics)
            for alert in self._alerts.look(metrics, step=trainer.step) if self._alerts else []:
                self._tracker.alert(alert)

    def on_checkpoint(self, trainer: Trainer, checkpoint: Path, step: int) -> None:
        if self._tracker and self._tracker.wandb_id is not None:
            self._log_checkpoint(checkpoint)

    def on_end(self, trainer: Trainer) -> None:
        if self._tracker:
            last = {f"last/{name}": value for name, value in self._last.items()}
            self._tracker.summary(last | {"steps": trainer.step})

    def on_close(self, trainer: Trainer, error: BaseException | None) -> None:
        # None when the run ended before its start: a mistake in the data, a folder in use.
        if self._tracker:
            if error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
                alert = stop_alert(error, step=trainer.step)
                if self._tracker.config.alerts.not_finite or not alert.key.startswith("not finite"):
                    self._tracker.alert(alert)
            self._tracker.close(exit_code=0 if error is None else 1)

    def _log_what_is_used(self, trainer: Trainer) -> None:
        """The data and the base model, as the run's inputs."""
        assert self._tracker is not None
        config, recipe = self._tracker.config.artifacts, trainer.recipe
        if config.dataset != "off":
            paths = dict.fromkeys([source.path or recipe.data.dir for source in recipe.data.sources])
            for path in (path for path in paths if path.exists()):
                card = dataset_card(path, detail=config.dataset, max_bytes=config.max_bytes)
                self._tracker.log_artifact(card, used=True)
        if config.checkpoint != "off" and trainer.base.is_dir():
            name = recipe.model.path or f"{recipe.model.family}-tiny"
            self._tracker.log_artifact(base_card(trainer.base, name=name), used=True)

    def _log_checkpoint(self, checkpoint: Path) -> None:
        """A checkpoint with trained weights; that of step 0 is the base model."""
        assert self._tracker is not None
        config, identity = self._tracker.config.artifacts, self._tracker.wandb_id
        if config.checkpoint == "off" or identity is None or checkpoint_step(checkpoint) == 0:
            return
        card = checkpoint_card(checkpoint, run_id=identity, detail=config.checkpoint, max_bytes=config.max_bytes)
        if card is not None:
            self._tracker.log_artifact(card)
