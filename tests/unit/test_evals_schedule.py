"""Which checkpoints are measured and how fully; leases, claims, failures that are tried again, modes, the worker."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from pydantic import ValidationError

from mirage.config.loader import load_recipe, resolved_json
from mirage.config.schema import CheckpointConfig, EvalConfig, Recipe
from mirage.errors import RunStopped, UserError
from mirage.evals import hook as hook_module
from mirage.evals import worker
from mirage.evals.evaluate import EvaluationFailed, together
from mirage.evals.guards import Alarm
from mirage.evals.hook import LOGGED_FILE, EvalCallback, run_job
from mirage.evals.schedule import (
    STATE_FILE,
    Job,
    all_jobs,
    choose_tier,
    claimed,
    enqueue,
    leased,
    open_jobs,
    read_job,
    results_dir,
    settle,
    tier_config,
)
from mirage.tracking.console import make_console
from mirage.training import trainer as trainer_module
from mirage.training.checkpoint import WAITING_LEASE, leases, publish, ready_checkpoints, retire
from mirage.training.trainer import Trainer

CPU = torch.device("cpu")


def add_checkpoint(run_dir: Path, step: int) -> Path:
    aside = run_dir / f".checkpoint-{step:06d}.partial"
    (aside / "model").mkdir(parents=True)
    (aside / "model" / "model.safetensors").write_text(str(step))
    publish(aside, run_dir / f"checkpoint-{step:06d}", step=step)
    return run_dir / f"checkpoint-{step:06d}"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (0, 10, 20):
        add_checkpoint(tmp_path / "run", step)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("settings", "tiers"),
    [
        ({}, "full full full full full full"),
        ({"smoke_samples": 5}, "full smoke smoke smoke smoke full"),
        ({"smoke_samples": 5, "full_every": 2}, "full smoke full smoke full full"),
    ],
)
def test_tiers(settings: dict[str, int], tiers: str) -> None:
    config = EvalConfig(**settings)
    found = [choose_tier(config, step=10 * n, number=n, is_last=n == 5) for n in range(6)]
    assert " ".join(found) == tiers
    assert tier_config(config, "full") == config
    if "smoke_samples" in settings:
        assert tier_config(config, "smoke").max_samples == 5


@pytest.mark.parametrize("settings", [{"full_every": 2}, {"smoke_samples": 50, "max_samples": 50}])
def test_tiers_that_have_no_effect_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=r"eval\.(full_every|smoke_samples)"):
        EvalConfig(**settings)


def test_the_end_of_a_run_retires_what_a_kill_left(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the last checkpoint and the removal of older ones leaves all of them, and no step to do."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    trainer = Trainer(load_recipe(["recipe=tiny_internvl_mis", f"run_dir={run_dir}", "checkpoint.keep_last=1"]))
    trainer.step, trainer._roll_call, trainer._accelerator = 20, None, None
    for name in ("setup", "_train"):
        monkeypatch.setattr(trainer, name, lambda: None)
    monkeypatch.setattr(trainer_module, "end", lambda accelerator: None)
    trainer.fit()
    assert [path.name for path in ready_checkpoints(run_dir)] == ["checkpoint-000000", "checkpoint-000020"]


def test_a_checkpoint_stays_until_its_evaluation_is_done(run_dir: Path) -> None:
    for step in (30, 40):
        add_checkpoint(run_dir, step)
    enqueue(run_dir, Job(10, "full"))
    enqueue(run_dir, Job(20, "smoke"))
    assert [path.name for path in retire(run_dir, keep_last=1)] == ["checkpoint-000030"]
    settle(run_dir, Job(10, "full", "failed", "the judge is down"))
    assert retire(run_dir, keep_last=1) == []
    settle(run_dir, Job(10, "full", "done"))
    settle(run_dir, Job(20, "smoke", "done"))
    assert [path.name for path in retire(run_dir, keep_last=1)] == ["checkpoint-000010", "checkpoint-000020"]
    assert [checkpoint.name for checkpoint in ready_checkpoints(run_dir)] == ["checkpoint-000000", "checkpoint-000040"]


def test_a_kill_between_result_and_lease_lets_the_checkpoint_go_at_the_next_look(run_dir: Path) -> None:
    enqueue(run_dir, Job(10, "full"))
    settle(run_dir, Job(10, "full", "done"))
    (run_dir / "checkpoint-000010" / WAITING_LEASE).touch()
    assert open_jobs(run_dir) == [] and leases(run_dir / "checkpoint-000010") == []


def _hold(checkpoint: Path, held: Any) -> None:
    with leased(checkpoint):
        held.set()
        time.sleep(60)


def test_a_killed_evaluation_holds_no_lease(run_dir: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(run_dir / "checkpoint-000010", held))
    process.start()
    assert held.wait(20)
    assert len(leases(run_dir / "checkpoint-000010")) == 1
    process.kill()
    process.join()
    assert leases(run_dir / "checkpoint-000010") == []
    with leased(run_dir / "checkpoint-000010"):
        assert len(leases(run_dir / "checkpoint-000010")) == 1


def test_states_are_read_back_and_damage_is_named(run_dir: Path) -> None:
    assert read_job(run_dir, 10) is None
    enqueue(run_dir, Job(20, "smoke"))
    enqueue(run_dir, Job(10, "full"))
    assert all_jobs(run_dir) == [Job(10, "full"), Job(20, "smoke")]
    (results_dir(run_dir, 10) / STATE_FILE).write_text("{")
    with pytest.raises(UserError, match=r"step-000010/state\.json is damaged"):
        open_jobs(run_dir)


def test_a_claim_is_one_process_s(run_dir: Path) -> None:
    enqueue(run_dir, Job(10, "full"))
    with claimed(run_dir, 10) as mine:
        assert mine
        script = "import sys; from pathlib import Path; from mirage.evals.schedule import claimed\n"
        script += f"with claimed(Path({str(run_dir)!r}), 10) as mine: sys.exit(7 if mine else 0)"
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    with claimed(run_dir, 10) as mine:
        assert mine


@pytest.mark.parametrize("failing", [0, 1, None])
def test_a_rank_that_fails_keeps_no_other_waiting(failing: int | None) -> None:
    told: list[str | None] = []

    def agree(failure: str | None) -> str | None:
        told.append(failure)
        return "rank 1: no memory" if failing == 1 else failure

    def work() -> int:
        if failing == 0:
            raise ValueError("bad\nluck")
        return 5

    if failing is None:
        assert together(work, agree) == 5
    else:
        with pytest.raises(ValueError if failing == 0 else EvaluationFailed, match=r"bad|no memory"):
            together(work, agree)
    assert told == ["ValueError: bad luck" if failing == 0 else None]


class _Tracker:
    is_open = False

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, metrics: dict[str, float], *, axis: str, step: int) -> None:
        self.steps.append(step)


def log_step(tracker: Any, folder: Path, *, step: int, **more: Any) -> None:
    """In place of sending an evaluation's numbers and tables."""
    tracker.log({"eval/alarms": 0.0}, axis="eval", step=step)


