"""The data ledger: every row that a run does not train on, with its reason, and the counts of those it does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirage.data.lengths import LengthIndex
from mirage.data.pack import PackPlan
from mirage.data.row_list import LeftOut, LeftOutRows, RowList
from mirage.files import write_atomic
from mirage.tracking.console import make_console
from mirage.training.callbacks import Callback

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer

LEDGER_FILE = "ledger.jsonl"
# Why a row is not trained on: what a line's `kind` can be.
UNUSABLE, TOO_LONG, NOT_DRAWN, NOT_REACHED = "unusable", "too long", "not drawn", "not reached"


class Ledger:
    """What becomes of every row of a run's sources. A pure function of the mixture and the plan.

    `left_out` gives, by kind, the rows that never came into the plan; rows of the plan that its steps do not reach
    (`train.max_steps`, `train.epochs` under 1) are added here.
    """

    def __init__(
        self, left_out: Mapping[str, Sequence[LeftOut]], rows: RowList, index: LengthIndex, plan: PackPlan
    ) -> None:
        self._rows, self._index, self._plan = rows, index, plan
        self._left_out = dict(left_out)

    @cached_property
    def left_out(self) -> dict[str, Sequence[LeftOut]]:
        """Rows that are not trained on, by kind."""
        unseen = self.times_seen(self._plan.num_steps) == 0
        # A row that its source gives several times counts as reached when one of them is.
        keys, first = np.unique(self._rows.keys, return_index=True)
        reached = np.unique(self._rows.keys[~unseen])
        numbers = np.sort(first[~np.isin(keys, reached, assume_unique=True)])
        reason = f"the run ends after step {self._plan.num_steps}, before this row's turn"
        unreached = LeftOutRows(self._rows.take(numbers), [reason] * self._rows.num_parts)
        return {**self._left_out, NOT_REACHED: unreached}

    def times_seen(self, num_steps: int) -> np.ndarray:
        """How often each row of the plan is trained on in the first `num_steps` steps, [rows] int64."""
        seen = np.zeros(len(self._rows), np.int64)
        for step in range(num_steps):
            np.add.at(seen, self._plan.step_samples(step), 1)
        return seen

    def write(self, run_dir: Path) -> None:
        """Write `ledger.jsonl`: kind, source, location, row_id and reason of each row not trained on."""
        lines = (
            json.dumps({"kind": kind, **asdict(entry)}, ensure_ascii=False) + "\n"
            for kind, entries in self.left_out.items()
            for entry in entries
        )
        write_atomic(run_dir / LEDGER_FILE, lines)

    def counts(self) -> dict[str, Any]:
        """Numbers for the tracker: rows and tokens of one pass, by source too, and rows not trained on, by kind."""
        names = self._rows.sources
        found: dict[str, Any] = {"data/rows": len(self._rows), **self._token_counts("data", np.ones(len(names), bool))}
        for name in dict.fromkeys(names.tolist()):
            chosen = names == name
            found[f"data/{name}/rows"] = int(chosen.sum())
            found |= self._token_counts(f"data/{name}", chosen)
        for kind, entries in self.left_out.items():
            found[f"data/rows_{kind.replace(' ', '_')}"] = len(entries)
        return found

    def _token_counts(self, prefix: str, chosen: np.ndarray) -> dict[str, int]:
        columns = {
            "tokens": self._index.num_tokens,
            "image_tokens": self._index.num_image_tokens,
            "supervised_tokens": self._index.num_supervised_tokens,
        }
        return {f"{prefix}/{name}": int(column[chosen].sum(dtype=np.int64)) for name, column in columns.items()}

    def start_text(self) -> str:
        """What will be trained on and what not, in a few lines."""
        counts = self.counts()
        sources = dict(Counter(self._rows.sources.tolist()))
        tokens = max(1, counts["data/tokens"])
        pictures, learnt = (counts[f"data/{name}_tokens"] / tokens for name in ("image", "supervised"))
        shares = f"{pictures:.0%} of pictures, {learnt:.0%} learnt"
        lines = [f"data: {len(self._rows):,} rows, {tokens:,} tokens an epoch ({shares})"]
        if len(sources) > 1:
            for name, number in sources.items():
                own, taught = counts[f"data/{name}/tokens"], counts[f"data/{name}/supervised_tokens"]
                lines.append(f"  {name}: {number:,} rows, {own:,} tokens, {taught:,} learnt")
        kinds = [f"{len(entries):,} {kind}" for kind, entries in self.left_out.items() if entries]
        if kinds:
            lines.append(f"rows not trained on: {', '.join(kinds)}; {LEDGER_FILE} lists them")
        return "\n".join(lines)

    def end_text(self, num_steps: int) -> str:
        """How often rows were trained on in the first `num_steps` steps."""
        times = Counter(self.times_seen(num_steps).tolist())
        parts = [f"{count:,} {_times(number)}" for number, count in sorted(times.items(), reverse=True)]
        left_out = sum(len(entries) for kind, entries in self.left_out.items() if kind != NOT_REACHED)
        more = f"; {left_out:,} left out" if left_out else ""
        return f"rows trained on: {', '.join(parts)}{more}"


def _times(number: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(number, f"{number} times")


class LedgerCallback(Callback):
    """Says at the start what is trained on and what not, and at the end how often; to the tracker as well."""

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        self._print(trainer, trainer.ledger.start_text())
        if trainer.tracker is not None:
            trainer.tracker.summary(trainer.ledger.counts())

    def on_end(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        self._print(trainer, trainer.ledger.end_text(trainer.step))
        if trainer.tracker is not None:
            seen = trainer.ledger.times_seen(trainer.step)
            trainer.tracker.summary({"data/rows_seen": int((seen > 0).sum()), "data/samples_seen": int(seen.sum())})

    @staticmethod
    def _print(trainer: Trainer, text: str) -> None:
        make_console(trainer.recipe.tracking.console).say(text, event="data")
