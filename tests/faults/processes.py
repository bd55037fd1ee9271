"""A command with all the processes it starts: found by a mark in their environment, killed by role, gone or orphans."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# Every process that a command starts inherits it, also those that leave the command's session.
MARK = "MIRAGE_FAULTS_MARK"
Role = Literal["command", "rank", "child"]
# Programs that end by themselves some moments after the process that they serve, and hold nothing of the run.
_SERVANTS = ("multiprocessing.resource_tracker", "multiprocessing.semaphore_tracker")


@dataclass(frozen=True)
class Member:
    """One process of a command; its role is what a kill chooses by."""

    pid: int
    parent: int
    role: Role
    text: str


@dataclass
class Command:
    """A command under way in a session of its own, its output in `log`."""

    arguments: Sequence[str]
    mark: str
    folder: Path
    environ: Mapping[str, str]
    log: Path
    started: float = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("ab") as log:
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                list(self.arguments),
                cwd=self.folder,
                env={**self.environ, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def is_over(self) -> bool:
        """Whether the command itself has ended; what it started may still be there."""
        return self.process.poll() is not None

    def members(self) -> list[Member]:
        """All living processes of the command, itself first."""
        found = marked(self.mark, command=self.process.pid)
        return sorted(found, key=lambda member: (member.pid != self.process.pid, member.pid))

    def kill(self, pids: Sequence[int]) -> int:
        """kill -9 for each; returns how many were still there."""
        num_hit = 0
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                num_hit += 1
        return num_hit

    def kill_all(self) -> None:
        """kill -9 of everything, until nothing is left."""
        for _ in range(100):
            pids = [member.pid for member in self.members()]
            if not pids and self.is_over():
                return
            self.kill(pids)
            self.process.poll()
            time.sleep(0.02)

    def wait_until_gone(self, timeout_seconds: float) -> list[Member]:
        """Until the command and all that it started have ended; returns the orphans that are left then."""
        wait_for(lambda: self.is_over() and not self.members(), timeout_seconds=timeout_seconds, step_seconds=0.05)
        return self.members()


def wait_for(reached: Callable[[], bool], *, timeout_seconds: float, step_seconds: float = 0.002) -> bool:
    """Whether `reached` became true in time."""
    deadline = time.monotonic() + timeout_seconds
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(step_seconds)
    return True


def marked(mark: str, *, command: int) -> list[Member]:
    """Living processes with this mark in the environment that they were started with (Linux's /proc)."""
    wanted = f"{MARK}={mark}".encode()
    found: list[tuple[int, int, bool, str]] = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            variables = Path(entry.path, "environ").read_bytes().split(b"\0")
            if wanted not in variables:
                continue
            state, parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:2]
            if state in "ZX":
                continue
            text = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            is_rank = any(variable.startswith(b"LOCAL_RANK=") for variable in variables)
            found.append((int(entry.name), int(parent), is_rank, text))
    ranks = {pid for pid, parent, is_rank, _ in found if is_rank and parent == command}
    members = []
    for pid, parent, _, text in found:
        role: Role = "command" if pid == command else "rank" if pid in ranks else "child"
        if not any(servant in text for servant in _SERVANTS):
            members.append(Member(pid, parent, role, text))
    return members
