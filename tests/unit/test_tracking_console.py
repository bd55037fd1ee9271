"""The terminal: four modes with one meaning, about twenty lines for a piece of work, and the time that is left."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table

from mirage.errors import UserError
from mirage.tracking import json_lines
from mirage.tracking.console import Terminal, console_mode, make_console
from mirage.tracking.pace import WINDOW_SECONDS, Pace, duration
from mirage.tracking.run_console import ConsoleCallback, describe


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def terminal(mode: Any, *, clock: Any = None, is_terminal: bool | None = None) -> tuple[Terminal, io.StringIO]:
    out = io.StringIO()
    return Terminal(mode, file=out, clock=clock or Clock(), is_terminal=is_terminal), out


def work(console: Terminal, clock: Clock, *, total: int = 200, seconds: float = 2.0, kept: int = 0) -> None:
    with console.progress("answers", total, unit="answers") as progress:
        if kept:
            progress.advance(kept, kept=True)
        for _ in range(total - kept):
            clock.now += seconds
            progress.advance(note="mis_hard", task="mis_hard")


# Pace


def test_the_time_left_is_what_is_left_at_this_pace() -> None:
    pace = Pace(at_seconds=50.0)
    assert pace.eta_seconds(10) is None
    pace.mark(1, at_seconds=90.0)  # a slow start
    assert pace.eta_seconds(10) is None
    for number in range(2, 6):
        pace.mark(number, at_seconds=90.0 + 3 * (number - 1))
    assert pace.eta_seconds(10) == pytest.approx(30.0) and pace.eta_seconds(-1) == 0.0


def test_the_pace_follows_a_change_of_speed_within_half_a_minute() -> None:
    pace = Pace()
    for number in range(1, 101):
        pace.mark(number, at_seconds=float(number))
    for number in range(101, 112):
        pace.mark(number, at_seconds=100.0 + 4 * (number - 100))
    assert pace.eta_seconds(10) == pytest.approx(40.0)


def test_a_burst_of_first_items_counts_so_that_the_pause_after_it_is_not_the_pace() -> None:
    pace = Pace()
    for number in range(1, 241):
        pace.mark(number, at_seconds=1e-4 * number)
    pace.mark(241, at_seconds=1.2)
    assert pace.eta_seconds(1143) == pytest.approx(1143 * 1.2 / 241)


def test_bursts_even_out_and_quick_items_take_no_room() -> None:
    pace = Pace()
    for burst in range(40):
        for item in range(1, 65):
            pace.mark(64 * burst + item, at_seconds=3.0 * burst + 1e-4 * item)
    assert pace.eta_seconds(640) == pytest.approx(30.0, rel=0.12)
    for number in range(100_000):
        pace.mark(5_000 + number, at_seconds=200 + 1e-3 * number)
    assert len(pace._marks) < 5 * WINDOW_SECONDS


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59.4, "59s"), (185, "3m05s"), (7620, "2h07m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# Progress in the modes


@pytest.mark.parametrize("total", [7, 200, 1003])
def test_plain_prints_about_twenty_lines_without_escape_codes(total: int) -> None:
    clock = Clock()
    console, out = terminal("plain", clock=clock)
    work(console, clock, total=total)
    lines = out.getvalue().splitlines()
    assert min(total, 18) <= len(lines) <= 22 and "\x1b" not in out.getvalue()
    assert f"{total}/{total}  mis_hard  in {duration(2 * total)}, 0.5 answers/s" in lines[-1]


def test_plain_lines_tell_the_time_left() -> None:
    clock = Clock()
    console, out = terminal("plain", clock=clock)
    work(console, clock)
    assert "answers 100/200  mis_hard  eta 3m20s" in out.getvalue().splitlines()


def test_quick_work_prints_its_last_line_only() -> None:
    clock = Clock()
    console, out = terminal("plain", clock=clock)
    work(console, clock, seconds=0.001)
    assert out.getvalue() == "answers 200/200  mis_hard  in 0s, 1,000 answers/s\n"


def test_what_was_there_before_takes_no_time() -> None:
    clock = Clock()
    console, out = terminal("plain", clock=clock)
    work(console, clock, kept=100)
    lines = out.getvalue().splitlines()
    assert "answers 150/200  mis_hard  eta 1m40s" in lines
    assert lines[-1] == "answers 200/200  mis_hard  in 3m20s, 0.5 answers/s, 100 of them from before"


def test_json_lines_are_objects_with_an_event() -> None:
    clock = Clock()
    console, out = terminal("json", clock=clock)
    work(console, clock)
    console.print("[bold]hello[/] there")
    console.say("[not markup]", event="start", step=3)
    table = Table()
    console.summary(table, what="x", loss=float("nan"), path=Path("a/b"))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    progress = [event for event in events if event["event"] == "progress"]
    assert 18 <= len(progress) <= 22 and "\x1b" not in out.getvalue()
    middle = next(event for event in progress if event["done"] == 100)
    assert middle == {
        "event": "progress", "what": "answers", "done": 100, "total": 200, "eta_seconds": 200.0, "task": "mis_hard"
    }  # fmt: skip
    assert progress[-1]["done"] == 200 and progress[-1]["num_kept"] == 0
    assert events[-3:] == [
        {"event": "message", "text": "hello there"},
        {"event": "start", "text": "[not markup]", "step": 3},
        {"event": "summary", "what": "x", "loss": "nan", "path": "a/b"},
    ]


def test_quiet_prints_nothing_but_errors(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = Terminal("quiet", clock=clock)
    work(console, clock)
    console.print("hello")
    console.say("hello")
    console.summary(Table(title="x"), what="x")
    list(console.track(range(3), "items", 3))
    assert capsys.readouterr() == ("", "")
    console.error("the judge is down")
    assert capsys.readouterr() == ("", "the judge is down\n")


@pytest.mark.parametrize("mode", ["rich", "plain", "json"])
def test_errors_go_to_standard_error_in_every_mode(mode: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(mode).error("[x] the judge is down", step=3)
    out, err = capsys.readouterr()
    assert err == "[x] the judge is down\n"
    expected = '{"event": "error", "message": "[x] the judge is down", "step": 3}\n'
    assert out == (expected if mode == "json" else "")


def test_a_live_line_in_a_terminal() -> None:
    clock = Clock()
    console, out = terminal("rich", clock=clock, is_terminal=True)
    with console.progress("steps", 10) as outer:
        outer.advance(4)
        # An evaluation inside a run: both lines are in one block.
        work(console, clock, total=20)
        outer.advance(6)
    text = out.getvalue()
    assert "\x1b[" in text and "20/20" in text and "answers 20/20  mis_hard  in 40s" in text
    assert "answers 10/20  mis_hard" not in text  # no lines on the way
    assert console._live_lines is None


def test_an_error_does_not_write_across_a_live_line(capsys: pytest.CaptureFixture[str]) -> None:
    console, out = terminal("rich", is_terminal=True)
    with console.progress("steps", 10) as progress:
        progress.advance(4)
        console.error("the judge is down")
    assert "the judge is down\n" in out.getvalue() and capsys.readouterr().err == ""


def test_rich_falls_back_to_plain_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    clock = Clock()
    console, out = terminal("rich", clock=clock)
    work(console, clock)
    console.print("[bold red]red[/]")
    assert "\x1b" not in out.getvalue() and "answers 100/200" in out.getvalue()


def test_no_color_is_honoured_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        console, out = terminal("rich", is_terminal=True)
        console.print("[red]red[/]")
        return out.getvalue()

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in shown()
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in shown()


def test_an_error_ends_progress_without_a_last_line() -> None:
    console, out = terminal("plain")
    with pytest.raises(ValueError, match="x"), console.progress("items", 3) as progress:
        progress.advance()
        raise ValueError("x")
    assert "in 0s" not in out.getvalue()


def test_tracked_items_come_through_unchanged() -> None:
    clock = Clock()
    console, out = terminal("plain", clock=clock)
    assert list(console.track(iter("abc"), "files", 3)) == ["a", "b", "c"]
    assert list(console.track(iter(""), "nothing", 0)) == []
    assert out.getvalue() == "files 3/3  in 0s\n"


def test_modes_are_named() -> None:
    assert console_mode(None) == "rich" and console_mode("json") == "json"
    with pytest.raises(UserError, match="console=xml: write one of console=rich, console=plain, console=quiet, "):
        console_mode("xml")
    assert make_console("plain") is make_console("plain")


# Commands


@pytest.mark.parametrize(
    "args", [["tracking.console=json"], ["x", "console=json"], ["make", "--console", "json"], ["--console=json"]]
)
def test_json_is_known_before_the_command_line_is_understood(args: list[str]) -> None:
    assert json_lines.asked_for(args)
    assert not json_lines.asked_for([arg.replace("json", "plain") for arg in args])


def command(repo_root: Path, *args: str) -> tuple[int, list[dict[str, Any]], str]:
    done = subprocess.run(
        [sys.executable, *args], cwd=repo_root, text=True, capture_output=True, check=False, timeout=120
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_a_users_mistake_is_a_json_line_too(repo_root: Path) -> None:
    for args in (
        ("-m", "mirage.cli", "evaluate", "nowhere", "console=json"),
        ("-m", "data_gen", "make", "--seed", "x", "--console", "json"),
        ("mirage/train.py", "recipe=tiny_internvl_mis", "train.lrr=1", "tracking.console=json"),
    ):
        code, events, err = command(repo_root, *args)
        assert code == 2 and [event["event"] for event in events] == ["error"], (args, events, err)
        assert events[0]["exit_code"] == 2 and f"error: {events[0]['message']}" in err


def test_whatever_else_is_printed_goes_to_standard_error(repo_root: Path) -> None:
    script = (
        "import os, sys; sys.argv = ['x', 'console=json']\n"
        "from mirage.errors import run_main\n"
        "from mirage.tracking.console import make_console\n"
        "def main():\n"
        "    print('a library'); os.system('echo a child'); make_console('json').say('ours', event='start')\n"
        "    raise RuntimeError('broken')\n"
        "run_main(main)\n"
    )
    code, events, err = command(repo_root, "-c", script)
    assert code == 1 and "a library" in err and "a child" in err and "RuntimeError: broken" in err
    assert events == [
        {"event": "start", "text": "ours"},
        {"event": "error", "message": "RuntimeError: broken", "exit_code": 1},
    ]


# Training


def run(
    callback: ConsoleCallback, *, total_steps: int = 200, first: int = 0, is_main: bool = True, every: int = 1
) -> None:
    trainer: Any = SimpleNamespace(
        step=first,
        total_steps=total_steps,
        is_main=is_main,
        rank=0,
        run_dir=Path("runs/x"),
        recipe=SimpleNamespace(name="x"),
        kernels={},
    )
    callback.on_start(trainer)
    for trainer.step in range(first + 1, total_steps + 1):
        metrics = {
            "train/loss": 1.0 / trainer.step,
            "train/lr": 1e-4,
            "train/tokens": 100.0,
            "train/tokens_per_second": 12345.6,
            "train/epoch": trainer.step / 100,
            "train/step_seconds": 0.5,
        }
        callback.on_step(trainer, metrics if trainer.step % every == 0 else {})
    callback.on_checkpoint(trainer, Path("runs/x/checkpoint-000200"), total_steps)
    callback.on_end(trainer)
    callback.on_close(trainer, None)


def run_lines(mode: Any = "plain", **options: Any) -> list[str]:
    out = io.StringIO()
    run(ConsoleCallback(mode, console=make_console(mode, file=out), clock=lambda: 0.0), **options)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("total_steps", [7, 200, 1003])
def test_a_run_prints_about_twenty_lines(total_steps: int) -> None:
    lines = [line for line in run_lines(total_steps=total_steps) if line.startswith("step ")]
    assert min(total_steps, 18) <= len(lines) <= 22
    assert f"1/{total_steps} " in lines[0] and f"{total_steps}/{total_steps} " in lines[-1]


def test_a_runs_lines_tell_the_essentials() -> None:
    lines = run_lines()
    assert lines[0] == "x starts: 200 steps, folder runs/x"
    assert "step 100/200  epoch 1.00  loss 0.0100  lr 1.00e-04  12,346 tokens/s  eta 50s" in lines
    checkpoint = lines.index("checkpoint of step 200: runs/x/checkpoint-000200")
    assert lines[checkpoint + 1] == "x done: step 200 after 0s, last loss 0.0050"
    table = "\n".join(lines[checkpoint + 2 :])
    assert "steps" in table and "200, 2.00 epochs in all" in table
    assert "20,000, 200 a second" in table and "1.0000 to 0.0050" in table
    assert all("\x1b" not in line for line in lines)


def test_sparse_metrics_still_give_lines_and_whole_counts() -> None:
    lines = run_lines(every=7)
    assert 14 <= sum(line.startswith("step ") for line in lines) <= 22
    assert any("19,600, 200 a second" in line for line in lines)  # 196 of the 200 steps are in logged lines


def test_resumed_run_says_so() -> None:
    lines = run_lines(first=150)
    assert lines[0].startswith("x continues after step 150: 200 steps")
    assert lines[1].startswith("step 151/200")
    assert any(line.split()[:2] == ["steps", "50,"] for line in lines)


def test_a_runs_json_has_start_progress_and_summary() -> None:
    events = [json.loads(line) for line in run_lines("json")]
    assert events[0]["event"] == "start" and events[0]["total_steps"] == 200
    middle = next(event for event in events if event["event"] == "progress" and event["done"] == 100)
    assert middle["what"] == "step" and middle["eta_seconds"] == 50.0 and middle["metrics"]["train/loss"] == 0.01
    kinds = [event["event"] for event in events if event["event"] != "progress"]
    assert kinds == ["start", "checkpoint", "done", "summary"]
    assert events[-1]["num_tokens"] == 20_000 and events[-1]["last_loss"] == 0.005


def test_quiet_and_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(ConsoleCallback("quiet"))
    run(ConsoleCallback("plain"), is_main=False)
    assert capsys.readouterr() == ("", "")


def test_a_run_draws_a_live_line_in_a_terminal() -> None:
    console, out = terminal("rich", is_terminal=True)
    run(ConsoleCallback("rich", console=console), total_steps=20)
    assert "\x1b[" in out.getvalue() and "20/20" in out.getvalue() and "loss 0.0500" in out.getvalue()
    assert "step 10/20" not in out.getvalue()


def test_error_says_how_to_go_on() -> None:
    out = io.StringIO()
    callback = ConsoleCallback("plain", console=make_console("plain", file=out))
    trainer: Any = SimpleNamespace(
        step=3, total_steps=9, is_main=True, run_dir=Path("r"), recipe=SimpleNamespace(name="x"), kernels={}
    )
    callback.on_start(trainer)
    callback.on_close(trainer, RuntimeError("boom"))
    assert "stopped at step 3 of 9; the same command continues the run" in out.getvalue()
    assert "done" not in out.getvalue()


def test_describe_leaves_out_what_is_missing() -> None:
    assert describe({"train/loss": float("nan")}) == "loss nan"


def test_error_before_the_start_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    trainer: Any = SimpleNamespace(is_main=True)
    ConsoleCallback().on_close(trainer, RuntimeError("no data"))
    assert capsys.readouterr().out == ""


def test_mode_comes_from_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = SimpleNamespace(name="x", tracking=SimpleNamespace(console="quiet"))
    trainer: Any = SimpleNamespace(step=1, total_steps=1, is_main=True, run_dir=Path("r"), recipe=recipe, kernels={})
    for mode, kernels in itertools.product(("quiet", "plain"), ({}, {"loss": "torch (no GPU)"})):
        recipe.tracking.console, trainer.kernels = mode, kernels
        ConsoleCallback().on_start(trainer)
        expected = "x continues after step 1: 1 steps, folder r\n" + "".join(f"{k}: {v}\n" for k, v in kernels.items())
        assert capsys.readouterr().out == ("" if mode == "quiet" else expected)
