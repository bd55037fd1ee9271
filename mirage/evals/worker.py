"""`mirage worker`: measures a run's checkpoints beside its training, on another device or after its end."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import MutableMapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich import box
from rich.table import Table

from mirage.config.loader import read_resolved
from mirage.config.schema import Recipe
from mirage.errors import UserError
from mirage.evals.hook import log_finished, run_job
from mirage.evals.results import read_results
from mirage.evals.schedule import Job, all_jobs, claimed, open_jobs, read_job, results_dir
from mirage.report.callback import report_run
from mirage.tracking.console import Terminal
from mirage.tracking.run import Tracker

POLL_SECONDS = 5.0
# A launcher's variables would make this process believe that it is one of the training's ranks.
_LAUNCHER_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_")


def work(run_dir: Path, *, device: torch.device, once: bool, console: Terminal) -> int:
    """Measure what waits until the training is over and nothing waits any more; with `once`, what waits now.

    Several workers share the work: a checkpoint is claimed by a lock that a kill releases. What failed is tried once
    by each worker that is started. Returns the number of evaluations that have failed. Raises `UserError` for a folder
    without a run.
    """
    remove_launcher_variables(os.environ)
    recipe = read_recipe(run_dir)
    tried: set[int] = set()
    while True:
        for job in open_jobs(run_dir):
            if job.step not in tried and _is_its_turn(run_dir, job):
                _work_on(run_dir, job, recipe=recipe, device=device, console=console, tried=tried)
        if once or not (any(job.step not in tried for job in open_jobs(run_dir)) or is_training(run_dir)):
            break
        time.sleep(POLL_SECONDS)
    _log_after_training(run_dir, recipe, console)
    jobs = all_jobs(run_dir)
    _say_summary(run_dir, jobs, console)
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        console.error(f"step {job.step} is not measured: {job.reason}", step=job.step)
    return len(failed)


def _say_summary(run_dir: Path, jobs: list[Job], console: Terminal) -> None:
    """A line for each of the run's checkpoints: what became of its evaluation."""
    table = Table(title="evaluations of the run", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("step", "tier", "state", "samples", "unscored"):
        table.add_column(name, justify="left" if name in ("tier", "state") else "right", no_wrap=True)
    facts: list[dict[str, object]] = []
    for job in jobs:
        results = None
        with contextlib.suppress(UserError):
            results = read_results(results_dir(run_dir, job.step)) if job.state == "done" else None
        counts = [(task.num_samples, task.num_unscored) for task in results.tasks.values()] if results else []
        sums = [sum(column) for column in zip(*counts)]
        table.add_row(str(job.step), job.tier, job.state, *(map(str, sums) if sums else ("-", "-")))
        facts.append({"step": job.step, "tier": job.tier, "state": job.state, "num_samples": sums[0] if sums else None})
    console.summary(table, what="worker", evaluations=facts)


def _is_its_turn(run_dir: Path, job: Job) -> bool:
    """Later checkpoints are compared with step 0's, which therefore comes first where it is still to come."""
    first = read_job(run_dir, 0)
    return job.step == 0 or first is None or first.state != "waiting"


def _work_on(
    run_dir: Path, job: Job, *, recipe: Recipe, device: torch.device, console: Terminal, tried: set[int]
) -> None:
    with claimed(run_dir, job.step) as mine:
        # Another worker may have finished it between our look and our claim.
        now = read_job(run_dir, job.step)
        if not mine or now is None or now.state == "done":
            return
        tried.add(job.step)
        console.say(f"measuring step {job.step} ({job.tier})", event="start", what="evaluation", step=job.step)
        run_job(run_dir, job, recipe=recipe, device=device, console=console)


def remove_launcher_variables(environ: MutableMapping[str, str]) -> None:
    """Take away what a launcher left in the environment."""
    for name in list(environ):
        if name.startswith(_LAUNCHER_PREFIXES):
            del environ[name]


def read_recipe(run_dir: Path) -> Recipe:
    """The recipe that a run is trained with. Raises `UserError` where there is none or it is not of this version."""
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder: it has no recipe.json")
    return read_resolved(path)


def is_training(run_dir: Path) -> bool:
    """Whether a process trains in the folder."""
    try:
        with FileLock(run_dir / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True


def _log_after_training(run_dir: Path, recipe: Recipe, console: Terminal) -> None:
    """Send what is finished and was not logged to the run's tracking; while it trains, the run itself does that."""
    try:
        with FileLock(run_dir / ".lock").acquire(timeout=0):
            tracker = Tracker.open(
                run_dir,
                recipe.tracking,
                name=recipe.name,
                recipe=recipe.model_dump(mode="json"),
                is_main=True,
            )
            try:
                log_finished(run_dir, tracker, console, config=recipe.eval)
            finally:
                tracker.close()
            report_run(run_dir, console)
    except Timeout:
        console.say("the run is training and logs these results at its next checkpoint")
