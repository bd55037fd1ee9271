"""Verdicts for answers that were found: one event loop a task, and no answer scored that never came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from mirage.evals.answers import Answer
from mirage.evals.judge import Judge, Unscored, Verdict
from mirage.evals.judges.model_judge import ModelJudge
from mirage.evals.task import Sample, Task, score_answer


def score_found(
    task: Task,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    judge: Judge,
    *,
    on_verdict: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """The verdicts in the samples' order; an answer that failed to come is unscored, and the judge is not asked.

    `on_verdict` is called for each as it comes. Raises `UserError` where the judge cannot be asked at all; what it has
    said by then is kept.
    """
    return asyncio.run(_score(task, samples, answers, judge, on_verdict))


async def _score(
    task: Task, samples: Sequence[Sample], answers: Sequence[Answer], judge: Judge, on_verdict: Callable[[], None]
) -> list[Verdict]:
    there = [number for number, answer in enumerate(answers) if answer.failure is None]

    async def score(number: int) -> Verdict:
        verdict = await score_answer(task, samples[number], answers[number].text, judge)
        on_verdict()
        return verdict

    try:
        scored = await asyncio.gather(*(score(number) for number in there))
    finally:
        if isinstance(judge, ModelJudge):
            await judge.aclose()
    verdicts: list[Verdict] = [Unscored(f"no answer: {answer.failure}") for answer in answers]
    for number, verdict in zip(there, scored, strict=True):
        verdicts[number] = verdict
    # With the unscored ones in their places: a pair or group is not right without them.
    return task.settle(samples, verdicts)
