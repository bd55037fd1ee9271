"""SIGTERM saves and ends a run with exit code 0, SIGUSR1 saves and goes on; both end with the undisturbed bytes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mirage.training import checkpoint as checkpoints
from mirage.training.signals import SignalWatch, Terminated
from tests.faults.attempt import environment
from tests.faults.chain import Inputs, _train_full, names_aside, result
from tests.faults.processes import Command, wait_for


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def watch() -> Any:
    found = SignalWatch()
    found.install()
    yield found
    found.restore()


def test_signals_wait_for_the_end_of_a_step_and_ranks_agree(watch: SignalWatch) -> None:
    with pytest.raises(Terminated), watch.waiting():
        send(signal.SIGUSR1)
        assert watch.numbers() == [1, 0] and not watch.save
        watch.agree([1, 0])
        assert watch.save and not watch.stop and watch.numbers() == [0, 0]
        watch.agree([0, 0])
        assert not watch.save
        send(signal.SIGTERM)
        watch.agree([0, 2])
        assert watch.stop and not watch.save


def test_sigterm_outside_of_steps_ends_the_run_at_once(watch: SignalWatch) -> None:
    with pytest.raises(Terminated) as ended:
        send(signal.SIGTERM)
    assert ended.value.code == 0 and not ended.value.agreed
    # The second one, of a launcher that hands on what a scheduler has sent already, leaves the end alone.
    send(signal.SIGTERM)
    with pytest.raises(Terminated), watch.waiting(), pytest.raises(Terminated), watch.at_once():
        raise AssertionError("SIGTERM was heard before")


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    watch = SignalWatch()
    watch.install()
    assert signal.getsignal(signal.SIGTERM) != before
    watch.restore()
    assert signal.getsignal(signal.SIGTERM) == before


def write_checkpoint(run_dir: Path, step: int, *, is_due: bool = True) -> Path:
    aside, final = run_dir / checkpoints.aside_name(step), run_dir / checkpoints.checkpoint_name(step)
    (aside / "resume").mkdir(parents=True)
    (aside / "resume" / "state.json").write_text("{}")
    checkpoints.publish(aside, final, step=step, is_due=is_due)
    return final


def test_a_checkpoint_for_a_signal_is_continued_from_and_replaced_by_the_next_one(tmp_path: Path) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    asked = write_checkpoint(tmp_path, 23, is_due=False)
    assert checkpoints.last_resumable(tmp_path) == asked
    assert [checkpoints.checkpoint_step(path) for path in checkpoints.due_checkpoints(tmp_path)] == [10, 20]
    assert checkpoints.retire(tmp_path, keep_last=2) == []
    write_checkpoint(tmp_path, 30)
    assert [path.name for path in checkpoints.retire(tmp_path, keep_last=2)] == ["checkpoint-000010", asked.name]


def started(inputs: Inputs, folder: Path, *, ignoring: bool = False, tag: str = "") -> Command:
    folder.mkdir(exist_ok=True)
    settings = [arg for arg in _train_full(inputs, "") if not arg.startswith(("train.max_steps", "checkpoint.every"))]
    arguments = [*settings, "train.max_steps=12", "checkpoint.every_steps=6"]
    environ = environment(folder)
    if ignoring:
        # As recipes/slurm/train.sbatch does: signals reach all processes of a job, and the launcher lets them pass.
        arguments = ["bash", "-c", "trap '' TERM USR1; exec \"$@\"", "bash", *arguments]
        environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    return Command(arguments, f"{folder}{tag}", folder, environ, folder / "log.txt")


def num_steps(folder: Path) -> int:
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for_steps(command: Command, folder: Path, count: int) -> None:
    assert wait_for(lambda: num_steps(folder) >= count or command.is_over(), timeout_seconds=300, step_seconds=0.05)
    assert not command.is_over(), (folder / "log.txt").read_text()[-2000:]


def ended(command: Command) -> int:
    assert wait_for(command.is_over, timeout_seconds=300, step_seconds=0.05)
    assert command.wait_until_gone(30) == []
    return command.process.returncode


@pytest.mark.slow
def test_a_run_that_is_told_to_save_or_to_stop_ends_with_the_same_bytes(inputs: Inputs, tmp_path: Path) -> None:
    whole, asked = tmp_path / "whole", tmp_path / "asked"
    assert ended(started(inputs, whole)) == 0
    # SIGUSR1: a checkpoint after the step, and the run goes on.
    run = started(inputs, asked, ignoring=True)
    wait_for_steps(run, asked, 1)
    for member in run.members():
        os.kill(member.pid, signal.SIGUSR1)
    assert wait_for(lambda: any(asked.glob("run/checkpoint-*/READY")), timeout_seconds=120)
    (saved,) = asked.glob("run/checkpoint-*")
    assert json.loads((saved / "READY").read_bytes())["on_signal"] is True
    assert checkpoints.checkpoint_step(saved) < 6
    wait_for_steps(run, asked, checkpoints.checkpoint_step(saved) + 1)
    # SIGTERM to every process of the job: all end well, the launcher too.
    for member in run.members():
        os.kill(member.pid, signal.SIGTERM)
    assert ended(run) == 0
    said = (asked / "log.txt").read_text()
    assert "the same command continues the run" in said and "Traceback" not in said
    step = checkpoints.checkpoint_step(checkpoints.last_resumable(asked / "run"))
    assert step < 12 and num_steps(asked) == step
    # SIGTERM to the launcher alone: it hands it on, and ends with torch's own code.
    run = started(inputs, asked, tag="-2")
    wait_for_steps(run, asked, step + 1)
    os.kill(run.process.pid, signal.SIGTERM)
    assert ended(run) in (0, 1)
    last = checkpoints.last_resumable(asked / "run")
    assert checkpoints.checkpoint_step(last) == num_steps(asked) > step
    assert ended(started(inputs, asked, tag="-3")) == 0
    assert result(asked) == result(whole) and names_aside(asked) == []


@pytest.mark.slow
def test_sigterm_ends_a_run_that_still_starts(inputs: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "early"
    folder.mkdir()
    script = [sys.executable, *(arg for arg in _train_full(inputs, "")[7:])]
    run = Command(script, str(folder), folder, environment(folder), folder / "log.txt")
    assert wait_for(lambda: (folder / "run" / "recipe.json").exists() or run.is_over(), timeout_seconds=200)
    os.kill(run.process.pid, signal.SIGTERM)
    assert ended(run) == 0, (folder / "log.txt").read_text()[-2000:]
