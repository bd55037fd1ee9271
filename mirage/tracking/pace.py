"""How fast work goes and how long the rest will take, from the last half minute of it."""

from __future__ import annotations

from collections import deque

# What counts: long enough that replies which come in bursts even out, short enough to follow a change of speed.
WINDOW_SECONDS = 30.0
# Slow work, such as steps of a minute, is judged by at least so many updates.
MIN_UPDATES = 5
# Closer updates are taken together, so that a hundred thousand quick ones need no room.
_RESOLUTION_SECONDS = 0.25


class Pace:
    """Marks of (items done, seconds on some clock). The clock is the caller's: real time, or time spent on steps."""

    def __init__(self, done: float = 0, *, at_seconds: float = 0.0) -> None:
        self.restart(done, at_seconds=at_seconds)

    def restart(self, done: float, *, at_seconds: float) -> None:
        """Count from here: what was there already took no time and says nothing about the rest."""
        self._marks: deque[tuple[float, float]] = deque([(done, at_seconds)])
        self._has_start = True

    def mark(self, done: float, *, at_seconds: float) -> None:
        """So many items are done by now."""
        marks = self._marks
        if len(marks) > 1 and at_seconds - marks[-2][1] < _RESOLUTION_SECONDS:
            marks[-1] = (done, at_seconds)
        else:
            marks.append((done, at_seconds))
        if self._has_start and len(marks) > 2 and marks[1][0] - marks[0][0] <= done - marks[1][0]:
            # The first item takes what only a start takes: processes, kernels, caches. Not so a burst of first items,
            # without which the pause after it would be the pace.
            marks.popleft()
            self._has_start = False
        while len(marks) > MIN_UPDATES + 1 and at_seconds - marks[1][1] >= WINDOW_SECONDS:
            marks.popleft()

    @property
    def seconds_each(self) -> float | None:
        """Seconds an item; None before two updates tell it."""
        if len(self._marks) < (3 if self._has_start else 2):
            return None
        (first, since), (last, until) = self._marks[0], self._marks[-1]
        return (until - since) / (last - first) if last > first else None

    def eta_seconds(self, remaining: float) -> float | None:
        """Seconds that `remaining` items will take at this pace; None before it is known."""
        each = self.seconds_each
        return None if each is None else each * max(0.0, remaining)


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m05s` or `2h07m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
