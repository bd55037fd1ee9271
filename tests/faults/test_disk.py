"""A full disk and a read-only folder: one message, nothing torn, and the same command goes on once there is room."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors import SafetensorError

from mirage.errors import describe_refusal
from mirage.files import temporary_of, write_atomic
from mirage.training.checkpoint import Written
from tests.faults.attempt import environment, run_undisturbed
from tests.faults.chain import PARTS, Inputs, names_aside, result
from tests.faults.processes import Command, wait_for

BY_NAME = {part.name: part for part in PARTS}


def test_a_full_disk_leaves_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    name = temporary_of(path).name
    left, living = (tmp_path / name.replace(str(os.getpid()), str(pid)) for pid in (gone.pid, os.getppid()))
    for file in (left, living, tmp_path / ".other.json.host.1.tmp"):
        file.write_text("half")
    write_atomic(path, "new")
    assert not left.exists() and living.exists() and (tmp_path / ".other.json.host.1.tmp").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "x", "a/b"), "a/b: no space left on the disk; make room"),
        (OSError(errno.EDQUOT, "x"), "no space left on the disk"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left on the disk"),
        (PermissionError(errno.EACCES, "x", "a"), "a: cannot be written or read (Permission denied)"),
        (OSError(errno.EROFS, "x", "a"), "a: cannot be written or read (Read-only file system)"),
        (OSError(errno.ENOENT, "x", "a"), None),
        (ValueError("y"), None),
    ],
)
def test_which_errors_are_the_disks(error: Exception, expected: str | None) -> None:
    found = describe_refusal(error)
    assert found is None if expected is None else found is not None and found.startswith(expected)


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = 'from mirage.orphans import die_with_parent; import time; die_with_parent(); print(1, flush=True);'\n"
        "subprocess.Popen([sys.executable, '-c', child + 'time.sleep(300)']).wait()\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "1\n"
    (child,) = psutil.Process(run.pid).children()
    run.kill()
    run.wait()
    assert wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, timeout_seconds=20)


def test_what_one_rank_could_not_write_is_kept_for_all() -> None:
    written = Written()
    with written.caught():
        raise OSError(errno.ENOSPC, "x", "f")
    with written.caught():
        raise OSError(errno.EACCES, "x", "g")
    assert written.reason is not None and written.reason.startswith("f: no space left")
    with pytest.raises(KeyError), written.caught():
        raise KeyError


# A file system of its own


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=64m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def run_part(name: str, inputs: Inputs, folder: Path, scratch: Path, *, tag: str) -> tuple[int, str]:
    """The part's command with caches and temporary files elsewhere: exit code and what it said."""
    scratch.mkdir(exist_ok=True)
    log = scratch / f"{tag}.txt"
    run = Command(BY_NAME[name].arguments(inputs, ""), f"{folder}{tag}", folder, environment(scratch), log)
    assert wait_for(run.is_over, timeout_seconds=400, step_seconds=0.05)
    assert run.wait_until_gone(60) == []
    return run.process.returncode, log.read_text(errors="replace")


def check_message(said: str, expected: str) -> None:
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    own = said.split("torch/distributed/elastic")[0]
    assert errors and all(expected in line.lower() for line in errors), said[-3000:]
    assert "Traceback" not in own, said[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("make", 0.5), ("pipeline", 0.5), ("evaluate", 0.5), ("train", 0.6)])
def test_a_full_disk(name: str, share: float, inputs: Inputs, disk: Path, tmp_path: Path) -> None:
    part = BY_NAME[name]
    whole = run_undisturbed(part, inputs, disk / "whole", address="")
    for name_inside in ("cache", "tmp"):
        shutil.rmtree(disk / "whole" / name_inside)
    size = shutil.disk_usage(disk).used
    shutil.rmtree(disk / "whole")
    (disk / "work").mkdir()
    remount(disk, f"size={int(size * share)}")
    code, said = run_part(name, inputs, disk / "work", tmp_path / "scratch", tag="full")
    assert code != 0
    check_message(said, "no space left on")
    assert part.problems(disk / "work") == []
    remount(disk, "size=64m")
    code, said = run_part(name, inputs, disk / "work", tmp_path / "scratch", tag="again")
    assert code == 0, said[-3000:]
    assert result(disk / "work") == whole.result and names_aside(disk / "work") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["make", "pipeline", "convert", "evaluate", "train"])
def test_a_read_only_folder(name: str, inputs: Inputs, disk: Path, tmp_path: Path) -> None:
    remount(disk, "ro")
    code, said = run_part(name, inputs, disk, tmp_path / "scratch", tag="ro")
    assert code != 0
    check_message(said, "read-only file system")
