"""A judge that hangs: it costs bounded time, ends as unscored, and never holds up training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mirage.endpoint.config import EndpointConfig
from mirage.endpoint.failures import EndpointFailure
from mirage.evals.answers import Answer
from mirage.evals.judges.choose import keep_verdicts
from mirage.evals.judges.endpoint_judge import EndpointJudge
from mirage.evals.results import read_results
from mirage.evals.schedule import all_jobs, results_dir
from mirage.evals.scoring import score_found
from mirage.evals.tasks import TASKS
from tests.support.fake_openai import FakeOpenAI
from tests.support.judging import make_sample, mis_reply

NUM_SAMPLES = 300
CONCURRENCY, ATTEMPTS, TIMEOUT_SECONDS = 8, 2, 0.3


def settings(server: FakeOpenAI) -> EndpointConfig:
    return EndpointConfig(
        base_url=server.base_url, model="fake", concurrency=CONCURRENCY, max_attempts=ATTEMPTS,
        timeout_seconds=TIMEOUT_SECONDS, backoff_seconds=0.01,
    )  # fmt: skip


def test_a_judge_that_hangs_is_given_up_and_makes_nothing_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 300 questions would hang for two time-outs; after a round of them the rest is not sent."""
    # Verdicts of an earlier run of this test would be taken from the cache that runs share.
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))
    samples = [make_sample(number) for number in range(NUM_SAMPLES)]
    answers = [Answer(str(number), f"I decline, {number}.", 4, "stop") for number in range(NUM_SAMPLES)]
    task = TASKS["mis_hard"]
    with FakeOpenAI(reply=lambda _: mis_reply("safe"), fault=lambda _: "timeout", hang_seconds=60.0) as server:
        judge = EndpointJudge(settings(server))
        with keep_verdicts(judge, tmp_path / "out"):
            verdicts = score_found(task, samples, answers, judge)
        # A full round, those then on their way, and a few that looked whether it is back.
        assert len(server.log) <= 4 * CONCURRENCY * ATTEMPTS < 2 * NUM_SAMPLES
        result = task.aggregate(samples, verdicts, max_unscored=0.02)
        assert result.num_unscored == NUM_SAMPLES and not result.valid
        assert all(
            rate.percent is None and (rate.bound_low, rate.bound_high) == (0, 100) for rate in result.rates.values()
        )
        assert {reason.partition(":")[0] for reason in result.unscored_reasons} == {"transient"}
        assert any("has answered none of the last" in reason for reason in result.unscored_reasons)
        # It comes back: the same questions are asked again, as what failed so is not kept.
        server.fault = None
        judge = EndpointJudge(settings(server))
        with keep_verdicts(judge, tmp_path / "out"):
            verdicts = score_found(task, samples, answers, judge)
        assert task.aggregate(samples, verdicts, max_unscored=0.02).num_unscored == 0


def test_one_request_at_a_time_finds_out_that_it_is_back() -> None:
    import asyncio

    from mirage.endpoint.client import Endpoint
    from mirage.endpoint.messages import ChatMessage

    async def ask(endpoint: Endpoint, count: int) -> list[object]:
        calls = [endpoint.ask([ChatMessage("user", (f"{number}",))]) for number in range(count)]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    async def main(server: FakeOpenAI) -> None:
        async with Endpoint(settings(server)) as endpoint:
            failed = await ask(endpoint, 60)
            assert all(isinstance(item, EndpointFailure) and item.kind == "transient" for item in failed)
            server.fault = None
            assert not [item for item in await ask(endpoint, 1) if isinstance(item, Exception)]
            assert not [item for item in await ask(endpoint, 60) if isinstance(item, Exception)]

    with FakeOpenAI(reply=lambda _: "hello", fault=lambda _: "timeout", hang_seconds=60.0) as server:
        asyncio.run(main(server))


@pytest.mark.slow
def test_training_does_not_wait_for_a_worker_whose_judge_hangs(
    tmp_path: Path, repo_root: Path, shapes: Path, tiny_folders: dict[str, Path]
) -> None:
    run_dir = tmp_path / "run"
    with FakeOpenAI(reply=lambda _: mis_reply("safe"), fault=lambda _: "timeout", hang_seconds=900.0) as server:
        arguments = [
            "recipe=tiny_internvl_mis", "model.tiny=null", f"model.path={tiny_folders['internvl']}",
            f"data.dir={shapes}", "preprocessing.image_size=56", "preprocessing.max_tiles=1", f"run_dir={run_dir}",
            "train.batch_samples=4", "train.max_steps=12", "checkpoint.every_steps=4", "train.precision=fp32",
            "data.sources=[{split: train}, {split: train_twins}, {split: train_general}]", "tracking.wandb=off",
            "tracking.console=plain", "eval.mode=worker", "eval.tasks=[mis_hard, general]", "eval.max_samples=4",
            "eval.max_new_tokens=4", "eval.judge=endpoint", f"eval.judge_endpoint.base_url={server.base_url}",
            "eval.judge_endpoint.model=fake", "eval.judge_endpoint.timeout_seconds=40",
            "eval.judge_endpoint.deadline_seconds=40", "eval.judge_endpoint.max_attempts=1",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MIRAGE_CACHE": str(tmp_path / "cache")}
        options = {"cwd": repo_root, "env": environment, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        work = [sys.executable, "-m", "mirage.cli", "worker", str(run_dir), "device=cpu"]
        training = subprocess.Popen(
            [sys.executable, "mirage/train.py", *arguments],
            **options,
            stderr=subprocess.STDOUT,
            text=True,  # type: ignore[call-overload]
        )
        wait_for(lambda: (run_dir / "evals" / "step-000000" / "state.json").exists())
        worker = subprocess.Popen(work, **options, stderr=subprocess.STDOUT, text=True)  # type: ignore[call-overload]
        said = training.communicate(timeout=300)[0]
        assert training.returncode == 0, said[-3000:]
        # Whatever the worker has done by now, it was not the training that asked or waited.
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["axis"] == "train"]
        assert [line["step"] for line in steps] == list(range(1, 13))
        assert max(line["train/step_seconds"] for line in steps) < 20, "no step took as long as one of its time-outs"
        heard = worker.communicate(timeout=500)[0]
    jobs = {job.step: job.state for job in all_jobs(run_dir)}
    assert set(jobs) == {0, 4, 8, 12} and worker.returncode == 0, heard[-3000:]
    for step in jobs:
        task = read_results(results_dir(run_dir, step)).tasks["mis_hard"]
        assert not task.valid and all(rate.percent is None for rate in task.rates.values())
        assert {reason.partition(":")[0] for reason in task.unscored_reasons} == {"transient"}


def wait_for(found: object) -> None:
    end = time.monotonic() + 200
    while not found():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