class _Measured:
    """In place of an evaluation: which steps were measured with how many samples; fails where told to."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int | None]] = []
        self.failing: Callable[[int], bool] = lambda step: False

    def __call__(self, checkpoint: Path, *, config: EvalConfig, step: int, **more: Any) -> None:
        assert checkpoint.is_dir()
        self.steps.append((step, config.max_samples))
        if self.failing(step):
            raise UserError("the judge is down")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> _Measured:
    found = _Measured()
    monkeypatch.setattr(hook_module, "evaluate_checkpoint", found)
    monkeypatch.setattr(hook_module, "check_evaluation", lambda *args, **more: None)
    monkeypatch.setattr(hook_module, "read_results", lambda folder: SimpleNamespace(
        metrics=lambda: {}, tasks={}, request="r", baseline=None
    ))  # fmt: skip
    monkeypatch.setattr(hook_module, "log_evaluation", log_step)
    monkeypatch.setattr(hook_module, "log_what_is_missing", lambda *args, **more: None)
    monkeypatch.setattr(hook_module, "show_results", lambda console, results, before: None)
    return found


def trainer_of(run_dir: Path, **settings: Any) -> Any:
    recipe = load_recipe(["recipe=tiny_internvl_mis", f"run_dir={run_dir}", "tracking.console=quiet"])
    checkpoint = CheckpointConfig(every_steps=10, keep_last=1)
    recipe = recipe.model_copy(update={"eval": EvalConfig(**settings), "checkpoint": checkpoint})
    return SimpleNamespace(
        recipe=recipe, run_dir=run_dir, rank=0, is_main=True, world_size=1, device=CPU, total_steps=40,
        tracker=_Tracker(),
    )  # fmt: skip


def train(trainer: Any, hook: EvalCallback) -> None:
    """Steps 30 and 40, as the trainer has them: start, then each checkpoint is written, told of, and old ones go."""
    hook.on_start(trainer)
    for step in (30, 40):
        hook.on_checkpoint(trainer, add_checkpoint(trainer.run_dir, step), step)
        retire(trainer.run_dir, keep_last=1)


def test_inline_measures_at_once_and_tries_failures_again_at_the_next_start(run_dir: Path, measured: Any) -> None:
    trainer = trainer_of(run_dir, smoke_samples=5)
    measured.failing = lambda step: step == 10
    train(trainer, EvalCallback())
    assert measured.steps == [(0, None), (10, 5), (20, 5), (30, 5), (40, None)]
    assert read_job(run_dir, 10) == Job(10, "smoke", "failed", "the judge is down")
    assert trainer.tracker.steps == [0, 20, 30, 40]
    assert (run_dir / "checkpoint-000010").is_dir() and not (run_dir / "checkpoint-000020").is_dir()
    measured.failing = lambda step: False
    again = trainer_of(run_dir, smoke_samples=5)
    measured.steps.clear()
    EvalCallback().on_start(again)
    assert measured.steps == [(10, 5)] and again.tracker.steps == [10]
    assert [job.state for job in all_jobs(run_dir)] == ["done"] * 5


@pytest.mark.parametrize("guards", ["warn", "stop"])
def test_an_alarm_ends_the_run_where_the_recipe_says_so(
    run_dir: Path, measured: Any, monkeypatch: pytest.MonkeyPatch, guards: str
) -> None:
    alarm = Alarm(
        guard="general", rate="general:accuracy", baseline_percent=90, percent=50, change_points=-40, margin_points=2,
        adjusted_p_value=1e-6, detectable_points=8,
    )  # fmt: skip

    def guard(folder: Path, baseline: Path, *, config: EvalConfig) -> list[Alarm]:
        alarms = [alarm] if folder.name == "step-000030" else []
        (folder / "guards.json").write_text(json.dumps({"alarms": [a.model_dump(mode="json") for a in alarms]}))
        return alarms

    monkeypatch.setattr(hook_module, "guard_evaluation", guard)
    monkeypatch.setattr(hook_module, "read_results", lambda folder: SimpleNamespace(
        metrics=lambda: {}, tasks={}, request="r", baseline="step 0"
    ))  # fmt: skip
    trainer = trainer_of(run_dir, guards=guards)
    if guards == "warn":
        train(trainer, EvalCallback())
        assert trainer.tracker.steps == [0, 10, 20, 30, 40]
        return
    with pytest.raises(RunStopped, match="step 30 is worse than step 0: general ability fell"):
        train(trainer, EvalCallback())
    assert trainer.tracker.steps == [0, 10, 20, 30]
    with pytest.raises(RunStopped, match="step 30"):
        EvalCallback().on_start(trainer)
    assert (run_dir / "checkpoint-000030").is_dir()


def test_the_run_leaves_what_a_worker_is_at(run_dir: Path, measured: Any) -> None:
    results_dir(run_dir, 10).mkdir(parents=True)
    with FileLock(results_dir(run_dir, 10) / ".lock", is_singleton=False):
        EvalCallback().on_start(trainer_of(run_dir))
    assert [step for step, _ in measured.steps] == [0, 20]


def test_without_a_number_of_steps_epochs_are_counted(run_dir: Path, measured: Any) -> None:
    trainer = trainer_of(run_dir, smoke_samples=5, full_every=2)
    trainer.recipe = trainer.recipe.model_copy(update={"checkpoint": CheckpointConfig()})
    # Epochs end where their last step does: 10 of 9.5, 20 of 19; what was retired still counts.
    trainer.plan, trainer.total_steps = SimpleNamespace(steps_per_epoch=9.5), 38
    shutil.rmtree(run_dir / "checkpoint-000010")
    EvalCallback().on_start(trainer)
    assert measured.steps == [(0, None), (20, None)]


def test_deferred_measures_after_the_last_step(run_dir: Path, measured: Any) -> None:
    trainer, hook = trainer_of(run_dir, mode="deferred"), EvalCallback()
    train(trainer, hook)
    assert measured.steps == [] and len(ready_checkpoints(run_dir)) == 5
    hook.on_end(trainer)
    assert [step for step, _ in measured.steps] == [0, 10, 20, 30, 40] == trainer.tracker.steps


def test_worker_mode_measures_nothing_in_the_run_and_logs_what_comes_in(run_dir: Path, measured: Any) -> None:
    trainer, hook = trainer_of(run_dir, mode="worker"), EvalCallback()
    hook.on_start(trainer)
    assert measured.steps == [] and [job.step for job in open_jobs(run_dir)] == [0, 10, 20]
    run_job(run_dir, Job(0, "full"), recipe=trainer.recipe, device=CPU, console=None)
    hook.on_checkpoint(trainer, add_checkpoint(run_dir, 30), 30)
    assert trainer.tracker.steps == [0]
    hook.on_end(trainer)
    assert trainer.tracker.steps == [0] and [job.step for job in open_jobs(run_dir)] == [10, 20, 30]


def test_step_0_is_left_out_where_the_recipe_says_so(run_dir: Path, measured: Any) -> None:
    EvalCallback().on_start(trainer_of(run_dir, at_start=False))
    assert [step for step, _ in measured.steps] == [10, 20]


# The worker


@pytest.fixture
def waiting(run_dir: Path, measured: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in worker mode whose training is over."""
    recipe: Recipe = trainer_of(run_dir, mode="worker").recipe
    recipe = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"wandb": "off"})})
    (run_dir / "recipe.json").write_text(resolved_json(recipe) + "\n")
    for step in (0, 10, 20):
        enqueue(run_dir, Job(step, "full"))
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.05)
    return run_dir


