"""A risky request and a harmless one with their pictures and two models' answers, side by side: what a run changed."""

from __future__ import annotations

import base64
import html
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage.evals.results import SAMPLES_FILE, read_samples
from mirage.files import write_atomic

PAGE_FILE = "before_after.html"
_RISKY, _BENIGN = ("mis_hard", "mis_easy"), ("twins",)
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
.pictures { display: flex; gap: 1rem; } .pictures img { width: 11rem; max-width: 45%; border-radius: .5rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.answers div { border: 1px solid #8888; border-radius: .5rem; padding: .75rem 1rem; }
h3 { margin: 0 0 .25rem; font-size: 1rem; } p { margin: .25rem 0; } .verdict { opacity: .7; font-size: .875rem; }
"""


@dataclass(frozen=True)
class Pair:
    """A question with its pictures and the lines of samples.jsonl that two evaluations have on it."""

    what: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def pictures(self) -> list[str]:
        return list(self.after["image_paths"])


def find_pairs(before: Path, after: Path) -> list[Pair]:
    """A risky request and a harmless one of two evaluations' folders; none where an evaluation has no such samples.

    The first in the tests' order whose two answers have the commonest pair of verdicts: an example, not a selection of
    the best.
    """
    if not all((folder / SAMPLES_FILE).is_file() for folder in (before, after)):
        return []
    old = {(row["task"], row["id"]): row for row in read_samples(before)}
    new = read_samples(after)
    found = []
    for what, tasks in (("A risky request", _RISKY), ("A harmless request", _BENIGN)):
        pair = _typical([(old[row["task"], row["id"]], row) for row in _of_first_task(new, tasks, old)])
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


def write_page(path: Path, pairs: Sequence[Pair], *, titles: tuple[str, str]) -> None:
    """The pairs as a page that opens from disk, pictures inside."""
    sections = "".join(_section(pair, titles) for pair in pairs)
    write_atomic(
        path,
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Before and after</title><style>{_STYLE}</style><h1>Before and after</h1>{sections}</html>\n",
    )


def _section(pair: Pair, titles: tuple[str, str]) -> str:
    pictures = "".join(_image(path, number) for number, path in enumerate(pair.pictures, start=1))
    answers = "".join(
        f"<div><h3>{html.escape(title)}</h3><p>{html.escape(row['answer'] or '(empty)')}</p>"
        f"<p class=verdict>{html.escape(str(row['verdict']))}: {html.escape(str(row['reason']))}</p></div>"
        for title, row in zip(titles, (pair.before, pair.after))
    )
    return (
        f"<h2>{html.escape(pair.what)}</h2><div class=pictures>{pictures}</div>"
        f"<p>{html.escape(pair.after['question'])}</p><div class=answers>{answers}</div>"
    )


def _image(path: str, number: int) -> str:
    """The picture inside the page; its name where the dataset has been moved or deleted since."""
    if not Path(path).is_file():
        return f"<p>picture {number}: {html.escape(Path(path).name)} is no longer there</p>"
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f"<img alt='picture {number}' src='data:{kind};base64,{data}'>"
