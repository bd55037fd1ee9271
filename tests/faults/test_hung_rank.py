"""A rank that hangs is named by the others, whose collective times out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.attempt import environment
from tests.faults.chain import Inputs, _train_full
from tests.faults.processes import Command, wait_for

# A launcher's script whose second step never begins on one rank.
SCRIPT = """
import os, sys, time
from datetime import timedelta
from mirage.errors import run_main
from mirage.training import distributed, hangs, loss
distributed.COLLECTIVE_TIMEOUT, hangs.ANSWER_TIMEOUT = timedelta(seconds=20), timedelta(seconds=8)
sound, calls = loss.PackedLossModel.forward, []
def forward(self, batch):
    calls.append(None)
    if len(calls) == 3 and os.environ["RANK"] == "{rank}":
        while True:
            time.sleep(1)
    return sound(self, batch)
loss.PackedLossModel.forward = forward
from mirage.train import main
run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_hangs_is_named(rank: int, inputs: Inputs, tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(SCRIPT.format(rank=rank))
    arguments = [str(script) if arg.endswith("mirage/train.py") else arg for arg in _train_full(inputs, "")]
    assert arguments[0] == sys.executable
    run = Command(arguments, str(tmp_path), tmp_path, environment(tmp_path), tmp_path / "log.txt")
    assert wait_for(run.is_over, timeout_seconds=400, step_seconds=0.1)
    assert run.wait_until_gone(60) == []
    said = (tmp_path / "log.txt").read_text()
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert run.process.returncode != 0 and len(errors) == 1, said[-3000:]
    assert f"error: rank {rank} did not take part in step" in errors[0]
