"""The terminal of every command: text, tables and progress with the time left, in one of four modes."""

from __future__ import annotations

import functools
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TextIO, TypeVar, get_args

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as LiveLines
from rich.table import Table

from mirage.errors import UserError
from mirage.tracking import json_lines
from mirage.tracking.progress import NUM_LINES, SECONDS_BETWEEN_LINES, Progress
from mirage.tracking.terminal_text import SafeConsole, safe_message

ConsoleMode = Literal["rich", "plain", "quiet", "json"]
MODES: tuple[ConsoleMode, ...] = get_args(ConsoleMode)
# Wide enough that no line of a log file is folded.
_FILE_COLUMNS = 200
Item = TypeVar("Item")


class Terminal(SafeConsole):
    """A rich console on standard output (or `file`) that knows the mode.

    `rich`: live lines and colours in a terminal, `plain` elsewhere. `plain`: text without escape codes, about twenty
    lines for a piece of work. `quiet`: nothing but errors. `json`: one JSON object a line, each with an `event`. Errors
    go to standard error in every mode, and in JSON mode to standard output too. NO_COLOR takes the colours away.
    """

    def __init__(
        self,
        mode: ConsoleMode,
        *,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        is_terminal: bool | None = None,
    ) -> None:
        """`is_terminal` is found out when None: FORCE_COLOR and the like make no terminal of a file."""
        in_terminal = (file or sys.stdout).isatty() if is_terminal is None else is_terminal
        self.mode, self.clock, self._given = mode, clock, file
        self.is_live = mode == "rich" and in_terminal and os.environ.get("TERM") not in ("dumb", "unknown")
        super().__init__(
            file=file,
            highlight=False,
            quiet=mode == "quiet",
            force_terminal=self.is_live,
            no_color=None if self.is_live else True,
            width=None if in_terminal else _FILE_COLUMNS,
        )
        self._live_lines: LiveLines | None = None

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's; in JSON mode the text is an event `message`."""
        if self.mode != "json":
            super().print(*objects, **options)
            return
        text = io.StringIO()
        SafeConsole(file=text, highlight=False, no_color=True, width=_FILE_COLUMNS).print(*objects, **options)
        self.emit("message", text=text.getvalue().rstrip("\n"))

    def say(self, text: str, *, event: str = "message", **fields: Any) -> None:
        """A line of plain text; in JSON mode the event with `text` and the fields."""
        if self.mode == "json":
            self.emit(event, text=text, **fields)
        else:
            super().print(text, markup=False, soft_wrap=True)

    def summary(self, table: Table, *, event: str = "summary", **fields: Any) -> None:
        """A table at the end of some work; in JSON mode the event with the fields, which say the same."""
        if self.mode == "json":
            self.emit(event, **fields)
        else:
            super().print(table)

    def error(self, text: str, **fields: Any) -> None:
        """What went wrong though the command goes on; said in every mode."""
        text = safe_message(text)
        self.emit("error", message=text, **fields)
        # Not by a console of rich's: it would write across live lines, which stand aside for what Python prints.
        print(text, file=sys.stderr, flush=True)

    def emit(self, event: str, **fields: Any) -> None:
        """A JSON line in JSON mode, nothing in the others."""
        if self.mode == "json":
            json_lines.emit(event, fields, file=self._given)

    def progress(
        self,
        what: str,
        total: float,
        *,
        done: float = 0,
        unit: str = "",
        num_lines: int = NUM_LINES,
        seconds_between: float = SECONDS_BETWEEN_LINES,
    ) -> Progress:
        """A piece of work to count, as a context manager."""
        options: dict[str, Any] = {"num_lines": num_lines, "seconds_between": seconds_between}
        return Progress(self, what, total, done=done, unit=unit, **options)

    def track(self, items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
        """The items, counted as they are used; nothing is said of no items."""
        if not total:
            yield from items
            return
        with self.progress(what, total) as work:
            for item in items:
                yield item
                work.advance()

    def draw(self, what: str, total: float, done: float) -> TaskID:
        """Begin a live line. All live lines of a terminal are one block, so that nested work draws no second one."""
        if self._live_lines is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._live_lines = LiveLines(*columns, console=self, refresh_per_second=4, transient=True)
            self._live_lines.start()
        return self._live_lines.add_task(what, total=round(total), completed=round(done), line="")

    def redraw(self, task: TaskID, *, total: float, done: float, line: str) -> None:
        """Bring a live line up to date."""
        if self._live_lines is not None:
            self._live_lines.update(task, total=round(total), completed=round(done), line=line)

    def undraw(self, task: TaskID) -> None:
        """Take a live line away."""
        if self._live_lines is None:
            return
        self._live_lines.remove_task(task)
        if not self._live_lines.task_ids:
            self._live_lines.stop()
            self._live_lines = None


@functools.cache
def _shared(mode: ConsoleMode) -> Terminal:
    return Terminal(mode)


def make_console(mode: ConsoleMode, *, file: TextIO | None = None) -> Terminal:
    """A mode's terminal: of standard output the one that all parts of a command share, of a `file` a new one."""
    return _shared(mode) if file is None else Terminal(mode, file=file)


def console_mode(text: str | None) -> ConsoleMode:
    """The mode that a command's `console=...` names, rich without one. Raises `UserError` that lists the modes."""
    for mode in MODES:
        if mode == (text or "rich"):
            return mode
    raise UserError(f"console={text}: write one of {', '.join(f'console={mode}' for mode in MODES)}")
