"""The miniature experiment's conditions, plan and runner, with a launcher that writes run folders instead of runs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mirage.errors import UserError
from mirage.evals.tasks import find_task
from mirage.miniature import experiment, plan
from mirage.miniature.conditions import (
    BASE,
    CONDITIONS,
    FAMILIES,
    MAIN,
    QUICK_CONDITIONS,
    QUICK_MAX_SAMPLES,
    SEEDS,
    TRAINED,
    find_conditions,
)
from mirage.miniature.experiment import make_data as ensure_data
from mirage.miniature.experiment import run_jobs
from mirage.miniature.launcher import Launcher, last_words
from mirage.miniature.outcomes import kind_of
from mirage.miniature.plan import Job, Options, commands, plan_jobs, quick, state
from mirage.tracking.console import make_console
from tests.support.miniature import FakeRuns, make_data

TASKS = ("mis_easy", "mis_hard", "twins", "general")


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setattr(plan, "base_fingerprint", lambda family: "base")
    data = make_data(tmp_path / "data")
    return Options(out=tmp_path / "runs", data_dir=data, tasks=TASKS, repeat=False)


def go(options: Options, runs: FakeRuns) -> int:
    return run_jobs(plan_jobs(options), runs, lanes=options.lanes, console=make_console("quiet"))


def small(options: Options) -> Options:
    return dataclasses.replace(options, families=("internvl",), seeds=(0,), conditions=(BASE, "vlguard", MAIN))


# Conditions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("condition", TRAINED)
def test_each_condition_has_a_recipe_for_each_family(condition: str, family: str, options: Options) -> None:
    job = next(job for job in plan_jobs(options) if (job.family, job.condition.key) == (family, condition))
    recipe = job.recipe()
    assert (recipe.model.family, recipe.model.path) == (family, f"shipped:{family}")
    assert recipe.train.zero_stage == 3 and not recipe.eval.at_start
    assert recipe.eval.tasks == TASKS and recipe.data.dir == options.data_dir


def test_conditions_differ_in_letter_and_recipe_and_name_known_tasks() -> None:
    assert len({item.letter for item in CONDITIONS.values()}) == len(CONDITIONS)
    assert len({item.recipe for item in CONDITIONS.values()}) == len(CONDITIONS)
    for item in CONDITIONS.values():
        for task in item.tasks:
            metrics = {metric.name for metric in find_task(task).metrics}
            headline = {"risky": "asr", "benign": "refused", "general": "accuracy"}[kind_of(task)]
            assert headline in metrics, task


def test_an_unknown_condition_is_named() -> None:
    with pytest.raises(UserError, match="no condition 'mise'; conditions are base, textual"):
        find_conditions(("base", "mise"))


# Plan


def test_a_seed_is_finished_before_the_next_and_a_family_before_the_next(options: Options) -> None:
    jobs = plan_jobs(dataclasses.replace(options, repeat=True))
    order = [(job.family, job.seed) for job in jobs]
    assert order == [
        (family, seed)
        for family in FAMILIES
        for seed, number in ((None, 1), *((seed, len(TRAINED)) for seed in SEEDS), (0, 1))
        for _ in range(number)
    ]
    assert len({job.folder for job in jobs}) == len(jobs)
    assert [job.name for job in jobs if job.folder.name == "seed-0-again"] == [
        f"{family} {MAIN} seed 0 again" for family in FAMILIES
    ]


def test_quick_is_one_family_one_seed_and_few_samples(tmp_path: Path) -> None:
    options = quick(Options(out=tmp_path))
    jobs = plan_jobs(options)
    assert [job.condition.key for job in jobs] == [BASE, *QUICK_CONDITIONS]
    assert {job.family for job in jobs} == {"internvl"} and {job.seed for job in jobs} == {None, 0}
    assert all(f"max_samples={QUICK_MAX_SAMPLES}" in shlex.join(commands(job, now="open")) for job in jobs)


def test_commands_are_the_ordinary_ones(options: Options) -> None:
    base, first = plan_jobs(small(options))[:2]
    told = commands(base, now="open")
    assert told[:3] == ["mirage", "evaluate", "shipped:internvl"] and f"out_dir={base.folder}" in told
    told = commands(first, now="open")
    assert told[:5] == ["accelerate", "launch", "--config_file", "recipes/accelerate/cpu2.yaml", "mirage/train.py"]
    assert {"recipe=mini_internvl_vlguard", "train.seed=0", "eval.at_start=false", "tracking.wandb=offline"} <= set(
        told
    )
    lane = dataclasses.replace(first, options=dataclasses.replace(options, lanes=2))
    assert commands(lane, now="open")[4:6] == ["--num_processes", "1"]


# Runner


def test_what_is_done_is_not_run_again(options: Options) -> None:
    runs, options = FakeRuns(options.data_dir), small(options)
    assert go(options, runs) == 0
    assert [command[0] for command in runs.commands] == ["mirage", "accelerate", "accelerate"]
    assert [state(job) for job in plan_jobs(options)] == ["done"] * 3
    runs.commands.clear()
    assert go(options, runs) == 0 and runs.commands == []


def test_a_run_that_was_cut_is_continued(options: Options) -> None:
    runs, options = FakeRuns(options.data_dir), small(options)
    go(options, runs)
    job = plan_jobs(options)[1]
    (job.folder / "evals" / "step-000020" / "results.json").unlink()
    runs.commands.clear()
    assert state(job) == "open" and go(options, runs) == 0
    assert runs.commands == [list(commands(job, now="open"))]


def test_a_task_that_was_added_is_measured_without_training(options: Options) -> None:
    runs, options = FakeRuns(options.data_dir), small(options)
    go(options, runs)
    runs.commands.clear()
    more = dataclasses.replace(options, tasks=(*TASKS, "twins@white"))
    assert go(more, runs) == 0
    assert [command[:2] for command in runs.commands] == [["mirage", "evaluate"]] * 3
    assert runs.commands[1][2].endswith("vlguard/seed-0/checkpoint-000020")
    assert [state(job) for job in plan_jobs(more)] == ["done"] * 3


def test_one_failure_stops_no_other_run_and_says_why(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    runs, options = FakeRuns(options.data_dir, failing=("vlguard",)), small(options)
    assert run_jobs(plan_jobs(options), runs, lanes=1, console=make_console("plain")) == 1
    told = capsys.readouterr().out
    assert "internvl vlguard seed 0 failed after" in told and "exit code 3: error: the disk is full (" in told
    assert "2 of 3 runs are done, 1 failed (internvl vlguard seed 0)" in told
    assert [state(job) for job in plan_jobs(options)] == ["done", "open", "done"]


@pytest.mark.parametrize("kind", ["settings", "data", "base"])
def test_a_result_of_something_else_is_neither_taken_nor_replaced(
    kind: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, options = FakeRuns(options.data_dir), small(options)
    go(options, runs)
    if kind == "settings":
        file = options.out / "internvl" / "vlguard" / "seed-0" / "recipe.json"
        file.write_text(file.read_text(encoding="utf-8").replace('"lr": 0.001', '"lr": 0.5'), encoding="utf-8")
        message = "train.lr was 0.5 and is 0.001"
    elif kind == "data":
        with (options.data_dir / "rows.jsonl").open("a") as rows:
            rows.write("\n")
        message = "was measured on other rows"
    else:
        monkeypatch.setattr(plan, "base_fingerprint", lambda family: "another base")
        message = "was trained from other weights than shipped:internvl"
    with pytest.raises(UserError, match=message):
        state(plan_jobs(options)[1])
    runs.commands.clear()
    assert go(options, runs) > 0
    assert not any("vlguard" in word for command in runs.commands for word in command)


def test_an_interrupt_ends_what_runs(options: Options) -> None:
    class Interrupted(FakeRuns):
        def run(self, *args: object, **kwargs: object) -> int:
            raise KeyboardInterrupt

    runs = Interrupted(options.data_dir)
    with pytest.raises(KeyboardInterrupt):
        go(small(options), runs)
    assert runs.stopped


def test_lanes_run_two_at_a_time_with_one_process_each(options: Options) -> None:
    class Meeting(FakeRuns):
        both = threading.Barrier(2)

        def run(self, command: Sequence[str], *, log: Path, one_core: bool) -> int:
            assert one_core
            if command[0] == "accelerate":
                self.both.wait(timeout=10)  # broken, and an error, unless the other run is under way too
            return super().run(command, log=log, one_core=one_core)

    options = dataclasses.replace(small(options), lanes=2)
    runs = Meeting(options.data_dir)
    assert go(options, runs) == 0
    assert all("--num_processes" in command for command in runs.commands if command[0] == "accelerate")


def test_data_is_made_only_where_it_is_missing(tmp_path: Path) -> None:
    runs, console = FakeRuns(tmp_path), make_console("quiet")
    ensure_data(make_data(tmp_path / "there"), runs, console)
    assert runs.commands == []
    runs = FakeRuns(tmp_path, failing=("data_gen",))
    with pytest.raises(UserError, match="missing could not be made: error: the disk is full"):
        ensure_data(tmp_path / "missing", runs, console)
    assert runs.commands[0][:4] == ["python", "-m", "data_gen", "make"] and "mini" in runs.commands[0]


# Command line


def test_dry_run_lists_the_commands_and_starts_nothing(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--dry-run", "--families", "qwen2_vl", "--seeds", "4,7", "--conditions", "base,direct"]
    assert experiment.main([*told, "--out", str(tmp_path / "x"), "--data", str(options.data_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["mirage", "accelerate", "accelerate"]
    assert "train.seed=7" in lines[2] and "model.path=shipped:qwen2_vl" in lines[2]
    assert not (tmp_path / "x").exists()


def test_unknown_families_are_named() -> None:
    with pytest.raises(UserError, match="--families llava: must name some of internvl, qwen2_vl"):
        experiment.main(["--families", "llava", "--dry-run"])


def test_a_failed_run_is_exit_code_1_and_the_page_is_still_written(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRuns(options.data_dir, failing=("vlguard/",))
    monkeypatch.setattr(experiment, "Launcher", lambda: fake)
    monkeypatch.setattr(experiment, "make_console", lambda mode: make_console("quiet"))
    told = ["--quick", "--out", str(tmp_path / "q"), "--data", str(options.data_dir)]
    assert experiment.main(told) == 1
    page = (tmp_path / "q" / "docs" / "experiment.md").read_text(encoding="utf-8")
    assert "InternVL, tiny: (c) VLGuard refusals was not run" in page and "Qwen2-VL, tiny: no run at all" in page
    fake.failing = ()
    assert experiment.main(told) == 0


# Launcher


def test_launcher_runs_a_command_with_its_log_and_code(tmp_path: Path) -> None:
    log = tmp_path / "a" / "log.txt"
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit('error: no such thing')"
    assert Launcher().run(["python", "-c", code], log=log, one_core=True) == 1
    text = log.read_text(encoding="utf-8").splitlines()
    assert text[0].startswith("$ python -c") and sorted(text[-2:]) == ["1", "error: no such thing"]
    assert last_words(log) == "error: no such thing"


def test_stop_ends_a_command_with_what_it_has_started(tmp_path: Path) -> None:
    launcher, log = Launcher(), tmp_path / "log.txt"
    inner = "print(7, flush=True); import time; time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    codes: list[int] = []
    run = threading.Thread(target=lambda: codes.append(launcher.run(["python", "-c", child], log=log, one_core=True)))
    began = time.monotonic()
    run.start()
    while not (log.is_file() and log.read_text(encoding="utf-8").endswith("7\n")) and time.monotonic() < began + 20:
        time.sleep(0.05)
    launcher.stop()
    run.join(timeout=20)
    assert codes == [-signal.SIGTERM] and time.monotonic() < began + 30


def test_a_stopped_launcher_starts_nothing(tmp_path: Path) -> None:
    launcher = Launcher()
    launcher.stop()
    assert launcher.run(["python", "-c", "print(1)"], log=tmp_path / "log.txt", one_core=True) == 130


def test_job_settings_round_trip_through_the_recipe(options: Options) -> None:
    job: Job = plan_jobs(options)[1]
    assert json.loads(plan.resolved_json(job.recipe()))["train"]["seed"] == 0