def logged(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["axis"] == "eval"]


def test_a_worker_measures_each_checkpoint_once_and_logs_after_training(waiting: Path, measured: Any) -> None:
    assert worker.work(waiting, device=CPU, once=False, console=make_console("quiet")) == 0
    assert [step for step, _ in measured.steps] == [0, 10, 20] == logged(waiting)
    assert worker.work(waiting, device=CPU, once=True, console=make_console("quiet")) == 0
    assert len(measured.steps) == 3 and len(logged(waiting)) == 3
    assert all((results_dir(waiting, step) / LOGGED_FILE).is_file() for step in (0, 10, 20))


def test_a_worker_tries_a_failure_once_and_tells(waiting: Path, measured: Any, capsys: Any) -> None:
    measured.failing = lambda step: step == 10
    assert worker.work(waiting, device=CPU, once=False, console=make_console("plain")) == 1
    assert [step for step, _ in measured.steps] == [0, 10, 20]
    captured = capsys.readouterr()
    assert "step 10 is not measured: the judge is down" in captured.err
    states = [line.split()[:3] for line in captured.out.splitlines() if "full" in line and "measuring" not in line]
    assert states == [["0", "full", "done"], ["10", "full", "failed"], ["20", "full", "done"]]
    measured.failing = lambda step: False
    assert worker.work(waiting, device=CPU, once=False, console=make_console("quiet")) == 0
    assert sorted(logged(waiting)) == [0, 10, 20]


