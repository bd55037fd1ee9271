"""The real command on two processes: a step's parts add up, checkpoints are timed, a profile changes nothing."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from mirage.config.schema import EvalConfig
from mirage.tracking.dashboard import dashboard_tasks
from mirage.tracking.dashboard_cli import definition_json
from mirage.tracking.names import describe_metric
from tests.integration.test_train_resume import command, losses, run, weights
from tests.support.dashboards import asked_names


def test_parts_checkpoints_and_profile_of_a_run(tmp_path, repo_root, shapes):
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    arguments = command("tiny_internvl_mis", run_dir, shapes)
    output = run([*arguments, "train.profile=true"], repo_root, cache)
    assert "GFLOP/s in fp32 a process, measured" in output and "mfu" in output
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["axis"] == "train"]
    for line in steps:
        parts = {name: line[f"train/{name}_seconds"] for name in ("data", "forward", "backward", "optimizer", "other")}
        assert min(parts.values()) >= 0 and sum(parts.values()) == pytest.approx(line["train/step_seconds"], rel=1e-9)
        assert min(parts[name] for name in ("forward", "backward", "optimizer")) > 0
        assert parts["other"] < 0.2 * line["train/step_seconds"] + 0.05
        assert 0 < line["train/mfu"] == pytest.approx(line["train/hfu"])
        assert 1 <= line["train/imbalance_planned"] < 2 and 1 <= line["train/imbalance_measured"] < 2
        assert 0 < line["train/pack_fill"] <= 1 and 0 <= line["train/attention_padding_share"] < 1
    # Checkpoints follow steps 2 and 4: the next step tells what copying took, and a later one what finishing took.
    told = [line["step"] for line in steps if "train/checkpoint_seconds" in line]
    assert {3, 5} <= set(told) and min(told) == 3

    # What the dashboard's panels of training, data and speed name is what a run logs, and all of it is described.
    logged = {name for line in steps for name in line} | set(json.loads((run_dir / "summary.json").read_text()))
    text = definition_json(entity="e", project="p", tasks=dashboard_tasks(["general"]), config=EvalConfig())
    names, patterns = asked_names(json.loads(text)["workspace"])
    asked = {name for name in names if name.startswith(("train/", "data/"))} - {"train/step"}
    assert len(asked) > 20 and asked <= logged, sorted(asked - logged)
    assert all(any(re.search(pattern, name) for name in logged) for pattern in patterns if "train" in pattern)
    assert [name for name in logged if name.startswith("train/") and describe_metric(name) is None] == []

    (trace,) = (run_dir / "profile").glob("*.json.gz")
    assert trace.name == "steps-000004-000006-rank0.trace.json.gz" and str(trace) in output
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("mirage/optimizer") == 3 and "mirage/forward" in names and "aten::mm" in names


@pytest.mark.slow
def test_a_profile_changes_no_loss(tmp_path, repo_root, shapes):
    found = {}
    for asked in ("true", "false"):
        run_dir = tmp_path / asked
        arguments = command("tiny_internvl_mis", run_dir, shapes, f"train.profile={asked}")
        run(arguments, repo_root, tmp_path / "cache")
        assert (run_dir / "profile").exists() == (asked == "true")
        found[asked] = losses(run_dir), weights(run_dir / "checkpoint-000006")
    assert found["true"] == found["false"]
