"""Evaluation in the run: what a checkpoint's moment sets off, and what comes back is logged at the right step."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mirage.config.schema import EvalConfig, Recipe
from mirage.errors import RunStopped
from mirage.evals.evaluate import describe_failure, evaluate_checkpoint
from mirage.evals.guards import guard_evaluation, stop_if_alarmed
from mirage.evals.request import check_evaluation
from mirage.evals.results import RESULTS_FILE, read_results
from mirage.evals.schedule import (
    Job,
    all_jobs,
    choose_tier,
    claimed,
    enqueue,
    open_jobs,
    read_job,
    results_dir,
    settle,
    tier_config,
)
from mirage.evals.show_results import show_results
from mirage.evals.tracked import log_evaluation, log_what_is_missing
from mirage.files import write_atomic
from mirage.model_card.write import refresh_cards_of
from mirage.tracking.console import Terminal, make_console
from mirage.tracking.run import Tracker
from mirage.training.callbacks import Callback
from mirage.training.checkpoint import checkpoint_name, checkpoint_step, due_checkpoints
from mirage.training.distributed import gather_objects, outside_training

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer

LOGGED_FILE = "LOGGED"
# Ranks wait for the first one's judge: hours, where a training step's collectives may take minutes.
JUDGING_TIMEOUT = timedelta(days=2)


class EvalCallback(Callback):
    """Lets each checkpoint's evaluation wait as a file, and runs what waits when the recipe says.

    `eval.mode=inline`: at once, on all ranks. `deferred`: after the last step, on all ranks. `worker`: never, `mirage
    worker` does it; the run logs what has come in at its checkpoints and at its end. What a kill cut short, and what
    has failed, is tried again at the next start. A failed evaluation never stops training.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._failed: set[int] = set()

    def on_start(self, trainer: Trainer) -> None:
        """Check tasks, data and judge before any step is paid for; go on with what an earlier process left open."""
        config = trainer.recipe.eval
        if config.mode == "off":
            return
        check_evaluation(
            config, run_dir=trainer.run_dir, data_dir=data_dir(trainer.recipe).absolute(), device=trainer.device
        )
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=JUDGING_TIMEOUT)
        for checkpoint in due_checkpoints(trainer.run_dir):
            if checkpoint_step(checkpoint) > 0 or config.at_start:
                self._let_wait(trainer, checkpoint_step(checkpoint))
        self._proceed(trainer, run_now=config.mode == "inline", at_start=True)

    def on_checkpoint(self, trainer: Trainer, checkpoint: Path, step: int) -> None:
        """Let its evaluation wait, run it now where the mode says so, log what has come in."""
        if trainer.recipe.eval.mode == "off":
            return
        self._let_wait(trainer, step)
        self._proceed(trainer, run_now=trainer.recipe.eval.mode == "inline")

    def on_end(self, trainer: Trainer) -> None:
        """Run what was deferred; say what still waits and how to have it done."""
        mode = trainer.recipe.eval.mode
        if mode == "off":
            return
        self._proceed(trainer, run_now=mode == "deferred")
        still = open_jobs(trainer.run_dir) if trainer.is_main else []
        if still:
            steps = ", ".join(f"{job.step} ({job.state})" for job in still)
            console = make_console(trainer.recipe.tracking.console)
            console.say(
                f"not measured yet: step {steps}; run `mirage worker {trainer.run_dir}`",
                event="not_measured",
                steps=[job.step for job in still],
            )

    def _let_wait(self, trainer: Trainer, step: int) -> None:
        """One job for each checkpoint, whatever its state is: nothing is measured twice."""
        if not trainer.is_main or read_job(trainer.run_dir, step) is not None:
            return
        every = trainer.recipe.checkpoint.every_steps
        number = step // every if every else round(step / trainer.plan.steps_per_epoch)
        tier = choose_tier(trainer.recipe.eval, step=step, number=number, is_last=step == trainer.total_steps)
        enqueue(trainer.run_dir, Job(step, tier))

    def _proceed(self, trainer: Trainer, *, run_now: bool, at_start: bool = False) -> None:
        """Run what is open, on all ranks; log whatever is done and was not logged; stop where a guard says so.

        A run that a guard has stopped stays stopped: its last evaluation is looked at again `at_start`.
        """
        waiting = open_jobs(trainer.run_dir) if trainer.is_main and run_now else []
        jobs = _gather([job for job in waiting if job.step not in self._failed], self._group)[0]
        console = make_console(trainer.recipe.tracking.console) if trainer.is_main else None
        for job in jobs:
            # A worker that was started beside may be at it.
            with claimed(trainer.run_dir, job.step) if trainer.is_main else nullcontext(False) as mine:
                if not _gather(mine, self._group)[0]:
                    continue
                with outside_training():
                    ended = run_job(
                        trainer.run_dir,
                        job,
                        recipe=trainer.recipe,
                        device=trainer.device,
                        console=console,
                        rank=trainer.rank,
                        world_size=trainer.world_size,
                        group=self._group,
                    )
            if ended.state == "failed":
                self._failed.add(job.step)
        stop = None
        if console is not None:
            steps = log_finished(trainer.run_dir, trainer.tracker, console, config=trainer.recipe.eval)
            if at_start:
                steps = [job.step for job in all_jobs(trainer.run_dir) if job.state == "done"][-1:]
            stop = _alarm(trainer.run_dir, steps, config=trainer.recipe.eval)
        stop = _gather(stop, self._group)[0]
        if stop is not None:
            raise RunStopped(stop)


