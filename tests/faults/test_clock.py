"""A clock that jumps: time-outs and durations come from the monotonic clock, and no result depends on the time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.faults.attempt import environment
from tests.faults.chain import ROOT, Inputs, _train_full, names_aside, result
from tests.faults.processes import Command, wait_for

# Where the time of day is meant: it is compared with files' own times, with a date that a server names, or with the
# time that wandb puts into a folder's name.
WALL_CLOCK = {
    "mirage/training/failures.py": 1,
    "mirage/data/tensor_store.py": 1,
    "mirage/endpoint/faults.py": 1,
    "mirage/tracking/wandb_run.py": 1,
}
# A launcher's script: the clock is set forwards and back by a day, again and again.
SCRIPT = """
import itertools, sys, time
sound, jumps = time.time, itertools.cycle([0, 86_400, 0, -86_400])
time.time = lambda: sound() + next(jumps)
time.time_ns = lambda: int(time.time() * 1e9)
sys.path.insert(0, {root!r})
from mirage.errors import run_main
from mirage.train import leave, main
run_main(lambda: leave(main()))
"""


def test_durations_and_timeouts_use_the_monotonic_clock() -> None:
    found = {}
    for folder in ("mirage", "data_gen"):
        for path in (ROOT / folder).rglob("*.py"):
            count = len(re.findall(r"\btime\.time(?:_ns)?\(\)|datetime\.(?:now|utcnow)\(", path.read_text()))
            if count:
                found[path.relative_to(ROOT).as_posix()] = count
    assert found == WALL_CLOCK


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "jump.py").write_text(SCRIPT.format(root=str(ROOT)))
    runs = {}
    for name in ("even", "jumps"):
        folder = tmp_path / name
        folder.mkdir()
        arguments = _train_full(inputs, "")
        if name == "jumps":
            arguments = [str(tmp_path / "jump.py") if arg.endswith("mirage/train.py") else arg for arg in arguments]
        run = Command(arguments, str(folder), folder, environment(folder), folder / "log.txt")
        assert wait_for(run.is_over, timeout_seconds=400, step_seconds=0.1)
        assert run.wait_until_gone(30) == [] and run.process.returncode == 0, (folder / "log.txt").read_text()[-3000:]
        runs[name] = result(folder)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        seconds = [value for line in lines for key, value in line.items() if key.endswith("_seconds")]
        assert seconds and all(-0.01 < value < 600 for value in seconds)
    assert runs["even"] == runs["jumps"] and names_aside(tmp_path / "jumps") == []
