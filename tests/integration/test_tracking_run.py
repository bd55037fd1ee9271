"""An offline run, killed and continued, read with wandb's own reader: all that docs/dashboard.md promises."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from PIL import Image

from mirage.config.schema import SelectConfig
from mirage.evals.results import read_results
from mirage.evals.schedule import results_dir
from mirage.evals.tracked import category_metrics, change_metrics, select_metrics
from mirage.tracking.mirror import read_metrics
from mirage.tracking.wandb_file import read_records
from tests.support.tracked_run import EVALUATIONS, EVERY, NUM_STEPS, step_metrics

# After an evaluation; at the worst moment: four steps and a checkpoint are done, and wandb's file has none of them; and
# between two checkpoints.
KILLS = ("eval-4", "checkpoint-8", "step-10", "")
STEPS = range(1, NUM_STEPS + 1)
TASKS = ("mis_hard", "twins", "general")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shapes: Path, repo_root: Path) -> Path:
    """A run of four processes, of which three were killed."""
    folder = tmp_path_factory.mktemp("tracked")
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "internvl"}')
    for kill_after in KILLS:
        command = [sys.executable, "-m", "tests.support.tracked_run", folder / "run", shapes, base, kill_after]
        done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=300)
        assert done.returncode == (-signal.SIGKILL if kill_after else 0), done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def files(run_dir: Path) -> list[list[dict[str, Any]]]:
    """The records of each of the run's files, the oldest first, as `wandb leet inspect` reads them."""
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    empty = list((run_dir / "wandb").glob("empty-offline-run-*"))
    assert len(folders) + len(empty) == len(KILLS), "one for each process; `wandb sync` takes them together"
    # One that a kill left without its first block would make `wandb sync` refuse all of them, and is set aside.
    assert all(path.stat().st_size == 7 for folder in empty for path in folder.glob("*.wandb"))
    found = []
    for folder in folders:
        command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", folder]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append([json.loads(text) for text in out.splitlines()])
    return found


