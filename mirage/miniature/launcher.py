"""Starts the experiment's commands as processes of their own, each with a log, and ends them when it ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

LOG_FILE = "log.txt"
_GRACE_SECONDS = 10.0


class Launcher:
    """Runs commands to their end, several at a time if threads ask for it; `stop` ends all that are running."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], *, log: Path, one_core: bool) -> int:
        """The command's exit code; its output is added to `log`. 130 without a start where `stop` was called."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            with self._lock:
                if self._stopped:
                    return 130
                process = subprocess.Popen(
                    _resolved(command),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=_environment(command, one_core=one_core),
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)

    def stop(self) -> None:
        """End what runs, with everything that it has started, and start nothing more."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            _signal(process, signal.SIGTERM)
        for process in running:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _resolved(command: Sequence[str]) -> list[str]:
    """The command with programs of this environment, and for the launcher a port that no other run has."""
    program, *rest = command
    if program == "python":
        return [sys.executable, *rest]
    path = str(Path(sys.executable).parent / program)
    if program == "accelerate" and rest[:1] == ["launch"]:
        rest = ["launch", "--main_process_port", str(_free_port()), *rest[1:]]
    return [path, *rest]


def _environment(command: Sequence[str], *, one_core: bool) -> dict[str, str]:
    """One thread a process where processes share the cores; an evaluation that runs alone may take them all."""
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    if one_core or command[0] == "accelerate":
        environ["OMP_NUM_THREADS"] = "1"
    return environ


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_words(log: Path) -> str:
    """The line of a log that most likely says why it ended, or ''."""
    if not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]]
    telling = [line for line in lines if line.startswith(("error:", "stopped:")) or "Error:" in line]
    return next(iter([*telling, *[line for line in reversed(lines) if line]]), "")[:400]
