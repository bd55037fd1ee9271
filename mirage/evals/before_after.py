"""A risky request and a harmless one with their pictures and two models' answers, side by side: what a run changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_RISKY, _BENIGN = ("mis_hard", "mis_easy"), ("twins",)


@dataclass(frozen=True)
class Pair:
    """A question with its pictures and the lines of samples.jsonl that two evaluations have on it."""

    what: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def pictures(self) -> list[str]:
        return list(self.after["image_paths"])


def find_pairs(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[Pair]:
    """A risky request and a harmless one of two evaluations' samples; none where an evaluation has no such samples.

    The first in the tests' order whose two answers have the commonest pair of verdicts: an example, not a selection of
    the best.
    """
    old = {(row["task"], row["id"]): row for row in before}
    found = []
    for what, tasks in (("A risky request", _RISKY), ("A harmless request", _BENIGN)):
        pair = _typical([(old[row["task"], row["id"]], row) for row in _of_first_task(after, tasks, old)])
        if pair is not None:
            found.append(Pair(what, *pair))
    return found


def _of_first_task(
    rows: Sequence[dict[str, Any]], tasks: Sequence[str], old: Mapping[tuple[str, str], Any]
) -> list[dict[str, Any]]:
    for task in tasks:
        chosen = [row for row in rows if row["task"] == task and (task, row["id"]) in old and row["image_paths"]]
        if chosen:
            return chosen
    return []


def _typical(pairs: Sequence[tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """The first pair whose verdicts are those of most pairs; ties go to the verdicts met first."""
    verdicts = [(old["verdict"], new["verdict"]) for old, new in pairs]
    if not pairs:
        return None
    commonest = max(dict.fromkeys(verdicts), key=verdicts.count)
    return pairs[verdicts.index(commonest)]


def pairs_markdown(pairs: Sequence[Pair], *, titles: tuple[str, str]) -> str:
    """The pairs as markdown: the pictures, the question, and a table of both answers."""
    parts = []
    for pair in pairs:
        pictures = " ".join(f"![picture {number}]({path})" for number, path in enumerate(pair.pictures, start=1))
        cells = [_cell(pair.before), _cell(pair.after)]
        parts += [
            f"**{pair.what}**: {pair.after['question']}\n\n{pictures}\n",
            f"| {titles[0]} | {titles[1]} |\n| --- | --- |\n| {cells[0]} | {cells[1]} |\n",
        ]
    return "\n".join(parts)


def _cell(row: Mapping[str, Any]) -> str:
    text = " ".join(str(row["answer"]).split()).replace("|", "\\|") or "(empty)"
    return f"{text} *({row['verdict']})*"
