"""A key planted in the environment is in no file, no line, no traceback and no page, whoever sends it back to us.

The servers here return the key in error messages, headers and good replies; a crash has it in its message. Searched
for: the key itself, percent-encoded, and in base64 at each of the three places where it can begin.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from data_gen.cli import main as data_gen
from mirage import cli
from mirage.config.loader import load_recipe
from mirage.endpoint.config import EndpointConfig
from mirage.errors import UserError
from mirage.evals.answers import Answer
from mirage.evals.judge import Scored
from mirage.evals.judges.choose import keep_verdicts
from mirage.evals.judges.endpoint_judge import EndpointJudge
from mirage.evals.scoring import score_found
from mirage.evals.tasks import TASKS
from mirage.tracking.alerts import stop_alert
from mirage.tracking.redact import HIDDEN, redact, refuse_secret_arguments, refuse_secrets
from tests.support.fake_openai import FakeOpenAI, FakeRequest, Raw
from tests.support.judging import make_sample, mis_reply

# One that no shape gives away; '+' and '/' look different in each encoding.
KEY = "planted/Key+0123456789~abcdefghijk"
VARIABLES = ("OPENAI_API_KEY", "JUDGE_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
PIPELINE = """
seeds: [{path: seeds.jsonl, source: hand-written, licence: CC0-1.0, attribution: the tests}]
endpoints:
  model: {base_url: "BASE", model: fake, concurrency: 2, backoff_seconds: 0.01, api_key_env: OPENAI_API_KEY}
stages:
  extract: {use: rule}
  compose: {use: model, endpoint: model}
  illustrate: {use: draw, pixels: 32}
  classify: {use: rule, train_share: 0.5}
  label: {use: rule}
  verify: {use: rule}
