"""A task: where its samples come from, how an answer is scored, and how verdicts become rates."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from mirage.data.row import Choice, Decision, Message
from mirage.evals.judge import Judge, Unscored, Verdict
from mirage.evals.metrics import TaskResult, aggregate_verdicts


@dataclass(frozen=True)
class Sample:
    """One prompt with what its scorer needs to know. `image_paths[i]` is the image of `ImagePart(index=i)`."""

    id: str
    messages: tuple[Message, ...]
    image_paths: tuple[Path, ...]
    category: str
    sub_category: str
    cluster: str
    concepts: tuple[str | None, ...] = ()
    image_sha256: tuple[str | None, ...] = ()
    decision: Decision | None = None
    risk: str | None = None
    choice: Choice | None = None
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The last user turn's text."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")


@dataclass(frozen=True)
class Metric:
    """A rate of a task: the share of judged samples whose verdict lists `name` among its events."""

    name: str
    better: Literal["lower", "higher", "neither"]
    meaning: str


class Task(ABC):
    """One set of samples with its scorer. Subclasses are listed in `mirage.evals.tasks.TASKS`."""

    name: str
    description: str
    # The first metric is the headline.
    metrics: ClassVar[tuple[Metric, ...]]

    @abstractmethod
    def load(self, data_dir: Path) -> list[Sample]:
        """The task's samples in a fixed order. Raises `UserError` naming file and row for anything it cannot read."""

    @abstractmethod
    def score(self, sample: Sample, answer: str, judge: Judge) -> Verdict:
        """Judge one answer."""

    def aggregate(self, samples: Sequence[Sample], verdicts: Sequence[Verdict], *, max_unscored: float) -> TaskResult:
        """Rates over all samples, by category and by sub-category. `max_unscored` is a share, not a percentage."""
        return aggregate_verdicts(
            samples, verdicts, metrics=[metric.name for metric in self.metrics], max_unscored=max_unscored
        )


def score_answer(task: Task, sample: Sample, answer: str, judge: Judge) -> Verdict:
    """`task.score`, with any failure of the judge turned into `Unscored`: a broken judge is counted, never dropped."""
    try:
        return task.score(sample, answer, judge)
    except Exception as error:
        first_line = re.sub(r"\s+", " ", str(error)).strip()[:200]
        return Unscored(f"the judge failed: {type(error).__name__}: {first_line}")