@pytest.fixture(scope="module")
def records(files: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [record for one in files for record in one]


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def curve(records: list[dict[str, Any]], axis: str) -> dict[int, dict[str, Any]]:
    """The numbers at each step of an axis, as a chart shows them: what was sent again lies on the first."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows(records):
        if f"{axis}/step" in row and not any(name.endswith("._type") for name in row):
            numbers = {name: value for name, value in row.items() if not name.startswith("_")}
            step = int(numbers.pop(f"{axis}/step"))
            known = found.setdefault(step, {})
            assert all(known.get(name, value) == value for name, value in numbers.items()), f"{axis} {step}"
            known.update(numbers)
    return found


def test_every_training_number_is_at_its_step(records: list[dict[str, Any]], run_dir: Path) -> None:
    found = curve(records, "train")
    assert sorted(found) == list(STEPS)
    for step in STEPS:
        assert found[step] == pytest.approx(step_metrics(step))
    mirrored = [record["step"] for record in read_metrics(run_dir / "metrics.jsonl") if record["axis"] == "train"]
    assert mirrored == list(STEPS)


def test_every_number_of_an_evaluation_is_at_its_step(records: list[dict[str, Any]], run_dir: Path) -> None:
    found = curve(records, "eval")
    assert sorted(found) == sorted(EVALUATIONS)
    first = read_results(results_dir(run_dir, 0))
    for step in EVALUATIONS:
        results = read_results(results_dir(run_dir, step))
        wanted = results.metrics() | category_metrics(results) | change_metrics(results)
        selected = select_metrics(results, first if step else results, SelectConfig())
        wanted |= {f"eval/select/{name}": value for name, value in selected.items()}
        assert found[step] == pytest.approx(wanted | {"eval/alarms": found[step]["eval/alarms"]})
        assert {"eval/mis_hard/asr", "eval/mis_hard/category/category_0/asr", "eval/select/score"} <= set(found[step])
        assert ("eval/mis_hard/asr_change" in found[step]) == (step > 0)
    assert found[0]["eval/mis_hard/asr"] == pytest.approx(90.0)


def test_wandb_drops_no_row(records: list[dict[str, Any]]) -> None:
    orders = [row["_step"] for row in rows(records)]
    assert orders == sorted(set(orders)), "a row whose internal step does not grow is dropped at `wandb sync`"


def test_every_table_is_there_with_its_pictures(records: list[dict[str, Any]]) -> None:
    logged = Counter(
        (name.removesuffix("._type"), row["eval/step"])
        for row in rows(records)
        for name, value in row.items()
        if name.endswith("._type") and value == "table-file"
    )
    assert set(logged) == {(f"samples/{task}", step) for task in TASKS for step in EVALUATIONS}
    tables = [artifact for artifact in artifacts(records) if artifact["type"] == "run_table"]
    # A kill may fall between a table's files and the row that names them; the table is then sent again.
    assert len(tables) >= sum(logged.values())
    for artifact in tables:
        content = contents(artifact)
        table = json.loads(next(path for name, path in content.items() if name.endswith(".table.json")).read_text())
        assert table["columns"] == [
            "id", "task", "picture_1", "picture_2", "question", "answer", "answer_parts", "verdict", "reason",
            "category", "changed",
        ]  # fmt: skip
        assert len(table["data"]) == 6
        for line in (dict(zip(table["columns"], cells)) for cells in table["data"]):
            for name in ("picture_1", "picture_2"):
                with Image.open(content[line[name]["path"]]) as picture:
                    assert max(picture.size) <= 32
            html = content[line["answer_parts"]["path"]].read_text()
            assert "&lt;b&gt;harm&lt;/b&gt;" in html and "square &amp; more" in html and "<b>harm" not in html
            assert [html.count(f'title="{part}"') for part in ("perceive", "relate", "risk", "reply")] == [1, 1, 1, 1]
            assert "http" not in html, "it shows without a network"


def test_a_table_says_what_it_leaves_out(records: list[dict[str, Any]]) -> None:
    row = next(row for row in rows(records) if "samples/twins_rows" in row)
    counts = [row[f"samples/twins_{name}"] for name in ("rows", "rows_in_all", "pictures_left_out")]
    assert counts == [6, 40, 0]


def artifacts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["artifact"] for record in records if record["type"] == "artifact"]


def contents(artifact: Mapping[str, Any]) -> dict[str, Path]:
    """Where the files of an artifact lie until `wandb sync`; a reference is no file of it."""
    entries = artifact["manifest"]["contents"]
    return {entry["path"]: Path(entry["local_path"]) for entry in entries if entry.get("local_path")}


def test_artifacts_tell_the_lineage(records: list[dict[str, Any]], run_dir: Path, shapes: Path) -> None:
    identity = (run_dir / "wandb_id").read_text().strip()
    made = {(item["name"], alias): item for item in artifacts(records) for alias in item.get("aliases", [])}
    for step in (step for step in STEPS if step % EVERY == 0):
        checkpoint = contents(made[f"checkpoint-{identity}", f"step-{step:06d}"])
        assert checkpoint["model/weights.bin"].read_text() == f"weights of step {step}"
        card = json.loads(checkpoint["card.json"].read_text())
        assert card["step"] == step and "model/weights.bin" in card["files"] and card["left_out"] == []
    for step in EVALUATIONS:
        results = contents(made[f"results-{identity}", f"step-{step:06d}"])
        assert {"card.json", "results.json", "samples.jsonl"} <= set(results)
        assert results["samples.jsonl"].read_bytes() == (results_dir(run_dir, step) / "samples.jsonl").read_bytes()
    used = {item["name"]: item for item in artifacts(records) if item.get("use_after_commit")}
    assert set(used) == {f"dataset-{shapes.name}", "base-internvl-tiny"}
    card = json.loads(contents(used[f"dataset-{shapes.name}"])["card.json"].read_text())
    assert card["files"]["rows.jsonl"]["num_bytes"] == (shapes / "rows.jsonl").stat().st_size
    entries = used[f"dataset-{shapes.name}"]["manifest"]["contents"]
    places = {entry["path"]: Path(unquote(urlparse(entry["ref"]).path)) for entry in entries if entry.get("ref")}
    assert places["rows.jsonl"] == shapes / "rows.jsonl"


def test_nothing_is_sent_twice_that_was_not_lost(files: list[list[dict[str, Any]]]) -> None:
    """But for the steps that a rewind repeats: the third process was killed at step 10, the fourth begins after 8."""
    held: set[int] = set()
    for one in files[:-1]:
        assert held & set(curve(one, "train")) == set()
        held |= set(curve(one, "train"))
    versions = Counter(
        (item["name"], item["digest"]) for one in files for item in artifacts(one) if item["type"] != "run_table"
    )
    assert max(versions.values()) == 1


def test_summary_and_configuration_stand_for_the_run(files: list[list[dict[str, Any]]], run_dir: Path) -> None:
    summary: dict[str, Any] = {}
    for record in files[-1]:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    results, first = read_results(results_dir(run_dir, 12)), read_results(results_dir(run_dir, 0))
    selected = select_metrics(results, first, SelectConfig())
    for name in ("asr", "over_refusal", "general", "score"):
        assert summary[f"select/{name}"] == pytest.approx(selected[name])
    assert summary["select/base_asr"] == pytest.approx(90.0) and summary["steps"] == NUM_STEPS
    assert summary["last/train/loss"] == pytest.approx(step_metrics(12)["train/loss"])
    assert summary["kernels/attention"] == "eager (asked for)"
    for one in files:
        config = next(record["run"]["config"]["update"] for record in one if record["type"] == "run")
        assert config["name"] == "tiny_internvl_mis" and config["tracking"]["table_rows"] == 6
        assert set(config["code"]) == {"version", "commit", "dirty"}


def test_wandb_is_told_what_stands_for_the_run(records: list[dict[str, Any]]) -> None:
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    axes = {metric["glob_name"]: metric.get("step_metric") for metric in metrics if "glob_name" in metric}
    assert axes == {"train/*": "train/step", "eval/*": "eval/step", "samples/*": "eval/step"}
    best = {metric["name"]: set(metric["summary"]) for metric in metrics if "summary" in metric}
    assert best["train/loss"] == {"min", "last"}
    assert best["eval/mis_hard/asr"] == {"min", "last"} and best["eval/general/accuracy"] == {"max", "last"}
    assert "train/lr" not in best


def test_alerts_are_said_once(records: list[dict[str, Any]], run_dir: Path) -> None:
    kept = [json.loads(text) for text in (run_dir / "alerts.jsonl").read_text().splitlines()]
    assert [alert["key"] for alert in kept] == ["stalled data", "rise: mis_hard:asr: step 4 to 8"]
    sent = Counter(record["alert"]["title"] for record in records if record["type"] == "alert")
    assert sent == {"Training waits for data": 1, "mis_hard:asr rose to 65.0% at step 8": 1}


def test_only_the_last_process_ended(files: list[list[dict[str, Any]]]) -> None:
    assert [any(record["type"] == "exit" for record in one) for one in files] == [False] * (len(files) - 1) + [True]


def test_our_reader_sees_what_wandbs_reader_sees(files: list[list[dict[str, Any]]], run_dir: Path) -> None:
    """The reader that finds what a kill took; wandb's leaves out nothing but its own footer."""
    for one, path in zip(files, sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")), strict=True):
        own = Counter(record.WhichOneof("record_type") for record in read_records(path))
        theirs = Counter(record["type"] for record in one)
        assert own["history"] == theirs["history"] and own["artifact"] == theirs["artifact"]
        assert abs(sum(own.values()) - sum(theirs.values())) <= 1
