"""A model behind a server measured as one in process: what is sent, what comes of faults, and kill -9 in the middle."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mirage.config.loader import load_section
from mirage.config.schema import EvalConfig
from mirage.endpoint.client import Endpoint
from mirage.endpoint.config import EndpointConfig
from mirage.errors import UserError
from mirage.evals.answers import AnswerStore
from mirage.evals.endpoint_generation import EndpointDecoding, ServerSpec, ask_for_answers, make_endpoint_prompts
from mirage.evals.evaluate_endpoint import evaluate_endpoint, run
from mirage.evals.judges.choose import VERDICTS_FILE
from mirage.evals.request import decide_request
from mirage.evals.results import read_results, read_samples
from tests.support.dataset import write_dataset
from tests.support.fake_openai import FakeOpenAI, FakeRequest
from tests.support.judging import answer_in, make_sample, mis_reply, write_pictures

DECODING = EndpointDecoding(do_sample=False, max_new_tokens=77, extra="{}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))


def ask(server: FakeOpenAI, prompts: list, folder: Path, **settings: object) -> dict:
    config = EndpointConfig(
        base_url=server.base_url, model="fake", temperature=0.0, max_attempts=2, backoff_seconds=0.01, **settings
    )

    async def fetch() -> dict:
        async with Endpoint(config) as endpoint:
            return await ask_for_answers(endpoint, prompts, decoding=DECODING, store=AnswerStore(folder, rank=0))

    return asyncio.run(fetch())


def test_messages_go_out_as_the_sample_has_them_and_answers_come_as_they_are(tmp_path: Path) -> None:
    faults = {1: "length", 2: "empty", 3: "refusal", 4: "content_filter", 5: "content_filter_400", 6: "500"}

    def fault(request: FakeRequest) -> str | None:
        return faults.get(int(request.text.split()[1]))

    paths = write_pictures(tmp_path, 2)
    samples = [make_sample(n, pictures=paths, question=f"number {n}") for n in range(8)]
    prompts = make_endpoint_prompts(samples, fingerprint="f", decoding=DECODING)
    assert len({prompt.key for prompt in prompts}) == 8
    with FakeOpenAI(reply=lambda request: f"  {request.text} is a number  ", fault=fault) as server:
        found = ask(server, prompts, tmp_path / "out")
        body = server.log[0].request.body
        assert (body["temperature"], body["max_tokens"], "seed" in body) == (0.0, 77, False)
        assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]
        assert server.log[0].request.pictures == [path.read_bytes() for path in paths]
        answers = [found[prompt.key] for prompt in prompts]
        assert (answers[0].text, answers[0].finish, answers[0].failure) == ("number 0 is a number", "stop", None)
        assert answers[1].finish == "length" and "number 1".startswith(answers[1].text[:8])
        assert (answers[2].text, answers[2].failure) == ("", None), "an empty answer is an answer"
        assert answers[3].text == "I cannot help with this."
        kinds = [answer.failure and answer.failure.partition(":")[0] for answer in answers[4:]]
        assert kinds == ["content_filter", "content_filter", "transient", None]
        num_requests = len(server.log)
        faults.clear()
        again = ask(server, prompts, tmp_path / "out")
        assert len(server.log) == num_requests + 1, "only what the line's faults took is asked again"
        assert again[prompts[6].key].failure is None
        assert {key: answer for key, answer in again.items() if key != prompts[6].key} == {
            key: answer for key, answer in found.items() if key != prompts[6].key
        }


def test_other_pictures_servers_and_lengths_are_other_answers(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 2)
    samples = [make_sample(1, pictures=paths), make_sample(1, pictures=paths[::-1])]
    longer = DECODING.model_copy(update={"max_new_tokens": 78})
    keys = [
        prompt.key
        for fingerprint, decoding in (("f", DECODING), ("g", DECODING), ("f", longer))
        for prompt in make_endpoint_prompts(samples, fingerprint=fingerprint, decoding=decoding)
    ]
    assert len(set(keys)) == 6


def settings_for(model: FakeOpenAI, judge: FakeOpenAI | None, data: Path, *more: str) -> list[str]:
    judging = [] if judge is None else ["judge=endpoint", f"judge_endpoint.base_url={judge.base_url}"]
    judging += [] if judge is None else ["judge_endpoint.model=judge", "judge_endpoint.max_attempts=2"]
    return [
        f"endpoint.base_url={model.base_url}", "endpoint.model=tested", "endpoint.max_attempts=2",
        f"data_dir={data}", *judging, *more,
    ]  # fmt: skip


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    broken = {"judge": True}

    def judge_fault(request: FakeRequest) -> str | None:
        return "500" if broken["judge"] and "answer 1" in answer_in(request.text) else None

    numbers: dict[str, int] = {}

    def say(request: FakeRequest) -> str:
        return f"I decline, answer {numbers.setdefault(request.key, len(numbers))}"

    def rule(request: FakeRequest) -> str:
        return mis_reply("safe", "level 2")

    with (
        FakeOpenAI(models=("tested",), reply=say) as model,
        FakeOpenAI(models=("judge",), reply=rule, fault=judge_fault) as judge,
    ):
        settings = settings_for(model, judge, data, "tasks=mis_easy,mis_hard,mis_real", "max_unscored=0.9")
        assert run(settings) == 0
        (file,) = (tmp_path / "runs" / "endpoints" / "tested").glob("*/results.json")
        results = read_results(file)
        assert results.preprocessing == ServerSpec(model="tested") and results.decoding.engine == "endpoint"
        assert set(results.judge.prompts) == {"mis-v1"} and results.judge.name == "endpoint:judge"
        assert sum(task.num_unscored for task in results.tasks.values()) == 1
        assert "endpoint:judge" in capsys.readouterr().out
        requests = len(model.log), len(judge.log)
        broken["judge"] = False
        assert run(settings) == 0
        assert (len(model.log), len(judge.log)) == (requests[0], requests[1] + 1)
        settled = read_results(file)
        assert sum(task.num_unscored for task in settled.tasks.values()) == 0
        assert {task.rates["rr"].percent for task in settled.tasks.values()} == {100}
        assert run(settings) == 0 and len(judge.log) == requests[1] + 1
        with pytest.raises(UserError, match="is the model under test"):
            run([item.replace("model=judge", "model=Tested") for item in settings])


def test_json_mode_counts_answers_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data")

    def events(*more: str) -> list[dict[str, Any]]:
        settings = settings_for(model, judge, data, "tasks=mis_hard,mis_real", f"out_dir={tmp_path / 'out'}", *more)
        assert run(settings) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    with (
        FakeOpenAI(models=("tested",), reply=lambda request: f"I decline {request.key}") as model,
        FakeOpenAI(models=("judge",), reply=lambda request: mis_reply("safe", "level 2")) as judge,
    ):
        found = events("console=json")
        (answers,) = (event for event in found if event["event"] == "progress" and event["what"] == "answers")
        verdicts = [event for event in found if event["event"] == "progress" and event["what"] == "verdicts"]
        assert answers["done"] == answers["total"] == len(model.log) and answers["num_kept"] == 0
        assert (
            verdicts[-1]["done"]
            == verdicts[-1]["total"]
            == found[-1]["metrics"]["eval/mis_hard/n"] + (found[-1]["metrics"]["eval/mis_real/n"])
        )
        assert [event["what"] for event in found if event["event"] == "summary"] == ["work", "evaluation"]
        assert found[-1]["metrics"]["eval/mis_hard/rr"] == 100 and found[-1]["file"].endswith("results.json")
        assert sum(event["event"] == "cost" for event in found) == 4
        (tmp_path / "out" / "results.json").unlink()
        again = events("console=json")
        (answers,) = (event for event in again if event["event"] == "progress" and event["what"] == "answers")
        assert answers["num_kept"] == answers["total"] == len(model.log)
        assert events("console=quiet") == []


def test_costs_are_said_before_and_kept_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data")

    def prices(section: str) -> list[str]:
        names = ("prompt", "completion")
        return [f"{section}.price_per_million_{name}_tokens_usd={price}" for name, price in zip(names, (1000, 5000))]

    def said(folder: str) -> list[str]:
        settings = settings_for(model, judge, data, "tasks=mis_hard,mis_real", f"out_dir={tmp_path / folder}")
        assert run([*settings, "max_new_tokens=40", *prices("endpoint"), *prices("judge_endpoint")]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("tested: ", "judge: "))]

    with (
        FakeOpenAI(models=("tested",), reply=lambda request: f"I decline {request.key}") as model,
        FakeOpenAI(models=("judge",), reply=lambda request: mis_reply("safe", "level 2")) as judge,
    ):
        lines = said("out")
        before_answers, after_answers, before_verdicts, after_verdicts = lines
        # Two samples that are asked the same share the answer and are judged one by one.
        num, judged = len(model.log), len(judge.log)
        assert judged > num > 1
        assert before_answers.startswith(f"tested: {num} answers are not kept yet: about ")
        assert f"and at most {40 * num} reply tokens, at most " in before_answers
        assert before_verdicts.startswith(f"judge: {judged} verdicts are not kept yet: about ")
        told = int(re.findall(r"about ([\d,]+) prompt", before_verdicts)[0].replace(",", ""))
        # Two pictures, the rubric's 2,100 characters, and the question and answer.
        assert judged * 2_500 < told < judged * 3_000
        money = (told * 1000 + judged * 100 * 5000) / 1e6
        assert before_verdicts.endswith(f"about {judged * 100} reply tokens, about {money:.2f} US dollars")
        used = [json.loads(line) for line in (tmp_path / "out" / "usage.jsonl").read_text().splitlines()]
        assert [(line["role"], line["calls"]) for line in used] == [("model", num), ("judge", judged)]
        for line, end in zip(used, (after_answers, after_verdicts), strict=True):
            cost = (line["prompt_tokens"] * 1000 + line["completion_tokens"] * 5000) / 1e6
            assert line["cost_usd"] == pytest.approx(cost) and cost > 0
            assert f": {line['calls']} calls, {line['succeeded']} succeeded; " in end and end.endswith(
                f", {cost:.2f} US dollars"
            )
        assert "key" not in json.dumps(used) and "127.0.0.1" not in json.dumps(used)
        # Another folder: the answers come anew and the verdicts from the cache.
        lines = said("other")
        assert lines[2:] == ["judge: all verdicts are kept, no call is needed"]
        assert (tmp_path / "other" / "usage.jsonl").read_text().count("\n") == 1
        assert read_results(tmp_path / "other") == read_results(tmp_path / "out")


def test_answers_that_never_come_are_unscored_and_make_the_task_invalid(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    with FakeOpenAI(models=("tested",), fault=lambda request: "content_filter") as model:
        config = load_section("eval", settings_for(model, None, data, "tasks=mis_hard,general"))
        assert isinstance(config, EvalConfig)
        request = decide_request(
            None, config=config, data_dir=data, device=torch.device("cpu"), baseline=None
        )  # fmt: skip
        results = evaluate_endpoint(request, out_dir=tmp_path / "out")
    for task in results.tasks.values():
        assert task.num_unscored == task.num_samples and not task.valid
        assert all(reason.startswith("no answer: content_filter: ") for reason in task.unscored_reasons)
        assert all((rate.bound_low, rate.bound_high) == (0, 100) for rate in task.rates.values())


def test_weights_and_a_server_are_not_measured_at_once(tmp_path: Path) -> None:
    config = load_section("eval", ["endpoint.base_url=http://127.0.0.1:1/v1", "endpoint.model=m", "tasks=mis_hard"])
    assert isinstance(config, EvalConfig)
    data = write_dataset(tmp_path / "data")
    with pytest.raises(UserError, match="measure one of them"):
        decide_request(tmp_path, config=config, data_dir=data, device=torch.device("cpu"), baseline=None)


def test_kill_9_in_the_middle_and_only_what_is_missing_is_asked(tmp_path: Path) -> None:
    """Killed while the model answers and again while the judge does; then it is finished in this process."""
    data = write_dataset(tmp_path / "data", seed_rows=8)
    _many_rows(data / "rows.jsonl", num=150)
    with (
        FakeOpenAI(models=("tested",), reply=lambda request: f"I decline {request.key}", latency_seconds=0.03) as model,
        FakeOpenAI(models=("judge",), reply=_by_hash, latency_seconds=0.03) as judge,
    ):
        settings = settings_for(
            model, judge, data, "tasks=mis_hard", "endpoint.concurrency=4", "judge_endpoint.concurrency=4",
            f"out_dir={tmp_path / 'out'}",
        )  # fmt: skip
        _killed_when(lambda: len(model.log) >= 40, settings)
        answered = len(AnswerStore(tmp_path / "out", rank=0).read())
        first = len(model.log)
        assert 30 <= answered <= first < 120
        _killed_when(lambda: len(judge.log) >= 50, settings)
        second = len(model.log) - first
        assert second == 150 - answered, "answers that were there are not asked for again"
        verdicts = [json.loads(line) for line in _whole_lines(tmp_path / "out" / VERDICTS_FILE)]
        asked = len(judge.log)
        assert 40 <= len(verdicts) <= asked < 140
        assert run(settings) == 0
        assert len(model.log) == first + second and len(judge.log) == asked + 150 - len(verdicts)
        # In flight when killed: asked twice. Nothing else is.
        assert max(Counter(entry.request.key for entry in judge.log).values()) <= 2
    results = read_results(tmp_path / "out")
    rows = read_samples(tmp_path / "out")
    assert results.tasks["mis_hard"].num_unscored == 0 and len(rows) == 150
    for row in rows:
        assert row["verdict"] == ("asr" if json.loads(_verdict_for(row["answer"]))["label"] == "unsafe" else "rr")


def _by_hash(request: FakeRequest) -> str:
    return _verdict_for(answer_in(request.text))


def _verdict_for(answer: str) -> str:
    return mis_reply("unsafe" if int(answer[-4:], 16) % 3 == 0 else "safe", "level 2", answer)


def _many_rows(file: Path, *, num: int) -> None:
    """Replace the rows of split hard by `num` with questions of their own."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    hard = next(row for row in rows if row["split"] == "hard")
    made = []
    for number in range(num):
        row = json.loads(json.dumps(hard)) | {"id": f"hard-{number}"}
        row["messages"][0]["content"][-1]["text"] += f" Number {number}."
        made.append(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in [*made, *(r for r in rows if r["split"] != "hard")]))


def _killed_when(reached: Callable[[], bool], settings: list[str]) -> None:
    """Run the command in a process of its own, a fork because imports take longer than the test, and kill it."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(settings,))
    process.start()
    deadline = time.monotonic() + 60
    while not reached():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    time.sleep(0.1)  # what was on its way to the servers arrives


def _whole_lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1]