def data_dir(recipe: Recipe) -> Path:
    """The dataset folder that a run's tasks read."""
    return recipe.eval.data_dir or recipe.data.dir


def run_job(
    run_dir: Path,
    job: Job,
    *,
    recipe: Recipe,
    device: torch.device,
    console: Terminal | None,
    rank: int = 0,
    world_size: int = 1,
    group: Any = None,
) -> Job:
    """Measure one checkpoint of a run and write down how that ended; a failure is a state, never an error.

    With a process `group` all its ranks call this; rank 0 writes and says what happened.
    """

    def agree(failure: str | None) -> str | None:
        return next((found for found in _gather(failure, group) if found is not None), None)

    first = results_dir(run_dir, 0)
    try:
        evaluate_checkpoint(
            run_dir / checkpoint_name(job.step),
            config=tier_config(recipe.eval, job.tier),
            data_dir=data_dir(recipe),
            out_dir=results_dir(run_dir, job.step),
            rank=rank,
            world_size=world_size,
            agree=agree,
            device=device,
            baseline=first if job.step > 0 and (first / RESULTS_FILE).is_file() else None,
            step=job.step,
            console=console,
        )
    except Exception as error:
        ended = Job(job.step, job.tier, "failed", describe_failure(error))
    else:
        ended = Job(job.step, job.tier, "done")
    if rank == 0:
        settle(run_dir, ended)
        if ended.state == "done":
            # A worker, or a deferred evaluation, may end after the export whose card reports it.
            refresh_cards_of(run_dir, console)
    if console is not None and ended.state == "failed":
        console.error(
            f"evaluation of step {job.step} failed: the checkpoint is kept, and it is tried again when the run or "
            f"`mirage worker {run_dir}` is started\n{ended.reason}",
            step=job.step,
        )
    return ended


def _gather(value: Any, group: Any) -> list[Any]:
    return [value] if group is None else gather_objects(value, group)


def _alarm(run_dir: Path, steps: list[int], *, config: EvalConfig) -> str | None:
    """Why the evaluations of these steps end the run, if one does."""
    try:
        for step in steps:
            stop_if_alarmed(results_dir(run_dir, step), step=step, config=config)
    except RunStopped as stopped:
        return str(stopped)
    return None


def log_finished(run_dir: Path, tracker: Tracker | None, console: Terminal, *, config: EvalConfig) -> list[int]:
    """Send each finished evaluation that was not logged to the tracker, at its own step; returns these steps.

    Guards look at it first; its table and what they say are printed.
    """
    steps = []
    for job in all_jobs(run_dir):
        out_dir = results_dir(run_dir, job.step)
        if job.state != "done":
            continue
        if (out_dir / LOGGED_FILE).exists():
            if tracker is not None and tracker.is_open:
                log_what_is_missing(tracker, out_dir, step=job.step)
            continue
        results, first = read_results(out_dir), results_dir(run_dir, 0)
        alarms = guard_evaluation(out_dir, first, config=config) if results.baseline else []
        if tracker is not None:
            log_evaluation(tracker, out_dir, step=job.step, config=config, num_alarms=len(alarms))
        write_atomic(out_dir / LOGGED_FILE, f"{results.request}\n")
        show_results(console, results, before=read_results(first) if results.baseline else None)
        for alarm in alarms:
            text = f"step {job.step} is worse than step 0: {alarm.message}"
            console.say(text, event="alarm", step=job.step, guard=alarm.guard, rate=alarm.rate)
        steps.append(job.step)
    return steps
