"""kill -9 over the chain: a short form of the campaign by default, the whole one with `-m slow`."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import attempt as attempts
from tests.faults.attempt import Undisturbed, run_killed, run_undisturbed
from tests.faults.campaign import Campaign, main, summary
from tests.faults.chain import PARTS, Inputs, Part, names_aside, result
from tests.faults.processes import Member

BY_NAME = {part.name: part for part in PARTS}
# Ten lines, each put into the file at once; --torn leaves a temporary file, --child a process that nobody ends.
_SCRIPT = """
import subprocess, sys, time, pathlib
lines = pathlib.Path("lines")
if "--child" in sys.argv:
    subprocess.Popen(["sleep", "300"])
for number in range(len(lines.read_text().splitlines()) if lines.exists() else 0, 10):
    if "--torn" in sys.argv:
        pathlib.Path(f"half-{number}.tmp").write_text("x")
    text = "other" if "--other" in sys.argv and number == 7 and len(sys.argv) > 3 else "line"
    with lines.open("a") as file:
        file.write(f"{text} {number} {len(text) if '--count' in sys.argv else 0}\\n")
    time.sleep(0.1)
"""


def _lines(folder: Path) -> int:
    return len((folder / "lines").read_text().splitlines()) if (folder / "lines").exists() else 0


def _part(*flags: str) -> Part:
    import sys

    return Part(
        "lines", lambda _inputs, _address: [sys.executable, "-c", _SCRIPT, *flags], ("command",), 1.0, _lines,
        lambda _folder: [],
    )  # fmt: skip


def _killed(part: Part, whole: Undisturbed, folder: Path, *, number: int = 0) -> attempts.Attempt:
    return run_killed(
        part, Inputs(folder / "none"), folder / "work", whole=whole, number=number, seed=1, num_kills=2, address=""
    )


def test_the_harness_tells_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right commands survive; litter, other bytes and orphans are found."""
    monkeypatch.setattr(attempts, "GONE_SECONDS", 1.5)
    right = _part()
    whole = run_undisturbed(right, Inputs(tmp_path / "none"), tmp_path / "whole", address="")
    assert 0 < whole.first_seconds < whole.seconds and set(whole.result) == {"lines"}
    found = next(found for n in range(9) if (found := _killed(right, whole, tmp_path, number=n)).kills)
    assert found.faults == [] and found.kills[0].num_hit == 1 and found.kills[0].resume_seconds is not None
    assert any("half-" in fault for fault in _killed(_part("--torn"), whole, tmp_path).faults)
    other = replace(whole, result={"lines": "0"})
    assert "lines has other bytes" in _killed(right, other, tmp_path).faults
    orphans = _killed(_part("--child"), whole, tmp_path).faults
    assert any(fault.startswith("orphan after") and "sleep 300" in fault for fault in orphans)


def test_draws_depend_on_seed_part_and_number_alone() -> None:
    members = [Member(pid, 1, "rank", "") for pid in (5, 6, 7)] + [Member(9, 1, "command", "")]
    aims = {aim: attempts._victims(members, aim, random.Random(3)) for aim in ("rank", "ranks", "launcher", "all")}
    assert aims["ranks"] == [5, 6, 7] and aims["launcher"] == [9] and len(aims["all"]) == 4
    assert len(aims["rank"]) == 1 and attempts._victims(members, "rank", random.Random(3)) == aims["rank"]
    assert attempts._victims(members, "child", random.Random(3)) == aims["all"]


def test_sums_count_chains_and_kills() -> None:
    kill = {"target": "rank", "resume_seconds": 3.0, "gone_seconds": 1.0}
    records = [
        {"part": "train", "number": 0, "kills": [kill, {**kill, "resume_seconds": None}], "faults": []},
        {"part": "train", "number": 1, "kills": [kill], "faults": ["x has other bytes"]},
    ]
    found = summary(records)
    assert (found["kills"], found["survived"], found["lost"]) == (3, 1, 1)
    assert found["parts"]["train"]["median_resume_seconds"] == 3.0
    assert found["parts"]["train"]["faults"] == ["x has other bytes"]


def test_a_torn_line_of_the_campaign_is_run_again(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, seed=0, parts=PARTS)
    campaign.file.write_text('{"part": "make", "number": 0, "kills": [], "faults": []}\n{"part": "ma')
    assert [record["number"] for record in campaign.records()] == [0]


def test_shares_of_the_parts_are_a_whole() -> None:
    assert sum(part.share for part in PARTS) == pytest.approx(1.0)


def test_a_killed_drawing_process_costs_nothing(tmp_path: Path) -> None:
    """The cheapest part. Others' kills by default are in the tests of datagen, training, conversion and judging."""
    part, inputs = BY_NAME["make"], Inputs(tmp_path / "none")
    whole = run_undisturbed(part, inputs, tmp_path / "whole", address="")
    found = run_killed(
        part, inputs, tmp_path / "killed", whole=whole, number=0, seed=0, num_kills=1, address="", target="child"
    )
    assert found.faults == [] and [kill.target for kill in found.kills] == ["child"]
    assert names_aside(tmp_path / "killed") == [] and result(tmp_path / "killed") == whole.result
    assert "error: a process that draws pictures ended" in (tmp_path / "killed" / "log.txt").read_text()


@pytest.mark.slow
def test_no_kill_loses_anything(tmp_path: Path) -> None:
    """Some kills of every part. `python -m tests.faults.campaign --kills 200` is the whole campaign."""
    began = time.monotonic()
    assert main(["--kills", "24", "--seed", "1", "--out", str(tmp_path / "campaign")]) == 0
    assert time.monotonic() > began