"""


def forms() -> list[bytes]:
    """The key in the forms in which it could be written down."""
    found = [KEY.encode(), quote(KEY, safe="").encode(), json.dumps(KEY)[1:-1].replace("/", "\\/").encode()]
    for offset in range(3):
        text = base64.b64encode(b"\0" * offset + KEY.encode() + b"\0" * 3)
        found.append(text[4:-8])
    return found


def leaks(*contents: bytes | str) -> list[str]:
    """What holds the key."""
    raw = [content.encode("utf-8", "replace") if isinstance(content, str) else content for content in contents]
    return [f"{form!r} in {content[:200]!r}..." for content in raw for form in forms() if form in content]


def leaking_files(*folders: Path) -> list[str]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    return [f"{path}: {leak}" for path in files for leak in leaks(path.read_bytes(), str(path))]


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.DEBUG)
    yield
    assert not leaks(*(record.getMessage() for record in caplog.records))


def echo(text: str = "") -> str:
    """The key as a server would echo it."""
    return (
        f"{text} {KEY} {quote(KEY, safe='')} {base64.b64encode(('Bearer ' + KEY).encode()).decode()} http://u:{KEY}@h/"
    )


def failing_twice(request: FakeRequest) -> Raw | None:
    """A server that complains with the key in message and headers, and then replies."""
    assert request.headers["authorization"] == f"Bearer {KEY}"
    if request.attempt >= 2:
        return None
    headers = {"x-request-id": KEY, "retry-after": "0.01", "www-authenticate": f"Bearer {KEY}"}
    return Raw(500, {"error": {"message": echo("no such key:"), "type": KEY}}, headers)


def test_the_search_finds_each_form() -> None:
    for text in (echo(), f"x{base64.b64encode((KEY + 'ab').encode()).decode()}", json.dumps(echo())):
        assert leaks(text) and not leaks(json.dumps(redact(text)))
        assert HIDDEN in redact(text)


def test_data_generation_with_an_endpoint_that_sends_the_key_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def reply(request: FakeRequest) -> str:
        query = "How can I use the object in the first image with the object in the second image?"
        return json.dumps({"reason": echo("fits"), "keep": "dog" in request.text, "query": query})

    seeds = [
        {"id": f"s{n}", "text": f"How can I scare the {pet} with the axe?"} for n, pet in enumerate(("dog", "cow"))
    ]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    with FakeOpenAI(reply=reply, fault=failing_twice) as server:
        (tmp_path / "pipeline.yaml").write_text(PIPELINE.replace("BASE", server.base_url))
        command = ["run", str(tmp_path / "pipeline.yaml"), "--out", str(tmp_path / "out")]
        assert data_gen(command) == 0
        assert len(server.log) >= 6
    # Every call fails for good.
    fault = Raw(400, {"error": {"message": echo("bad request")}})
    with FakeOpenAI(fault=lambda _: fault) as server:
        (tmp_path / "pipeline.yaml").write_text(PIPELINE.replace("BASE", server.base_url))
        with pytest.raises(UserError, match="2 failed"):
            data_gen([*command[:-1], str(tmp_path / "failed")])
    assert not leaks(*capfd.readouterr())
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.jsonl"))
    assert HIDDEN.encode() in written, "what the server said is kept, without the key"
    assert not leaking_files(tmp_path)


def test_a_judge_that_sends_the_key_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    samples = [make_sample(number) for number in range(4)]
    answers = [Answer(str(number), f"I decline, {number}.", 4, "stop") for number in range(4)]

    def reply(request: FakeRequest) -> str:
        return echo() if ", 3." in request.text else mis_reply("safe", reason=echo("because"))

    with FakeOpenAI(reply=reply, fault=failing_twice, retry_after="0.01") as server:
        config = EndpointConfig(
            base_url=server.base_url, model="fake", api_key_env="JUDGE_API_KEY", backoff_seconds=0.01, max_attempts=5
        )
        judge = EndpointJudge(config)
        with keep_verdicts(judge, tmp_path / "out"):
            verdicts = score_found(TASKS["mis_hard"], samples, answers, judge)
    assert [type(verdict) is Scored for verdict in verdicts] == [True, True, True, False]
    assert HIDDEN in str(verdicts[0])
    assert not leaks(repr(verdicts), repr(judge), *capfd.readouterr())
    assert not leaking_files(tmp_path)


@pytest.mark.parametrize("setting", ["tracking.console=plain", "tracking.console=json"])
def test_a_crash_is_told_without_the_key(setting: str) -> None:
    program = (
        "import os, sys\n"
        "from mirage.errors import UserError, run_main\n"
        "def main():\n"
        "    key = os.environ['HF_TOKEN']\n"
        "    try:\n"
        "        raise ValueError(f'401 for https://user:{key}@host/x')\n"
        "    except ValueError as error:\n"
        "        raise RuntimeError(f'cannot load with {key!r}') from error\n"
        "run_main(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, setting], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"Traceback" in done.stderr and b"RuntimeError: cannot load with" in done.stderr
    assert HIDDEN.encode() in done.stderr
    assert (b'"event": "error"' in done.stdout) == ("json" in setting)
    assert not leaks(done.stdout, done.stderr)


def test_an_alert_of_a_crash_has_no_key() -> None:
    alert = stop_alert(RuntimeError(echo("cannot load")), step=3)
    assert HIDDEN in alert.text and not leaks(repr(alert))


# Keys in settings


@pytest.mark.parametrize(
    "argument",
    [
        "model.path=https://user:hunter2hunter2@host/model",
        f"eval.judge_endpoint.base_url=https://host/v1?key={KEY}",
        f"name={quote(KEY, safe='')}",
        "tracking.api_key=abc123",
        "--api-key=abc123",
        "hf_abcdefghijklmnopqrstuvwx",
        "eval.judge_endpoint.extra_body={api_key: sk-0123456789abcdefgh}",
    ],
)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(argument: str) -> None:
    with pytest.raises(UserError, match=r"argument 2 of the command line.* holds a key, token or password") as caught:
        refuse_secret_arguments(["recipe=tiny_internvl_mis", argument])
    said = str(caught.value)
    assert not leaks(said)
    assert not [word for word in ("hunter2", "abc123", "abcdefghijkl", "0123456789") if word in said]


def test_the_commands_refuse_secrets(repo_root: Path) -> None:
    command = [sys.executable, "-m", "mirage.cli", "plan", "recipe=tiny_internvl_mis", f"name={KEY}"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, check=False)
    assert done.returncode == 2 and b"argument 3 of the command line (name=...) holds a key" in done.stderr
    assert not leaks(done.stdout, done.stderr)


@pytest.mark.parametrize("line", [f"name: '{KEY}'", "tracking: {api_key: abc123}", "  password: 'x y'"])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(line: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: tiny_internvl_mis\n{line}\n")
    with pytest.raises(UserError, match=r"mine\.yaml holds a key, token or password") as caught:
        load_recipe([f"recipe={file}"])
    assert not leaks(str(caught.value)) and "abc123" not in str(caught.value)


def test_names_of_variables_and_chance_words_are_no_secrets(repo_root: Path) -> None:
    environ = {"SESSION_KEY": "internvl", "SOME_TOKEN": "tiny_internvl"}
    for text in (
        "eval.judge_endpoint.api_key_env=OPENAI_API_KEY", "recipe=tiny_internvl_mis", "key=labels.key.json",
        "train.loss_reduction=token", "run_dir=/home/me/runs/tiny_internvl",
    ):  # fmt: skip
        refuse_secrets(text, "here", environ=environ)
    for file in [*repo_root.glob("recipes/**/*.yaml"), *repo_root.glob("data_gen/**/*.yaml")]:
        refuse_secrets(file.read_text("utf-8"), str(file), environ=environ)


# The whole chain: training that crashes, tracking, report, model card


SCRIPT = """
import os, sys
from mirage.errors import run_main
from mirage.training import loss
sound, calls = loss.PackedLossModel.forward, []
def forward(self, batch):
    calls.append(None)
    if len(calls) == 5:
        key = os.environ["HF_TOKEN"]
        raise RuntimeError(f"server said https://user:{key}@host does not know {key}")
    return sound(self, batch)
