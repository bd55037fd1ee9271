"""Checkpoints of a run: copied between steps, written by a thread of each rank, READY once every rank has written."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from mirage.config.loader import recipe_hash, resolved_json
from mirage.errors import UserError
from mirage.files import write_atomic
from mirage.training import checkpoint as checkpoints
from mirage.training.checkpoint import Written
from mirage.training.distributed import gather_objects
from mirage.training.optimizer_state import collect_optimizer_state, write_optimizer_state

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer


# How long a rank that ends by an error waits for the checkpoint under way; launchers kill after 30 s.
WAIT_SECONDS = 20.0
_POLL_SECONDS = 0.05


class _Part:
    """This rank's part of one checkpoint, being written by a thread; the first rank's marks the whole of it READY.

    The ranks tell the first one by files, not by collectives: what all of them have written becomes a checkpoint though
    training may have failed since.
    """

    def __init__(self, trainer: Trainer, aside: Path, *, is_due: bool, write: Callable[[], list[Path]]) -> None:
        self.step, self.is_due, self.aside = trainer.step, is_due, aside
        self.final = trainer.run_dir / checkpoints.checkpoint_name(trainer.step)
        self.written = Written()
        self.error: Exception | None = None
        self.own_done, self.abandoned = Event(), Event()
        self._rank, self._world_size, self._write = trainer.rank, trainer.world_size, write
        # A process that ends does not wait for it longer than it wants: the next start removes what is left.
        self.thread = Thread(target=self._run, name=f"checkpoint of step {self.step}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        hashes: dict[str, str] = {}
        with self._caught():
            hashes = checkpoints.synced_hashes(self._write(), relative_to=self.aside)
            if self._rank:
                write_atomic(self._share(self._rank), json.dumps(hashes))
        self.own_done.set()
        if self._rank == 0 and self.written.reason is None:
            with self._caught():
                self._publish(hashes)

    @contextlib.contextmanager
    def _caught(self) -> Iterator[None]:
        try:
            with self.written.caught():
                yield
        except Exception as error:  # raised again where the training hears of it
            self.error = error
            self.written.reason = f"{type(error).__name__}: {error}"

    def _share(self, rank: int) -> Path:
        return self.aside / f".rank-{rank:05d}.json"

    def _publish(self, hashes: dict[str, str]) -> None:
        shares = [self._share(rank) for rank in range(1, self._world_size)]
        for share in shares:
            while not share.exists():
                if self.abandoned.wait(_POLL_SECONDS):
                    return
            hashes |= json.loads(share.read_text(encoding="utf-8"))
        for share in shares:
            share.unlink()
        checkpoints.publish(self.aside, self.final, step=self.step, hashes=hashes, is_due=self.is_due)


class CheckpointSaver:
    """Writes one checkpoint at a time while training goes on.

    What a checkpoint holds is copied into the host's memory before the next step; the rest is files, which a thread
    writes. That all ranks have written goes through the sums of a step, so that what follows a checkpoint follows it on
    all of them after the same step. A kill before READY costs the checkpoint, as one amid writing always does.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._part: _Part | None = None
        self.is_written = False

    def number(self) -> float:
        """1 once this rank has written its part of the checkpoint under way, to be summed over the ranks."""
        return float(self._part is not None and self._part.own_done.is_set())

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
            self._part = _Part(trainer, aside, is_due=is_due, write=self._collect(aside))

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
        """Wait for the checkpoint under way, if there is one, to be READY; tell the callbacks, retire old ones.

        All ranks call. A run that is told to stop leaves what follows a checkpoint to the next start.
        """
        part, self._part, self.is_written = self._part, None, False
        if part is None:
            return
        with self._trainer.meter.checkpoint():
            part.own_done.wait()
            self._stop_where_unwritten(part)
            part.thread.join()
            self._stop_where_unwritten(part)
        self._trainer.checkpoint_ready(part.final, part.step, is_due=part.is_due)

    def _stop_where_unwritten(self, part: _Part) -> None:
        """Where any rank could not write, all stop with its reason and the first removes what is there."""
        reason = next((found for found in gather_objects(part.written.reason) if found is not None), None)
        if reason is None:
            return
        part.abandoned.set()
        part.thread.join()
        if self._trainer.is_main:
            shutil.rmtree(part.aside, ignore_errors=True)
        if part.error is not None:
            raise part.error
        raise UserError(f"the checkpoint of step {part.step} could not be written into {part.aside.parent}: {reason}")

    def wait(self, *, until_ready: bool, seconds: float = WAIT_SECONDS) -> None:
        """For one rank that has failed, without the others: give the checkpoint under way so long to be READY, or to be
        written as far as it is this rank's part."""
        part, deadline = self._part, time.monotonic() + seconds
        if part is None or (part.own_done.wait(seconds) and not until_ready):
            return
        while part.written.reason is None and checkpoints.read_ready(part.final) is None:
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_SECONDS)
