"""What a scheduler asks of a run: SIGTERM saves and ends it, SIGUSR1 saves and goes on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any


class Terminated(SystemExit):
    """SIGTERM ends the run, exit code 0. `agreed`: all ranks end after the same step, with a checkpoint of it."""

    def __init__(self, *, agreed: bool) -> None:
        super().__init__(0)
        self.agreed = agreed


class SignalWatch:
    """Notes the two signals on each rank. Ranks hear them at different moments, so a step's sums make them agree.

    While steps run a signal waits for the end of the step. Outside of them, where a run starts, measures a checkpoint
    or exports, nothing would be lost: SIGTERM ends it there, SIGUSR1 waits for the next step.
    """

    def __init__(self) -> None:
        self.save = self.stop = False
        self._heard: set[int] = set()
        self._waiting = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals over. Only the main thread can; in another one they keep their meaning."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._hear)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within steps: signals are noted. SIGTERM after the last step ends the run before what follows it."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
        if signal.SIGTERM in self._heard:
            raise Terminated(agreed=False)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `waiting`, around what may take long and loses nothing: SIGTERM ends the run."""
        self._waiting = False
        try:
            if signal.SIGTERM in self._heard:
                raise Terminated(agreed=False)
            yield
        finally:
            self._waiting = True

    def numbers(self) -> list[float]:
        """What this rank has heard, to be summed over the ranks."""
        return [float(signal.SIGUSR1 in self._heard), float(signal.SIGTERM in self._heard)]

    def agree(self, sums: Sequence[float]) -> None:
        """Set `save` and `stop`, the same on every rank, from the sums of `numbers`."""
        self.save, self.stop = sums[0] > 0, sums[1] > 0
        self._heard.discard(signal.SIGUSR1)

    def _hear(self, number: int, _frame: Any) -> None:
        # A scheduler and a launcher may both send it; the second must not cut off what the first has set going.
        is_first = number not in self._heard
        self._heard.add(number)
        if number == signal.SIGTERM and is_first and not self._waiting:
            raise Terminated(agreed=False)
