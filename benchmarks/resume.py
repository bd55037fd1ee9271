"""Measure what kills and checkpoints cost: seconds from `kill -9` to the next step, checkpoints' share of the time.

One invocation trains the same recipe with the real command (`accelerate launch`, two CPU processes, DeepSpeed):

* without checkpoints, the baseline, whose start from nothing is also what a restart is compared with;
* with a checkpoint every `--every` steps, once waited for as it is written, once written while training goes on:
  seconds that training waits for a checkpoint, beside those of a step, and so their share at any interval;
* killed (kill -9 of every process) some steps after a checkpoint and started again at once, `--kills` times: seconds to
  the start of the ranks' program, its imports, loading (data, model, optimiser state), and the first step.

Times are one clock's (CLOCK_MONOTONIC, which all processes of a machine share). Other programs on the machine slow
all of it down; the ratios suffer less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SETTINGS = (
    "eval.mode=off", "tracking.wandb=off", "tracking.console=quiet", "train.epochs=1000", "data.num_workers=0",
    "data.sources=[{split: train}, {split: train_twins}, {split: train_general}]",
)  # fmt: skip
# The first steps allocate memory.
SKIPPED_STEPS = 2
# What each rank runs: the ordinary program, whose first rank notes when it gets where.
PROGRAM = """
import json, os, sys, time
sys.path.insert(0, {root!r})
events = open(os.environ["RESUME_EVENTS"], "a", buffering=1) if os.environ.get("RANK", "0") == "0" else None
def note(event, **more):
    if events:
        events.write(json.dumps(dict(event=event, at=time.monotonic(), **more)) + "\\n")
note("program")
from mirage.errors import run_main
from mirage.train import leave, main
from mirage.training.saver import CheckpointSaver
from mirage.training.trainer import Trainer
def timed(owner, name, event, counts=lambda self: True):
    inner = getattr(owner, name)
    def call(self, *args, **more):
        started, counted = time.monotonic(), counts(self)
        found = inner(self, *args, **more)
        if counted:
            note(event, seconds=time.monotonic() - started)
        return found
    setattr(owner, name, call)
timed(Trainer, "_train_step", "step")
timed(CheckpointSaver, "_collect", "collected")
timed(CheckpointSaver, "finish", "finished", lambda self: self._part is not None)
start = CheckpointSaver.start
def start_and_wait(self, *, is_due):
    start(self, is_due=is_due)
    self.finish()
if "RESUME_WAIT" in os.environ:
    CheckpointSaver.start = start_and_wait
setup = Trainer.setup
def set_up(self):
    note("imported")
    setup(self)
    note("loaded")
