"""General ability: multiple-choice questions, scored by what the reply says and never by a guess."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from mirage.errors import UserError
from mirage.evals.choice import extract_choice
from mirage.evals.judge import Judge, Scored, Verdict
from mirage.evals.task import Metric, Sample, Task
from mirage.evals.tasks.rows import OWN_CARD, ROWS_FILE, load_split


class GeneralTask(Task):
    """The multiple-choice rows of a split. A reply without one clear option is wrong, and counted on its own too."""

    card = OWN_CARD
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "higher", "the reply gives the right option"),
        Metric("no_option", "lower", "extraction failure: the reply gives no option, or several; counted as wrong"),
    )

    def __init__(self, name: str, split: Literal["general", "line"], description: str) -> None:
        self.name = name
        self.split = split
        self.description = description

    def load(self, folder: Path) -> list[Sample]:
        if not (folder / ROWS_FILE).is_file():
            raise UserError(
                f"task {self.name!r}: {folder} has no {ROWS_FILE}; take {self.name!r} out of eval.tasks or run "
                "`make datagen`"
            )
        samples = load_split(folder, self.split, task=self.name)
        if self.split == "line":  # its other rows are about pairs
            samples = [sample for sample in samples if sample.decision is None]
        for sample in samples:
            if sample.choice is None:
                raise UserError(
                    f"{folder / ROWS_FILE}: row {sample.id}: rows of split {self.split!r} need `choice` "
                    "(options, answer)"
                )
        return samples

    def files(self, folder: Path) -> list[Path]:
        return [folder / ROWS_FILE]

    async def score(self, sample: Sample, answer: str, judge: Judge) -> Verdict:
        assert sample.choice is not None
        extraction = extract_choice(answer, sample.choice.options)
        if extraction.index is None:
            return Scored("no_option", ("no_option",), extraction.reason)
        chosen = sample.choice.options[extraction.index]
        if extraction.index == sample.choice.answer:
            return Scored("right", ("accuracy",), extraction.reason, {"option": chosen})
        return Scored("wrong", (), extraction.reason, {"option": chosen})
