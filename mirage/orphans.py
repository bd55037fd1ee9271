"""A process that ends with the one that started it: a killed launcher leaves no ranks behind, a rank no workers."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# linux/prctl.h
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the system kill this process as soon as its parent ends, however it ends. On Linux; elsewhere nothing.

    `parent` is the process id that is expected: another one means that the parent has ended before this call, and this
    process ends at once. The kill is kill -9, as a rank without its launcher can do nothing but hold the run folder.
    """
    if sys.platform != "linux":
        return
    expected = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected:
        os._exit(1)