Trainer.setup = set_up
run_main(lambda: leave(main()))
"""
Events = list[dict[str, Any]]


def main() -> None:
    """Run everything and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mini_internvl_mis")
    parser.add_argument("--steps", type=int, default=24, help="steps of the timed runs")
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints of the timed run")
    parser.add_argument("--intervals", type=int, nargs="*", default=[4, 20, 100, 160], help="to reckon the share for")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="a recipe setting")
    arguments = parser.parse_args()
    from tests.support.dataset import write_dataset

    with tempfile.TemporaryDirectory(prefix="mirage-resume-") as scratch:
        folder = Path(scratch)
        write_dataset(folder / "data", edge=56, seed_rows=40)
        (folder / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
        plain = finish(folder, "plain", arguments, every=1_000_000)
        waiting = finish(folder, "waiting", arguments, every=arguments.every, RESUME_WAIT="1")
        saving = finish(folder, "saving", arguments, every=arguments.every)
        show_overhead(plain, waiting, saving, num_bytes(folder / "saving"), arguments)
        resumed = [kill_and_resume(folder, arguments, number) for number in range(arguments.kills)]
        if resumed:
            show_resume(plain, resumed)


# Runs


def start(
    folder: Path, name: str, arguments: argparse.Namespace, *, every: int, **more: str
) -> subprocess.Popen[bytes]:
    """The real command on the run folder `name`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu2.yaml",
        "--main_process_port", str(port), str(folder / "program.py"), f"recipe={arguments.recipe}",
        f"run_dir={folder / name}", f"data.dir={folder / 'data'}", f"train.max_steps={arguments.steps}",
        f"checkpoint.every_steps={every}", *SETTINGS, *arguments.set,
    ]  # fmt: skip
    environ = os.environ | {"MIRAGE_CACHE": str(folder / "cache"), "RESUME_EVENTS": str(folder / f"{name}.jsonl")}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL)


def read_events(folder: Path, name: str) -> Events:
    """What the first rank has noted so far."""
    file = folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def finish(folder: Path, name: str, arguments: argparse.Namespace, *, every: int, **more: str) -> Events:
    """A run from its start to its end."""
    began = time.monotonic()
    process = start(folder, name, arguments, every=every, **more)
    try:
        if process.wait() != 0:
            sys.exit(f"the run {name} failed")
    finally:
        kill_tree(process)
    return [{"event": "begin", "at": began}, *read_events(folder, name)]


def kill_and_resume(folder: Path, arguments: argparse.Namespace, number: int) -> Events:
    """Kill a run two steps after its first checkpoint, start it again, and kill it after its next step."""
    name = f"killed-{number}"
    process = start(folder, name, arguments, every=arguments.every)
    wait_for_steps(folder, name, process, saved=1, more=2)
    kill_tree(process)
    seen = len(read_events(folder, name))
    began = time.monotonic()
    process = start(folder, name, arguments, every=arguments.every)
    wait_for_steps(folder, name, process, saved=0, more=1, skip=seen)
    kill_tree(process)
    events = [{"event": "begin", "at": began}, *read_events(folder, name)[seen:]]
    shutil.rmtree(folder / name)
    return events


def wait_for_steps(
    folder: Path, name: str, process: subprocess.Popen[bytes], *, saved: int, more: int, skip: int = 0
) -> None:
    """Until `saved` checkpoints are written and `more` steps are made after the last of them."""
    while True:
        events = [event["event"] for event in read_events(folder, name)[skip:]] if exists(folder, name) else []
        if events.count("finished") >= saved:
            after = events[len(events) - events[::-1].index("finished") :] if saved else events
            if after.count("step") >= more:
                return
        if process.poll() is not None:
            sys.exit(f"the run {name} ended before it could be killed: raise --steps")
        time.sleep(0.01)


def exists(folder: Path, name: str) -> bool:
    return (folder / f"{name}.jsonl").exists()


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the launcher and all that it started."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)


def num_bytes(run_dir: Path) -> int:
    """Of the newest checkpoint."""
    last = sorted(run_dir.glob("checkpoint-*"))[-1]
    return sum(path.stat().st_size for path in last.rglob("*") if path.is_file())


# Tables


def durations(events: Events, name: str) -> list[float]:
    """Seconds of each event of that name."""
    return [event["seconds"] for event in events if event["event"] == name]


def waited(events: Events) -> list[float]:
    """Seconds that training waited for each checkpoint but the last, for which every run waits."""
    parts = zip(durations(events, "collected"), durations(events, "finished"), strict=True)
    return [collected + finished for collected, finished in parts][:-1]


def loop_seconds(events: Events) -> float:
    """From the first counted step's start to the end of the last step."""
    steps = [event for event in events if event["event"] == "step"]
    first = steps[SKIPPED_STEPS]
    return steps[-1]["at"] - (first["at"] - first["seconds"])


def show_overhead(plain: Events, waiting: Events, saving: Events, size: int, arguments: argparse.Namespace) -> None:
    """What a checkpoint costs beside a step, and at which interval it is what share."""
    step = statistics.median(durations(plain, "step")[SKIPPED_STEPS:])
    base = loop_seconds(plain)
    table = Table(
        "", "waited for", "beside training", title=f"checkpoints, {arguments.recipe}, {size / 1e6:.1f} MB each"
    )
    runs = (waiting, saving)

    def row(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)

    costs = [statistics.median(waited(events)) for events in runs]
    row("a step, median of the run without checkpoints (baseline), s", [f"{step:.3f}"] * 2)
    row("training waits for a checkpoint, median, s", [f"{cost:.3f}" for cost in costs])
    row("  of it: copying the state", [f"{statistics.median(durations(run, 'collected')):.3f}" for run in runs])
    row("  in steps", [f"{cost / step:.2f}" for cost in costs])
    name = f"a run with one every {arguments.every} steps, beside the baseline"
    row(name, [f"{loop_seconds(events) / base:.3f} ({loop_seconds(events):.1f} s)" for events in runs])
    for every in arguments.intervals:
        shares = [f"{cost / (cost + every * step):.1%}" for cost in costs]
        row(f"share of training time, one every {every} steps", shares)
    Console(width=110).print(table)


def show_resume(plain: Events, resumed: list[Events]) -> None:
    """The parts of a restart, beside those of a start from nothing."""
    names = [("program", "launcher until the ranks' program starts"), ("imported", "imports"),
             ("loaded", "data, model, engine, optimiser state"), ("step", "first step")]  # fmt: skip
    table = Table("from kill -9 to the next step", "restart, median s", "max s", "start from nothing, s", "ratio",
                  title=f"{len(resumed)} kills")  # fmt: skip
    before = "begin"
    for name, text in names:
        taken = [at(events, name) - at(events, before) for events in resumed]
        fresh = at(plain, name) - at(plain, before)
        add(table, text, taken, fresh)
        before = name
    add(
        table,
        "all",
        [at(events, "step") - at(events, "begin") for events in resumed],
        at(plain, "step") - at(plain, "begin"),
    )
    Console(width=110).print(table)


def add(table: Table, text: str, taken: list[float], fresh: float) -> None:
    median = statistics.median(taken)
    table.add_row(text, f"{median:.2f}", f"{max(taken):.2f}", f"{fresh:.2f}", f"{median / fresh:.2f}")


def at(events: Events, name: str) -> float:
    """When the first event of that name came."""
    return next(event["at"] for event in events if event["event"] == name)


if __name__ == "__main__":
    main()
