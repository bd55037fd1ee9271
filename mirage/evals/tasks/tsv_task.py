"""Tasks that read a VLMEvalKit TSV: the general sets that are published so, and any other file by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from mirage.config.schema import EvalConfig
from mirage.errors import UserError
from mirage.evals.judge import Scored, Verdict
from mirage.evals.task import Card, Metric, Sample, Task
from mirage.evals.tasks.exchanged import load_sample
from mirage.evals.tasks.multiple_choice import FIRST, METRICS, ChoiceTask, all_right, missing, with_groups
from mirage.evals.tasks.question import ANSWERS, Question, answer_list, make_sample, muirbench_prompt, vlmevalkit_prompt
from mirage.evals.tasks.tsv import EXCHANGED, TsvRow, read_rows
from mirage.safe_paths import is_number

PREFIX = "tsv:"
# Sets whose file names hold one of these are circular (vlmeval/dataset/image_mcq.py `evaluate_heuristic`).
CIRCULAR_WORDS = ("mmbench", "ccbench", "circular", "mmcr")
_ROTATION_STEP = 1_000_000
_FILE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

Prompt = Callable[[TsvRow], str]


def default_prompt(row: TsvRow) -> str:
    """VLMEvalKit's default layout of a row."""
    return vlmevalkit_prompt(row.cells["question"], row.options, hint=row.cells.get("hint"))


def direct_prompt(row: TsvRow) -> str:
    """MuirBench's layout of a row."""
    return muirbench_prompt(row.cells["question"], row.options)


class TsvTask(ChoiceTask):
    """A TSV of `index, question, image (or image_path), A.., answer`, with `hint`, `category`, `l2-category`, `split`.

    The coarser of the two category columns is the sample's category, the finer its sub-category.
    """

    def __init__(
        self,
        name: str,
        description: str,
        card: Card,
        *,
        home: str | None,
        file: str,
        split: str | None = None,
        prompt: Prompt = default_prompt,
    ) -> None:
        self.name, self.description, self.card = name, description, card
        self._home, self.file, self.split, self.prompt = home, file, split, prompt

    def folder(self, config: EvalConfig, data_dir: Path) -> Path:
        base = config.benchmarks_dir.expanduser().absolute()
        return base if self._home is None else base / self._home

    def files(self, folder: Path) -> list[Path]:
        return [folder / self.file] if (folder / self.file).is_file() else []

    def load(self, folder: Path) -> list[Sample]:
        path = folder / self.file
        if not path.is_file():
            raise missing(self, folder, put=self.file)
        rows = read_rows(path)
        if self.split is not None and any("split" in row.cells for row in rows):
            rows = [row for row in rows if row.cells.get("split") == self.split]
            if not rows:
                raise UserError(f"{path} has no rows of split {self.split!r}; download {self.file} again")
        return self.samples(rows)

    def samples(self, rows: Sequence[TsvRow]) -> list[Sample]:
        """The rows as samples, in order."""
        coarse, fine = category_columns(rows)
        return [self._sample(row, coarse=coarse, fine=fine) for row in rows]

    def _sample(self, row: TsvRow, *, coarse: str | None, fine: str | None) -> Sample:
        if EXCHANGED not in row.cells:
            return make_sample(question_of(row, coarse=coarse, fine=fine), self.prompt(row))
        sample = load_sample(row.cells[EXCHANGED], key=row.index, pictures=row.pictures, where=row.where)
        if sample.choice is None and ANSWERS not in sample.meta:
            raise UserError(
                f"{row.where}: it has neither options nor an answer, so that only the task it was exported from can "
                "score it: `mirage rescore FILE task=TASK`"
            )
        return sample