if "crash" in os.environ:
    loss.PackedLossModel.forward = forward
from mirage.train import main
run_main(main)
"""


@pytest.mark.slow
def test_a_run_that_crashes_and_goes_on_leaves_the_key_nowhere(
    tmp_path: Path, repo_root: Path, shapes: Path, tiny_folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    def reply(request: FakeRequest) -> str:
        return mis_reply("safe", reason=echo("because"))

    run_dir, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(SCRIPT)
    with FakeOpenAI(reply=reply, fault=failing_twice, retry_after="0.01") as server:
        settings = [
            "recipe=tiny_internvl_mis", "model.tiny=null", f"model.path={tiny_folders['internvl']}",
            f"data.dir={shapes}",
            "preprocessing.image_size=56", "preprocessing.max_tiles=1", f"run_dir={run_dir}", "train.batch_samples=4",
            "data.sources=[{split: train}, {split: train_twins}, {split: train_general}]", "train.max_steps=6",
            "checkpoint.every_steps=2", "train.precision=fp32", "tracking.wandb=offline", "tracking.console=plain",
            "eval.tasks=[mis_hard, general]", "eval.max_samples=4", "eval.max_new_tokens=8", "eval.judge=endpoint",
            f"eval.judge_endpoint.base_url={server.base_url}", "eval.judge_endpoint.model=fake",
            "eval.max_unscored=0.99", "eval.judge_endpoint.api_key_env=JUDGE_API_KEY",
        ]  # fmt: skip
        said: list[bytes] = []
        for crash in (True, False):
            more: dict[str, Any] = {"crash": "yes"} if crash else {}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root), **more}
            done = subprocess.run(
                [sys.executable, script, *settings], cwd=repo_root, env=environment, capture_output=True, check=False
            )
            assert done.returncode == (1 if crash else 0), done.stderr[-3000:]
            said += [done.stdout, done.stderr]
    assert b"does not know [hidden]" in said[1]
    assert cli.dispatch(["report", str(run_dir)]) == 0
    assert cli.dispatch(["report", str(run_dir), "--markdown"]) == 0
    assert list(run_dir.glob("report.html")) and list(run_dir.rglob("*.wandb")) and list(run_dir.rglob("README.md"))
    assert not leaks(*said, *capfd.readouterr())
    assert not leaking_files(*_folders(tmp_path))


def _folders(root: Path) -> Iterable[Path]:
    return [path for path in root.iterdir() if path.is_dir()]
