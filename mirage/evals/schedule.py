"""Which checkpoints are measured, how fully, and which still wait: one small file an evaluation, in the run folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from mirage.config.schema import EvalConfig
from mirage.errors import UserError
from mirage.files import write_atomic
from mirage.strict_json import read_json_object
from mirage.training.checkpoint import LEASE_SUFFIX, WAITING_LEASE, checkpoint_name

STATE_FILE = "state.json"
Tier = Literal["full", "smoke"]
State = Literal["waiting", "done", "failed"]


@dataclass(frozen=True)
class Job:
    """One checkpoint's evaluation: waiting (also after a kill), done, or failed, which is tried again."""

    step: int
    tier: Tier
    state: State = "waiting"
    reason: str = ""


def results_dir(run_dir: Path, step: int) -> Path:
    """Where a run keeps the evaluation of its checkpoint of `step`."""
    return run_dir / "evals" / f"step-{step:06d}"


def choose_tier(config: EvalConfig, *, step: int, number: int, is_last: bool) -> Tier:
    """Step 0 and the last checkpoint are measured in full, and each `eval.full_every`th (`number` counts from 1)."""
    if config.smoke_samples is None or step == 0 or is_last:
        return "full"
    return "full" if config.full_every is not None and number % config.full_every == 0 else "smoke"


def tier_config(config: EvalConfig, tier: Tier) -> EvalConfig:
    """The settings that a tier is measured with."""
    return config if tier == "full" else config.model_copy(update={"max_samples": config.smoke_samples})


def enqueue(run_dir: Path, job: Job) -> None:
    """Let an evaluation wait. The lease comes first: from then on the checkpoint stays."""
    (run_dir / checkpoint_name(job.step) / WAITING_LEASE).touch()
    results_dir(run_dir, job.step).mkdir(parents=True, exist_ok=True)
    _write(run_dir, job)


def settle(run_dir: Path, job: Job) -> None:
    """Write down how an evaluation ended; a finished one lets its checkpoint go, a failed one keeps it."""
    _write(run_dir, job)
    if job.state == "done":
        (run_dir / checkpoint_name(job.step) / WAITING_LEASE).unlink(missing_ok=True)


def _write(run_dir: Path, job: Job) -> None:
    write_atomic(results_dir(run_dir, job.step) / STATE_FILE, json.dumps(asdict(job)) + "\n")


def read_job(run_dir: Path, step: int) -> Job | None:
    """The evaluation of a step's checkpoint, or None where none was asked for. Raises `UserError` if damaged."""
    path = results_dir(run_dir, step) / STATE_FILE
    if not path.is_file():
        return None
    try:
        return _job(read_json_object(path, remedy=""))
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and start the run or the worker again") from error


def _job(fields: dict[str, Any]) -> Job:
    job = Job(**fields)
    if not isinstance(job.step, int) or job.tier not in get_args(Tier) or job.state not in get_args(State):
        raise ValueError("a field has a value that no evaluation has")
    return job


def all_jobs(run_dir: Path) -> list[Job]:
    """Every evaluation of a run, by step."""
    steps = sorted(int(path.parent.name.removeprefix("step-")) for path in run_dir.glob(f"evals/step-*/{STATE_FILE}"))
    found = [read_job(run_dir, step) for step in steps]
    return [job for job in found if job is not None]


def open_jobs(run_dir: Path) -> list[Job]:
    """What waits or has failed, by step; a settled one lets its checkpoint go even if a kill came before that."""
    jobs = all_jobs(run_dir)
    for job in jobs:
        if job.state == "done":
            settle(run_dir, job)
    return [job for job in jobs if job.state != "done"]


@contextmanager
def claimed(run_dir: Path, step: int) -> Iterator[bool]:
    """Whether this process may run the evaluation: no other one does. The claim ends with the process."""
    lock = FileLock(results_dir(run_dir, step) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def leased(checkpoint: Path) -> Iterator[None]:
    """Keep a run that is still training from removing the checkpoint meanwhile; a kill ends the lease."""
    lock = FileLock(checkpoint / f"evaluate-{socket.gethostname()}-{os.getpid()}{LEASE_SUFFIX}")
    with lock:
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
