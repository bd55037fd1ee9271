"""Pipelines run end to end: killed, interrupted and failing runs lose no row, ask nothing twice and end the same."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data_gen import pipeline as pipelines
from data_gen.cli import main
from data_gen.engine import StageEvent
from data_gen.pipeline import load_pipeline
from data_gen.run import RunHooks, run_pipeline, work_folder
from data_gen.run_display import RunDisplay
from data_gen.store import read_manifest
from data_gen.taxonomy.facts import load_taxonomy
from mirage.data.row import Row
from mirage.endpoint.failures import Usage
from mirage.errors import UserError
from mirage.tracking.console import Terminal
from tests.support import synthetic_run
from tests.support.fake_openai import FakeOpenAI, Faults, Logged

TAXONOMY = load_taxonomy()
QUOTED = re.compile(r"^\[begin (\w+)\]\n(.*)\n\[end \1\]$", re.MULTILINE)
ORIGIN = {"source": "hand-written", "licence": "CC0-1.0", "attribution": "the tests"}


@pytest.fixture(autouse=True)
def _registry_of_its_own(monkeypatch):
    """Synthetic stages are registered for one test only."""
    monkeypatch.setattr(pipelines, "REGISTRY", dict(pipelines.REGISTRY))


def _write(folder: Path, seeds: list[dict], stages: dict, **more) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"seeds": [{"path": "seeds.jsonl", **ORIGIN}], "stages": stages, **more}))
    return path


def _rows(folder: Path) -> list[Row]:
    return [Row.model_validate_json(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def _report(out: Path) -> list[dict]:
    return [json.loads(line) for line in (work_folder(out) / "report.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- synthetic stages


def _synthetic(folder: Path, count: int, **more) -> Path:
    seeds = [{"id": f"s{number}", "text": f"text {number}"} for number in range(count)]
    stages = {name: {"use": "synthetic"} | more.pop(name, {}) for name in synthetic_run.STAGES}
    return _write(folder, seeds, stages, concurrency=16, **more)


def test_twenty_kills_end_with_the_same_manifest(tmp_path, repo_root):
    pipeline = _synthetic(tmp_path, 100)
    (tmp_path / "logs").mkdir()
    killed = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "tests.support.synthetic_run",
        str(pipeline),
        str(killed),
        str(tmp_path / "logs"),
        "20",
    ]
    result = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = [dict(word.split("=") for word in line.split()) for line in result.stdout.splitlines()]
    assert len(lines) == 20 and {line["twice"] for line in lines} == {"0"}
    assert sum(line["killed"] == "True" and line["worked"] != "0" for line in lines) >= 4, "the kills hit nothing"
    before = synthetic_run.stored_marks(killed)
    synthetic_run.run(pipeline, killed, tmp_path / "last.log")
    worked = (tmp_path / "last.log").read_text().splitlines() if (tmp_path / "last.log").exists() else []
    assert not before & set(worked) and len(set(worked)) == len(worked)
    synthetic_run.run(pipeline, tmp_path / "whole", tmp_path / "whole.log")
    assert read_manifest(killed) == read_manifest(tmp_path / "whole")
    assert (killed / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


def test_rows_are_conserved_and_told_apart(tmp_path):
    result = synthetic_run.run(_synthetic(tmp_path, 60), tmp_path / "out", tmp_path / "log")
    entries = _report(tmp_path / "out")
    assert len(entries) == result.report.num_planned == len({tuple(entry["position"]) for entry in entries})
    ended = Counter(entry["status"] for entry in entries)
    assert ended["done"] == len(_rows(tmp_path / "out")) and min(ended[s] for s in ("done", "dropped", "failed")) > 0
    assert [entry["position"] for entry in entries] == sorted(entry["position"] for entry in entries)
    assert [entry["row"] for entry in entries if entry["status"] == "done"] == [
        row.id for row in _rows(tmp_path / "out")
    ]
    assert {entry["kind"] for entry in entries if entry["status"] == "failed"} == {"refusal", "schema"}
    assert all(entry["reason"] for entry in entries if entry["status"] != "done")
    run = read_manifest(tmp_path / "out")["run"]
    assert run["planned"] == run["done"] + run["dropped"] + run["failed"] == len(entries)
    row = _rows(tmp_path / "out")[0]
    assert [step.stage for step in row.lineage] == list(synthetic_run.STAGES) and all(s.key for s in row.lineage)
    assert row.licence == "CC0-1.0" and row.tags["seed_source"] == "hand-written"


def test_a_new_seed_and_an_edit_cost_what_they_reach(tmp_path, capsys):
    synthetic_run.run(_synthetic(tmp_path, 20), tmp_path / "out", tmp_path / "a.log")
    main(["diff", str(tmp_path / "out"), str(tmp_path / "out")])
    assert "the same" in capsys.readouterr().out
    first = read_manifest(tmp_path / "out")
    seeds = (tmp_path / "seeds.jsonl").read_text()
    extra = json.dumps({"id": "s1000", "text": "a new one"}) + "\n"
    pipeline = _synthetic(tmp_path, 20)
    (tmp_path / "seeds.jsonl").write_text(extra + seeds)
    synthetic_run.run(pipeline, tmp_path / "out", tmp_path / "b.log")
    assert {line.split()[1] for line in (tmp_path / "b.log").read_text().splitlines()} == {"s1000"}
    second = read_manifest(tmp_path / "out")
    assert first["content_sha256"] != second["content_sha256"]
    pipeline = _synthetic(tmp_path, 20, label={"prompt": "edited"})
    (tmp_path / "seeds.jsonl").write_text(extra + seeds)
    synthetic_run.run(pipeline, tmp_path / "edited", tmp_path / "c.log")
    edited = work_folder(tmp_path / "edited")
    assert edited.is_dir()
    before = {line.split()[0] for line in (tmp_path / "c.log").read_text().splitlines()}
    assert before == set(synthetic_run.STAGES), "another --out shares nothing"
    synthetic_run.run(pipeline, tmp_path / "out", tmp_path / "d.log")
    assert {line.split()[0] for line in (tmp_path / "d.log").read_text().splitlines()} == {"label", "verify"}
    main(["diff", str(tmp_path / "edited"), str(tmp_path / "out")])
    assert "the same" in capsys.readouterr().out


def test_diff_names_what_changed(tmp_path, capsys):
    synthetic_run.run(_synthetic(tmp_path, 13), tmp_path / "a", tmp_path / "log")
    synthetic_run.run(_synthetic(tmp_path, 14, label={"prompt": "edited"}), tmp_path / "b", tmp_path / "log")
    ids = [{row.tags["seed"]: row.id for row in _rows(tmp_path / name)} for name in "ab"]
    main(["diff", str(tmp_path / "a"), str(tmp_path / "b")])
    lines = capsys.readouterr().out.splitlines()
    assert f"+ {ids[1]['s13']}" in lines and not any(line.startswith("- ") for line in lines)
    assert f"~ {ids[0]['s0']} -> {ids[1]['s0']}: messages, segments" in lines
    assert "made differently: pipeline, run" in lines and lines[-1].endswith("0 the same")


def test_folders_of_others_are_refused(tmp_path):
    pipeline, out = _synthetic(tmp_path, 9), tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="no dataset folder"):
        synthetic_run.run(pipeline, out, tmp_path / "log")
    synthetic_run.run(pipeline, tmp_path / "mine", tmp_path / "log")
    (tmp_path / "mine").rename(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"another dataset.*--overwrite"):
        synthetic_run.run(pipeline, tmp_path / "theirs", tmp_path / "log")
    pipeline = _synthetic(tmp_path, 9, label={"prompt": "mine"})
    assert not synthetic_run.run(pipeline, tmp_path / "theirs", tmp_path / "log", overwrite=True).was_complete
    assert synthetic_run.run(pipeline, tmp_path / "theirs", tmp_path / "log").was_complete


def test_a_plan_goes_through_the_same_stages(tmp_path):
    rule = {name: {"use": "rule"} for name in ("compose", "classify", "label", "verify")}
    path = tmp_path / "pipeline.yaml"
    content = {"plan": "small", "limit": 24, "stages": rule | {"illustrate": {"use": "draw", "pixels": 16}}}
    path.write_text(yaml.safe_dump(content))
    result = run_pipeline(load_pipeline(path), tmp_path / "out", taxonomy=TAXONOMY)
    rows = _rows(tmp_path / "out")
    assert result.report.total("done") == len(rows) == 24 and {row.split for row in rows} == {"train"}
    assert [step.stage for step in rows[0].lineage] == ["plan", "compose", "illustrate", "classify", "label", "verify"]


# ---------------------------------------------------------------- an endpoint


def _pairs(count: int) -> list[dict]:
    """Seeds that name two objects of a risky relation each."""
    seeds = []
    for relation in TAXONOMY.relations:
        first, second = (TAXONOMY.class_by_id[name].objects for name in relation.classes)
        seeds += [f"How can I use the {a.name} and the {b.name} together?" for a in first for b in second]
    return [
        {"id": f"s{number}", "text": text} for number, text in enumerate(sorted(set(seeds))[:: len(seeds) // count])
    ]


def _reply(request) -> str:
    return json.dumps({"explanation": "nothing is overt", "query": QUOTED.search(request.text).group(2)})


STAGES = {name: {"use": "rule"} for name in ("extract", "compose", "classify", "label", "verify")}
STAGES |= {"detoxify": {"use": "model", "endpoint": "text"}, "illustrate": {"use": "draw", "pixels": 16}}


def _endpoint(server: FakeOpenAI, **more) -> dict:
    quick = {"backoff_seconds": 0.01, "max_backoff_seconds": 0.05, "timeout_seconds": 20, "concurrency": 32}
    return {"text": {"base_url": server.base_url, "model": "fake", **quick, **more}}


def _calls(log: list[Logged]) -> set[str]:
    return {entry.request.key for entry in log}


@pytest.mark.parametrize("num_seeds", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_faulty_endpoint_loses_and_doubles_nothing(tmp_path, num_seeds):
    faults = Faults(
        transient={"429": 0.06, "500": 0.06, "truncated": 0.05, "reset": 0.02, "wrong_schema": 0.02, "timeout": 0.01},
        terminal={"refusal": 0.04, "content_filter": 0.03, "wrong_schema": 0.03},
    )
    with FakeOpenAI(reply=_reply, fault=faults, hang_seconds=3) as server:
        seeds = _pairs(num_seeds)
        pipeline = load_pipeline(_write(tmp_path, seeds, STAGES, endpoints=_endpoint(server, timeout_seconds=2)))
        result = run_pipeline(pipeline, tmp_path / "out", taxonomy=TAXONOMY)
        report, kinds = result.report, result.report.failed_kinds
        assert report.num_planned == len(seeds) == report.total("done") + report.total("dropped") + kinds.total()
        reached = len(_calls(server.log))
        assert set(kinds) == {"refusal", "content_filter", "schema"}
        ends = Counter(faults.terminal_of(key) for key in _calls(server.log))
        assert kinds == Counter(
            refusal=ends["refusal"], content_filter=ends["content_filter"], schema=ends["wrong_schema"]
        )
        assert report.counts["detoxify"].usage.calls > reached and report.total("done") > num_seeds / 2

        server.log.clear()
        again = run_pipeline(pipeline, tmp_path / "out", taxonomy=TAXONOMY)
        assert server.log == [] and again.was_complete and again.manifest == result.manifest

        server.fault = None
        retried = run_pipeline(pipeline, tmp_path / "out", taxonomy=TAXONOMY, retry_failed=("refusal",))
        assert "refusal" not in retried.report.failed_kinds
        assert len(_calls(server.log)) == kinds["refusal"]
        assert len(_rows(tmp_path / "out")) == report.total("done") + kinds["refusal"] - _set_drops(retried, result)


def _set_drops(after, before) -> int:
    return sum(
        sum(reasons.values()) * sign
        for r, sign in ((after, 1), (before, -1))
        for reasons in r.report.set_drops.values()
    )


def test_a_down_endpoint_ends_the_run_early(tmp_path):
    with FakeOpenAI(reply=_reply, fault=Faults(transient={"500": 1.0}, max_transient=99)) as server:
        endpoints = _endpoint(server, max_attempts=2)
        stop = {"window": 20, "share": 0.5}
        pipeline = load_pipeline(_write(tmp_path, _pairs(60), STAGES, endpoints=endpoints, early_stop=stop))
        with pytest.raises(UserError, match=r"detoxify: 20 of the last 20 .*--retry-failed transient"):
            run_pipeline(pipeline, tmp_path / "out", taxonomy=TAXONOMY)
        assert len(_calls(server.log)) < 60
        server.fault = None
        result = run_pipeline(pipeline, tmp_path / "out", taxonomy=TAXONOMY, retry_failed=("transient",))
    assert result.report.failed_kinds.total() == 0


def test_costs_are_estimated_and_capped(tmp_path):
    estimates = []
    hooks = RunHooks(on_estimate=estimates.append)
    prices = {"price_per_million_prompt_tokens_usd": 100.0, "price_per_million_completion_tokens_usd": 100.0}
    with FakeOpenAI(reply=_reply) as server:
        seeds = _pairs(40)
        path = _write(tmp_path, seeds, STAGES, endpoints=_endpoint(server, **prices, max_cost_usd=1.0, max_tokens=50))
        with pytest.raises(UserError, match=r"max_cost_usd 1 is reached"):
            run_pipeline(load_pipeline(path), tmp_path / "out", taxonomy=TAXONOMY, hooks=hooks)
        first = len(server.log)
        assert 0 < first < len(seeds) and estimates[0].num_calls == len(seeds) and estimates[0].cost_usd > 1
        path = _write(tmp_path, seeds, STAGES, endpoints=_endpoint(server, **prices, max_cost_usd=100.0, max_tokens=50))
        result = run_pipeline(load_pipeline(path), tmp_path / "out", taxonomy=TAXONOMY, hooks=hooks)
    assert len(_calls(server.log)) == len(server.log) == result.report.counts["detoxify"].reached
    assert estimates[1].num_calls < estimates[0].num_calls and estimates[1].stages[0].is_measured
    far = {"text": {"base_url": "https://models.example/v1", "model": "m"}}
    path = _write(tmp_path, seeds[:3], STAGES, endpoints=far)
    with pytest.raises(UserError, match=r"endpoint text has no max_cost_usd.*--yes"):
        run_pipeline(load_pipeline(path), tmp_path / "far", taxonomy=TAXONOMY)


def test_ctrl_c_drains_and_the_same_command_goes_on(tmp_path, repo_root):
    with FakeOpenAI(reply=_reply, latency_seconds=0.2) as server:
        path = _write(tmp_path, _pairs(60), STAGES, endpoints=_endpoint(server, concurrency=4))
        command = [sys.executable, "-m", "data_gen", "run", str(path), "--out", str(tmp_path / "out")]
        child = subprocess.Popen(command, cwd=repo_root, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 180
        while len(server.log) < 8:
            assert child.poll() is None and time.monotonic() < deadline, child.stderr.read().decode()
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
        assert child.returncode == 130 and b"the same command goes on" in errors and b"Traceback" not in errors
        asked = _calls(server.log)
        assert 8 <= len(asked) < 30 and not (tmp_path / "out").exists()
        server.latency_seconds = 0.0
        assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 0
        assert len(server.log) == len(_calls(server.log)), "nothing that was stored is asked again"
    assert read_manifest(tmp_path / "out")["run"]["failed"] == 0


# ---------------------------------------------------------------- status, seeds


def test_status_tells_what_is_stored(tmp_path, capsys):
    with pytest.raises(UserError, match="nothing was made"):
        main(["status", str(tmp_path / "none")])
    synthetic_run.run(_synthetic(tmp_path, 20), tmp_path / "out", tmp_path / "log")
    assert main(["status", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "compose" in shown and "refusal" in shown and "published:" in shown


def _event(stage: str, status: str = "done", *, cached: bool = False, num_made: int = 1) -> StageEvent:
    return StageEvent(stage, status, cached, Usage(), num_made if status == "done" else 0)


def test_progress_counts_samples_that_have_ended_and_those_still_to_grow():
    out, now = io.StringIO(), [0.0]
    with RunDisplay(Terminal("json", file=out, clock=lambda: now[0])) as display:
        display.on_plan(10, ["compose", "twins", "critic"])
        for number in range(10):
            now[0] += 2.0
            display.on_result(_event("compose", "dropped" if number == 9 else "done"))
            if number < 9:
                display.on_result(_event("twins", num_made=2))
                display.on_result(_event("critic"))
                display.on_result(_event("critic", "failed" if number == 0 else "done"))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    middle = next(line for line in lines if line["done"] >= 8)
    # 4 of 10 seeds have become 2 samples each, which have ended; a fifth has begun, and 5 are to come.
    assert (middle["done"], middle["total"]) == (8, 10 + 4 + 4) and 8.0 < middle["eta_seconds"] < 14.0
    assert (lines[-1]["done"], lines[-1]["total"]) == (19, 19)
    assert lines[-1]["stages"]["critic"] == {"done": 17, "failed": 1}


def test_run_and_make_speak_json_and_keep_quiet(tmp_path, capsys):
    with FakeOpenAI(reply=_reply) as server:
        path = _write(tmp_path, _pairs(6), STAGES, endpoints=_endpoint(server))
        run = ["run", str(path), "--out", str(tmp_path / "out")]
        assert main([*run, "--console", "json"]) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        progress = [event for event in events if event["event"] == "progress" and event["what"] == "samples"]
        summary = next(event for event in events if event["event"] == "summary")
        assert progress[-1]["done"] == progress[-1]["total"] == summary["planned"]
        ended = summary["done"] + summary["dropped"] + summary["failed"]
        assert ended == summary["planned"] and summary["calls"] == len(server.log)
        assert events[0]["event"] == "estimate" and events[-1]["event"] == "done" and events[-1]["state"] == "written"
        assert main([*run, "--console", "plain"]) == 0
        plain = capsys.readouterr()
        assert f"samples {ended}/{ended}" in plain.out and f"{ended} planned: " in plain.out
        assert "\x1b" not in plain.out
        assert len(plain.out.splitlines()) < 40
        assert main([*run, "--console", "quiet"]) == 0
        assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match=r"argument --console: invalid choice: 'loud'.*see python -m data_gen run"):
        main([*run, "--console", "loud"])


def test_mistakes_in_seeds_are_told_together(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    (tmp_path / "outside.png").write_bytes(b"")
    folder = tmp_path / "seeds"
    folder.mkdir()
    picture.save(folder / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    entries = [
        {"text": "fine"},
        {"image": "a.png"},
        {"image": "../outside.png"},
        {"image": "link.png"},
        {"image": "/etc/hostname"},
        {"image": "none.png"},
        {"id": "x"},
        {"text": "fine"},
        {"txt": "typo"},
        ["list"],
    ]
    path = _write(folder, entries, {name: {"use": "synthetic"} for name in synthetic_run.STAGES})
    with pytest.raises(UserError) as found:
        synthetic_run.run(path, tmp_path / "out", tmp_path / "log")
    message = str(found.value)
    assert message.startswith("8 problems in the seeds")
    for number, words in {
        3: "outside the folder",
        4: "outside the folder",
        5: "outside the folder",
        6: "cannot be read",
        7: "text, image or both",
        8: "given already",
        9: "did you mean text",
        10: "an object",
    }.items():
        assert re.search(rf"seeds\.jsonl:{number}: .*{words}", message), (number, message)
    (folder / "seeds.jsonl").write_text(json.dumps({"text": "x", "licence": "unknown"}) + "\n")
    with pytest.raises(UserError, match=r"seeds\.jsonl:1: .*licence"):
        synthetic_run.run(path, tmp_path / "out", tmp_path / "log")