def test_a_worker_leaves_what_another_has_claimed_and_waits_for_step_0(waiting: Path, measured: Any) -> None:
    with FileLock(results_dir(waiting, 0) / ".lock", is_singleton=False):
        assert worker.work(waiting, device=CPU, once=True, console=make_console("quiet")) == 0
    assert measured.steps == []


def test_while_training_goes_on_a_worker_stays_and_leaves_logging_to_it(waiting: Path, measured: Any) -> None:
    script = "import sys, time; from filelock import FileLock\n"
    script += f"lock = FileLock({str(waiting / '.lock')!r}); lock.acquire(); print('held', flush=True); time.sleep(2)"
    training = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert training.stdout is not None and training.stdout.readline() == "held\n"
    assert worker.is_training(waiting)
    started = time.monotonic()
    worker.work(waiting, device=CPU, once=False, console=make_console("quiet"))
    assert training.wait() == 0 and time.monotonic() - started > 1
    assert [step for step, _ in measured.steps] == [0, 10, 20] == logged(waiting)


def test_a_worker_is_no_rank_of_the_training() -> None:
    environ = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "WORLD_SIZE": "8", "HOME": "/", "ACCELERATE_X": "1"}
    worker.remove_launcher_variables(environ)
    assert environ == {"HOME": "/"}


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        worker.work(tmp_path, device=CPU, once=True, console=make_console("quiet"))


def test_a_kill_in_a_job_leaves_it_waiting(run_dir: Path, measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(checkpoint: Path, **more: Any) -> None:
        raise KeyboardInterrupt

    enqueue(run_dir, Job(10, "full"))
    monkeypatch.setattr(hook_module, "evaluate_checkpoint", killed)
    recipe = trainer_of(run_dir).recipe
    with pytest.raises(KeyboardInterrupt):
        run_job(run_dir, Job(10, "full"), recipe=recipe, device=CPU, console=None)
    assert read_job(run_dir, 10) == Job(10, "full") and len(leases(run_dir / "checkpoint-000010")) == 1
    shutil.rmtree(run_dir / "evals")
