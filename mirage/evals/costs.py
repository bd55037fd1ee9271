"""What asking a server will take, said before the first call, and what it took, said and kept after the last."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage.endpoint.client import Endpoint
from mirage.evals.answers import Answer
from mirage.evals.generate import Prompt, collect_answers
from mirage.evals.judge import Judge, Rubric, Unscored
from mirage.evals.judges.model_judge import ModelJudge
from mirage.evals.task import Sample, Task, score_answer
from mirage.tracking.console import Terminal

USAGE_FILE = "usage.jsonl"
# Rules of thumb: English has about four characters a token; two pictures of a megapixel are 1,500 tokens for GPT-4o
# and up to 2,600 for Qwen2.5-VL; a verdict with its reason is under 100 tokens (docs/judges.md).
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_PICTURE = 1_000
TOKENS_PER_VERDICT = 100


@dataclass
class _Listener:
    """In the judge's place, answers nothing and notes what the judge would ask its server: each question once."""

    judge: ModelJudge
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    name: str = ""
    version: str = ""
    notice: str = ""

    async def assess(self, rubric: Rubric[Any], sample: Sample, answer: str) -> Any:
        if self.judge.cannot(rubric) is None:
            question = self.judge.question(rubric, sample, answer)
            if self.judge.kept(question) is None:
                num_characters = sum(len(text) for _, text in question.turns)
                self.prompt_tokens[question.key] = _tokens(num_characters, len(question.picture_sha256))
        return Unscored("not asked")


def say_judging(
    console: Terminal | None,
    judge: Judge,
    tasks: Sequence[Task],
    prompts: Mapping[str, Sequence[Prompt]],
    answers: Mapping[str, Answer],
) -> None:
    """Say how many verdicts are not in the cache, and about what they take. A judge without a server costs nothing."""
    if console is None or not isinstance(judge, ModelJudge) or judge.endpoint is None:
        return
    listener = _Listener(judge)

    async def listen() -> None:
        for task in tasks:
            for prompt, answer in zip(prompts[task.name], collect_answers(prompts[task.name], answers), strict=True):
                if answer.failure is None:
                    await score_answer(task, prompt.sample, answer.text, listener)

    asyncio.run(listen())
    num_calls = len(listener.prompt_tokens)
    replies = num_calls * TOKENS_PER_VERDICT
    _say(console, _forecast(judge.endpoint, "verdicts", num_calls, sum(listener.prompt_tokens.values()), replies))


def say_answering(
    console: Terminal | None, endpoint: Endpoint, prompts: Sequence[Prompt], kept: Mapping[str, Answer], *, limit: int
) -> None:
    """Say how many answers are not in the store, and about what they take if each has `limit` tokens."""
    if console is None:
        return
    missing = {prompt.key: prompt.sample for prompt in prompts if prompt.key not in kept}
    texts = [sum(len(message.text) for message in sample.messages) for sample in missing.values()]
    pictures = [len(sample.image_paths) for sample in missing.values()]
    num_tokens = sum(map(_tokens, texts, pictures))
    _say(console, _forecast(endpoint, "answers", len(missing), num_tokens, len(missing) * limit, bound="at most "))


@contextlib.contextmanager
def usage_kept(console: Terminal | None, endpoint: Endpoint | None, out_dir: Path, *, role: str) -> Iterator[None]:
    """Say what the block's calls took, and add it to `usage.jsonl`, also where an error ends them; nothing without any.

    It is no part of results.json: the same evaluation costs nothing when it is run again, and has the same results.
    """
    try:
        yield
    finally:
        report = endpoint.report() if endpoint is not None else {}
        if report.get("calls"):
            with (out_dir / USAGE_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"role": role} | report, sort_keys=True) + "\n")
            if console is not None:
                tokens = f"{report['prompt_tokens']:,} prompt and {report['completion_tokens']:,} reply tokens"
                done = f"{report['calls']:,} calls, {report['succeeded']:,} succeeded"
                _say(console, f"{report['model']}: {done}; {tokens}{_money(report['cost_usd'], '')}")


def _forecast(endpoint: Endpoint, what: str, num_calls: int, prompt: int, reply: int, *, bound: str = "about ") -> str:
    name = endpoint.config.model
    if not num_calls:
        return f"{name}: all {what} are kept, no call is needed"
    cost = endpoint.config.cost_usd(prompt_tokens=prompt, completion_tokens=reply)
    tokens = f"about {prompt:,} prompt and {bound}{reply:,} reply tokens"
    return f"{name}: {num_calls:,} {what} are not kept yet: {tokens}{_money(cost, bound)}"


def _money(cost_usd: float | None, bound: str) -> str:
    return "" if cost_usd is None else f", {bound}{cost_usd:.2f} US dollars"


def _tokens(num_characters: int, num_pictures: int) -> int:
    return num_characters // CHARACTERS_PER_TOKEN + num_pictures * TOKENS_PER_PICTURE


def _say(console: Terminal, line: str) -> None:
    console.say(line, event="cost")