class CircularTsvTask(TsvTask):
    """A TSV whose questions stand there with rotated options: a question is right only if all its rotations are.

    Rotations share `g_index`, else `index` modulo 1,000,000 (vlmeval/dataset/utils/multiple_choice.py
    `mcq_circular_eval`). Rates over rotations are there as well, and `vanilla` over the questions as they were asked.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("circular", "higher", "all rotations of the question are right"),
        Metric("circular_official", "higher", "all rotations are right as the benchmark's own parser reads them"),
        Metric("vanilla", "higher", "the question is right in its first rotation"),
        *METRICS,
    )
    _OVER_GROUPS = ("circular", "circular_official", "vanilla")

    def samples(self, rows: Sequence[TsvRow]) -> list[Sample]:
        groups = {row.index: _group(row) for row in rows}
        # The unrotated question stands for its rotations wherever it lies in the file.
        ordered = sorted(rows, key=lambda row: row.index != groups[row.index])
        marked = {sample.id: sample for sample in with_groups(super().samples(ordered), groups)}
        return [marked[row.index] for row in rows]

    def counts(self, metric: str, sample: Sample) -> bool:
        return metric not in self._OVER_GROUPS or FIRST in sample.meta

    def settle(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Verdict]:
        settled = all_right(samples, verdicts, names={"accuracy": "circular", "accuracy_official": "circular_official"})
        return [_with_vanilla(sample, verdict) for sample, verdict in zip(samples, settled, strict=True)]


def _with_vanilla(sample: Sample, verdict: Verdict) -> Verdict:
    if isinstance(verdict, Scored) and FIRST in sample.meta and "accuracy" in verdict.events:
        return replace(verdict, events=(*verdict.events, "vanilla"))
    return verdict


def question_of(row: TsvRow, *, coarse: str | None, fine: str | None) -> Question:
    """A row as a question; without options it is an open one, whose answer may be a list."""
    category = row.cells.get(coarse, "none") if coarse else "none"
    options = row.options
    answer = row.cells.get("answer")
    return Question(
        id=row.index,
        where=row.where,
        text=row.cells["question"],
        pictures=row.pictures,
        category=category,
        sub_category=row.cells.get(fine, category) if fine else category,
        options=options,
        answer=answer,
        answers=answer_list(answer) if answer is not None and not options else (),
    )


def category_columns(rows: Sequence[TsvRow]) -> tuple[str | None, str | None]:
    """(coarse, fine) among `category` and `l2-category`.

    l2-category is the coarse one where each category lies in one of it (MMBench, MMT-Bench, MMMU), else category is
    (MMStar).
    """
    pairs = {(row.cells.get("category"), row.cells.get("l2-category")) for row in rows}
    categories, parents = {category for category, _ in pairs}, {parent for _, parent in pairs}
    present = [name for name, values in (("category", categories), ("l2-category", parents)) if values != {None}]
    if len(present) < 2:
        return (present[0], present[0]) if present else (None, None)
    return ("l2-category", "category") if len(pairs) == len(categories) else ("category", "l2-category")


def _group(row: TsvRow) -> str:
    if "g_index" in row.cells:
        return row.cells["g_index"]
    if not is_number(row.index):
        raise UserError(f"{row.where}: a circular set needs whole-number indices or a column g_index")
    return str(int(row.index) % _ROTATION_STEP)


def named_task(name: str) -> Task:
    """The task `tsv:NAME`: <benchmarks_dir>/NAME.tsv in VLMEvalKit's default layout, circular if its name says so."""
    stem = name.removeprefix(PREFIX)
    if not _FILE_NAME.match(stem):
        raise UserError(f"eval.tasks: {name!r}: write {PREFIX}NAME for the file NAME.tsv in eval.benchmarks_dir")
    card = Card(
        size="as the file has",
        licence="as its source says",
        source=f"Put {stem}.tsv, a VLMEvalKit TSV, into eval.benchmarks_dir itself.",
    )
    kind = CircularTsvTask if any(word in stem.lower() for word in CIRCULAR_WORDS) else TsvTask
    return kind(name, f"the questions of {stem}.tsv", card, home=None, file=f"{stem}.tsv")
