"""Escape sequences in data, answers and error messages do not reach the terminal: neither in tables nor in lines."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from mirage.tracking.console import Terminal
from mirage.tracking.terminal_text import SafeConsole, inert, safe_message

# A colour, a link (OSC 8), the clipboard (OSC 52), the window's title, the cursor, an eight-bit CSI, reversed text.
EVIL = (
    "\x1b[31mred", "\x1b]8;;http://127.0.0.1:9/\x1b\\click\x1b]8;;\x1b\\", "\x1b]52;c;cm0gLXJm\x07", "\x1b]0;title\x07",
    "\x1b[2J\x1b[1;1Hover", "\x9b31m", "\u202eesrever", "a\x08\x08\rback", "\x1bc", "\x00\x7f",
)  # fmt: skip
HARMFUL = ("\x1b", "\x07", "\x08", "\r", "\x00", "\x7f", "\x9b", "\u202e")


def table(cells: tuple[str, ...]) -> Table:
    found = Table("name", "\x1b]0;header\x07")
    for cell in cells:
        found.add_row(cell, Text(cell))
    return found


@pytest.mark.parametrize("mode", ["rich", "plain"])
def test_tables_and_lines_are_inert(mode: str) -> None:
    out = io.StringIO()
    console = Terminal(mode, file=out, is_terminal=False)  # type: ignore[arg-type]
    console.print(table(EVIL))
    console.summary(table(EVIL))
    for text in EVIL:
        console.say(text)
        console.print(text, markup=False)
    shown = out.getvalue()
    assert "red" in shown and "click" in shown and "over" in shown
    assert not [mark for mark in HARMFUL if mark in shown]


def test_a_real_terminal_gets_our_styles_and_nothing_of_the_text() -> None:
    out = io.StringIO()
    console = SafeConsole(file=out, force_terminal=True, color_system="standard")
    console.print(Text("ours", style="bold red"), Text("\x1b]52;c;cm0gLXJm\x07theirs"))
    assert "\x1b[1;31mours" in out.getvalue()
    assert "]52;c;cm0gLXJmtheirs" in out.getvalue() and "\x1b]" not in out.getvalue() and "\x07" not in out.getvalue()


def test_messages_keep_lines_and_lose_controls(capsys: pytest.CaptureFixture[str]) -> None:
    assert inert("a\n\tb\x1b[0m") == "a\n\tb[0m"
    assert safe_message("x\x1b]8;;u\x07 sk-0123456789abcdefXYZ") == "x]8;;u [hidden]"
    Terminal("plain").error("\x1b[2Jgone")
    assert capsys.readouterr().err == "[2Jgone\n"


@pytest.mark.parametrize("kind", ["UserError", "RunStopped", "ValueError"])
def test_the_last_words_of_a_command_are_inert(kind: str) -> None:
    program = (
        "from mirage.errors import *\n"
        f"def main():\n    raise {kind}('row \\x1b]52;c;cm0gLXJm\\x07\\x9b2J is bad')\n"
        "run_main(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == {"UserError": 2, "RunStopped": 3, "ValueError": 1}[kind]
    assert "is bad" in done.stderr
    assert not [mark for mark in HARMFUL if mark in done.stdout + done.stderr]
