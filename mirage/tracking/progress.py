"""Progress of one piece of work: counted, timed, drawn as a live line or said in about twenty lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from mirage.tracking.pace import Pace, duration

if TYPE_CHECKING:
    from rich.progress import TaskID

    from mirage.tracking.console import Terminal

# Lines that a piece of work prints where nothing can be redrawn.
NUM_LINES = 20
# Quick work needs no line but its last.
SECONDS_BETWEEN_LINES = 1.0


class Progress:
    """How much of some work is done, how fast, how long the rest takes. A context manager.

    A live line in a terminal; elsewhere about `num_lines` lines (in JSON mode events `progress`), at least
    `seconds_between` apart, and a last one that says how long it took. `unit` names what is counted, for the speed.
    """

    def __init__(
        self,
        terminal: Terminal,
        what: str,
        total: float,
        *,
        done: float = 0,
        unit: str = "",
        num_lines: int = NUM_LINES,
        seconds_between: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        self.what, self.total, self.done, self.unit = what, total, done, unit
        self.num_kept: float = 0
        self.took_seconds: float | None = None
        self._terminal, self._num_lines, self._seconds_between = terminal, num_lines, seconds_between
        self._first = self._next_line = done
        self._note = ""
        self._fields: dict[str, Any] = {}
        self._began_at = self._said_at = terminal.clock()
        self._pace = Pace(done, at_seconds=self._began_at)
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._terminal.is_live:
            self._task = self._terminal.draw(self.what, self.total, self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._terminal.undraw(self._task)
            self._task = None
        if error is None:
            self._finish()

    def advance(
        self,
        count: float = 1,
        *,
        kept: bool = False,
        total: float | None = None,
        note: str | None = None,
        **fields: Any,
    ) -> None:
        """So much more is done. `kept`: it was there from an earlier run and took no time."""
        if kept:
            self.num_kept += count
            self._first += count
            self._pace.restart(self.done + count, at_seconds=self._terminal.clock())
        self.update(self.done + count, total=total, note=note, **fields)

    def update(
        self,
        done: float,
        *,
        total: float | None = None,
        at_seconds: float | None = None,
        note: str | None = None,
        **fields: Any,
    ) -> None:
        """So much is done in all. `note` and `fields` (the same for JSON mode) stay until others are given.

        `at_seconds` is on the caller's own clock, which begins at 0, for work that other work interrupts.
        """
        if at_seconds is not None and self.done == self._first:
            self._pace.restart(self.done, at_seconds=0.0)
        self.done, self.total = done, self.total if total is None else total
        self._note = self._note if note is None else note
        self._fields = dict(fields) or self._fields
        self._pace.mark(done, at_seconds=self._terminal.clock() if at_seconds is None else at_seconds)
        if self._task is not None:
            self._terminal.redraw(self._task, total=self.total, done=done, line=self._line(self._left()))
        elif done >= self.total:
            self._finish()
        elif self._is_due():
            eta = self.eta_seconds
            self._say(self._left(), eta_seconds=None if eta is None else round(eta, 1))

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until all is done, at the pace of the last half minute; None before it is known."""
        return self._pace.eta_seconds(self.total - self.done)

    @property
    def per_second(self) -> float | None:
        """How much was done a second, over all; kept items do not count."""
        seconds = self.took_seconds if self.took_seconds is not None else self._terminal.clock() - self._began_at
        return (self.done - self._first) / seconds if seconds > 0 and self.done > self._first else None

    def _is_due(self) -> bool:
        now = self._terminal.clock()
        if self.done < self._next_line or now - self._said_at < self._seconds_between:
            return False
        every = max(1, math.ceil((self.total - self._first) / self._num_lines))
        self._next_line, self._said_at = (self.done // every + 1) * every, now
        return True

    def _finish(self) -> None:
        if self.took_seconds is not None:
            return
        self.took_seconds = self._terminal.clock() - self._began_at
        each = self.per_second
        rate = f", {_speed(each)} {self.unit}/s" if each is not None and self.unit else ""
        kept = f", {self.num_kept:g} of them from before" if self.num_kept else ""
        self._say(f"in {duration(self.took_seconds)}{rate}{kept}", num_kept=self.num_kept)

    def _left(self) -> str:
        eta = self.eta_seconds
        return "" if eta is None else f"eta {duration(eta)}"

    def _line(self, time_text: str) -> str:
        return "  ".join(part for part in (self._note, time_text) if part)

    def _say(self, time_text: str, **fields: Any) -> None:
        if self._terminal.mode == "json":
            more: Mapping[str, Any] = self._fields or ({"note": self._note} if self._note else {})
            self._terminal.emit("progress", what=self.what, done=self.done, total=self.total, **fields, **more)
            return
        done, total = f"{self.done:g}", f"{self.total:g}"
        self._terminal.say(f"{self.what} {done:>{len(total)}}/{total}  {self._line(time_text)}".rstrip())


def work_table(works: Sequence[Progress]) -> Table:
    """Finished pieces of work: how many, how many of them kept from before, how long, how fast."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("work", no_wrap=True)
    for name in ("done", "from before", "took", "a second"):
        table.add_column(name, justify="right", no_wrap=True)
    for work in works:
        each = "-" if work.per_second is None else _speed(work.per_second)
        table.add_row(
            work.what, f"{work.done:,.0f}", f"{work.num_kept:,.0f}", duration(work.took_seconds or 0.0), each
        )  # fmt: skip
    return table


def work_facts(works: Sequence[Progress]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "what": work.what,
            "done": work.done,
            "num_kept": work.num_kept,
            "took_seconds": round(work.took_seconds or 0, 1),
        }
        for work in works
    ]


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
