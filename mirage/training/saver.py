"""Checkpoints of a run: copied between steps, written by a thread of each rank, READY once every rank has written."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from mirage.config.loader import recipe_hash, resolved_json
from mirage.errors import UserError
from mirage.training import checkpoint as checkpoints
from mirage.training.checkpoint import Written
from mirage.training.distributed import gather_objects
from mirage.training.optimizer_state import collect_optimizer_state, write_optimizer_state

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer


class _Part:
    """This rank's part of one checkpoint, being written."""

    def __init__(self, aside: Path, *, step: int, is_due: bool, write: Callable[[], list[Path]]) -> None:
        self.aside, self.step, self.is_due = aside, step, is_due
        self.written = Written()
        self.hashes: dict[str, str] = {}
        self.error: Exception | None = None
        self._write = write
        # A process that ends, by an error or a signal, does not wait for it: the next start removes what it left.
        self.thread = Thread(target=self._run, name=f"checkpoint of step {step}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self.written.caught():
                self.hashes = checkpoints.synced_hashes(self._write(), relative_to=self.aside)
        except Exception as error:  # raised again where the training hears of it
            self.error = error
            self.written.reason = f"{type(error).__name__}: {error}"


class CheckpointSaver:
    """Writes one checkpoint at a time while training goes on.

    What a checkpoint holds is copied into the host's memory before the next step. The rest is files, and the thread
    that writes them takes part in no collective: that all ranks have written goes through the sums of a step, so that
    they finish the checkpoint after the same one. A kill before that costs the checkpoint, as one amid writing does.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._part: _Part | None = None
        self.is_written = False

    def number(self) -> float:
        """1 once this rank has written its part of the checkpoint under way, to be summed over the ranks."""
        return float(self._part is not None and not self._part.thread.is_alive())

    def agree(self, total: float) -> None:
        """Set `is_written`, the same on every rank, from the sum of `number`."""
        self.is_written = total == self._trainer.world_size

    def start(self, *, is_due: bool) -> None:
        """Copy the state after the trainer's step and begin to write it. A collective; one under way is finished first.

        One that is not due was asked for by a signal: it is there to continue from, callbacks hear nothing of it, and
        the next one takes its place.
        """
        self.finish()
        trainer = self._trainer
        aside = trainer.run_dir / checkpoints.aside_name(trainer.step)
        with trainer.meter.checkpoint():
            self._part = _Part(aside, step=trainer.step, is_due=is_due, write=self._collect(aside))

    def _collect(self, aside: Path) -> Callable[[], list[Path]]:
        """What writes this rank's files of the checkpoint and lists them; nothing in it changes any more."""
        trainer = self._trainer
        optimizer = collect_optimizer_state(trainer.engine, rank=trainer.rank, world_size=trainer.world_size)
        write_weights = trainer.collect_weights()
        recipe = resolved_json(trainer.recipe)
        state = {"step": trainer.step, "world_size": trainer.world_size, "recipe_hash": recipe_hash(trainer.recipe)}

        def write() -> list[Path]:
            model, resume = aside / "model", aside / "resume"
            resume.mkdir(parents=True, exist_ok=True)
            own = write_optimizer_state(optimizer, resume, rank=trainer.rank)
            if not trainer.is_main:
                return [own]
            write_weights(model)
            (aside / "recipe.json").write_text(recipe + "\n", encoding="utf-8")
            (resume / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
            in_model = [path for path in model.rglob("*") if path.is_file()]
            return [own, *in_model, aside / "recipe.json", resume / "state.json"]

        return write

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one, mark it READY, tell the callbacks, retire old ones.

        All ranks call. A run that is told to stop leaves what follows a checkpoint to the next start.
        """
        part, self._part, self.is_written = self._part, None, False
        if part is None:
            return
        trainer = self._trainer
        final = trainer.run_dir / checkpoints.checkpoint_name(part.step)
        with trainer.meter.checkpoint():
            part.thread.join()
            with self._agreed(part):
                hashes = {name: value for found in gather_objects(part.hashes) for name, value in found.items()}
            with self._agreed(part), part.written.caught():
                if trainer.is_main:
                    checkpoints.publish(part.aside, final, step=part.step, hashes=hashes, is_due=part.is_due)
        trainer.checkpoint_ready(final, part.step, is_due=part.is_due)

    @contextlib.contextmanager
    def _agreed(self, part: _Part) -> Iterator[None]:
        """At its end, where any rank could not write, all stop with its reason and remove what is there."""
        yield
        reason = next((found for found in gather_objects(part.written.reason) if found is not None), None)
        if reason is None:
            return
        if self._trainer.is_main:
            shutil.rmtree(part.aside, ignore_errors=True)
        if part.error is not None:
            raise part.error
        raise UserError(f"the checkpoint of step {part.step} could not be written into {part.aside.parent}: {reason}")
