"""Every regular expression of the project on long hostile texts: none takes time by the square of the length."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import data_gen
import mirage
from data_gen.illustrators.base import NO_LICENCE
from data_gen.stages.answer_checks import LEAK_HEADINGS
from mirage.evals import language, open_answer
from tests.fuzz.campaign import time_limit

UNITS = (
    "a", "A", "1", " ", "\n", "-", "_", ".", "*", '"', "\\", "<", "[", "{", "a ", "a_", "1.", "1,", "a1", "a-", ". ",
    "1e", "<image ", "<think>", "</think>", "a. A", "\n- ", "i ", "answer is ", "not ", "a\n", "\u4e00", "\x00",
)  # fmt: skip
TAILS = ("", "!", "a", "\x01")
# The square of the length is a billion steps and more, the length itself less than a second.
NUM_CHARS, SECONDS = 60_000, 10.0
# These are asked for one place of a text or for the whole of it, never searched for.
_MATCHED = frozenset({"THOUGHT", "_LEADING_LETTER", "_HUB_ID"})


def texts() -> Iterator[str]:
    for unit in UNITS:
        for tail in TAILS:
            yield unit * (NUM_CHARS // len(unit)) + tail


def patterns() -> dict[str, re.Pattern[str]]:
    """The expressions that modules hold, alone or in lists, each under the first name it has."""
    found: dict[re.Pattern[str], str] = {}
    for package in (mirage, data_gen):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith("__main__"):
                continue
            try:
                module = importlib.import_module(info.name)
            except ImportError:  # an extra that is not installed
                continue
            for name, value in vars(module).items():
                for item in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(item, re.Pattern) and isinstance(item.pattern, str):
                        found.setdefault(item, f"{info.name}.{name}")
    for place, pattern in _written_in_calls():
        found.setdefault(pattern, place)
    return {name: pattern for pattern, name in found.items()}


def _written_in_calls() -> Iterator[tuple[str, re.Pattern[str]]]:
    """What `re.search("...", text)` and its like are called with."""
    for package in (mirage, data_gen):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and getattr(node.func.value, "id", None) == "re"
                    and node.func.attr not in ("compile", "escape")
                    and node.args
                    and isinstance(node.args[0], ast.Constant)
                    and isinstance(node.args[0].value, str)
                ):
                    yield f"{file.name}:{node.lineno}.{node.func.attr}", re.compile(node.args[0].value)


@pytest.mark.parametrize(
    "ask",
    [open_answer._SCIENTIFIC.search, open_answer._SIMPLE.search, language._SHOWS.match, NO_LICENCE.match,
     LEAK_HEADINGS.search],
)  # fmt: skip
@pytest.mark.parametrize("unit", [" ", "\n", "1", "# "])
def test_a_long_run_is_looked_at_once(ask: Callable[[str], object], unit: str) -> None:
    with time_limit(SECONDS, wall_seconds=20 * SECONDS):
        ask(unit * NUM_CHARS + "a")


@pytest.mark.slow
def test_no_expression_takes_time_by_the_square() -> None:
    known = patterns()
    assert len(known) > 80
    for name, pattern in known.items():
        ask = pattern.fullmatch if name.rpartition(".")[2] in (*_MATCHED, "match", "fullmatch") else pattern.search
        for text in texts():
            with time_limit(SECONDS, wall_seconds=20 * SECONDS):
                ask(text)
