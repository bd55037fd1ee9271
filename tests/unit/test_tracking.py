"""Tracking: what reaches wandb (read back from its own files), what the mirror holds, and what survives a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from mirage.config.schema import ModelConfig, Recipe, TrackingConfig
from mirage.errors import UserError
from mirage.tracking import wandb_run
from mirage.tracking.callback import TrackingCallback
from mirage.tracking.mirror import MetricsFile, read_metrics
from mirage.tracking.redact import HIDDEN, redact
from mirage.tracking.run import Tracker
from mirage.tracking.wandb_file import read_records

PLANTED = "plantedSecretValue0123456789abcdefghijklmn"
OFF = TrackingConfig(wandb="off")


def open_tracker(run_dir: Path, config: TrackingConfig = OFF, *, is_main: bool = True, **recipe: Any) -> Tracker:
    return Tracker.open(run_dir, config, name="test", recipe=recipe or {"name": "test"}, is_main=is_main)


def sample_row(index: int, pictures: list[Path], **changes: Any) -> dict[str, Any]:
    row = {
        "id": f"row{index}",
        "task": "mis_hard",
        "image_paths": pictures,
        "question": "What do they have in common?",
        "answer": "The first image shows a candle.",
        "verdict": "RSR",
        "reason": "names both objects and the risk",
        "category": "Self-Harm",
        "changed": "HR -> RSR",
    }
    return row | changes


def wandb_records(run_dir: Path) -> list[dict[str, Any]]:
    """All records of all .wandb files of a run folder, oldest file first, through wandb's own reader."""
    records = []
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", folder]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        records += [json.loads(line) for line in out.splitlines()]
    return records


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def _wait_until_written(run_dir: Path) -> None:
    """wandb's own process, which outlives a run here, still writes for a moment after the run is closed."""
    (file,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while "exit" not in {record.WhichOneof("record_type") for record in read_records(file)}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes' worth: three steps, an evaluation with a table, closed; then continued after step 2."""
    run_dir = tmp_path_factory.mktemp("runs") / "offline"
    pictures = []
    for index in range(2):
        pictures.append(run_dir.parent / f"picture{index}.png")
        Image.new("RGB", (900, 300), (index * 200, 40, 40)).save(pictures[-1])
    rows = [sample_row(0, pictures), sample_row(1, pictures[:1]), sample_row(2, [run_dir / "missing.png", pictures[0]])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_SERVICE_TOKEN", PLANTED)
        patch.setattr(sys, "argv", ["train.py", f"model.path=https://user:{PLANTED}@host/x"])
        config = TrackingConfig(wandb="auto", tags=("unit",))
        tracker = open_tracker(run_dir, config, name="test", model={"path": f"x-{PLANTED}", "api_key": "abc"})
        for step in (1, 2, 3):
            tracker.log({"train/loss": 1.0 / step, "lr": 0.1}, axis="train", step=step)
        tracker.log({"eval/mis_hard/asr": 0.25}, axis="eval", step=2)
        tracker.log_samples("mis_hard", rows, step=2)
        tracker.close()
        _wait_until_written(run_dir)

        tracker = open_tracker(run_dir, config)
        tracker.rewind(2)
        tracker.log({"train/loss": 0.3333, "train/lr": 0.1}, axis="train", step=3)
        tracker.log({"train/loss": math.nan}, axis="train", step=4)
        tracker.summary({"last/train/loss": math.nan, "steps": 4})
        tracker.close()
    return run_dir


def test_wandb_gets_metrics_on_their_own_axes(offline_run: Path) -> None:
    records = wandb_records(offline_run)
    sent = [(item["train/step"], item["train/loss"]) for item in history(records) if "train/step" in item]
    assert [step for step, _ in sent] == [1, 2, 3, 3, 4]
    assert sent[1][1] == 0.5
    assert [item["eval/step"] for item in history(records) if "eval/mis_hard/asr" in item] == [2]
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    axes = {metric.get("glob_name"): metric.get("step_metric") for metric in metrics if "glob_name" in metric}
    assert axes == {"train/*": "train/step", "eval/*": "eval/step", "samples/*": "eval/step"}


def test_restart_continues_the_same_wandb_run(offline_run: Path) -> None:
    records = wandb_records(offline_run)
    runs = [record["run"] for record in records if record["type"] == "run"]
    identity = (offline_run / "wandb_id").read_text().strip()
    assert [run["run_id"] for run in runs] == [identity, identity]
    assert all(run["resume"] for run in runs)
    orders = [item["_step"] for item in history(records)]
    assert orders == sorted(set(orders)), "wandb drops a record whose internal step does not grow"


def test_table_holds_pictures_side_by_side_and_the_verdict(offline_run: Path) -> None:
    item = next(
        item for item in history(wandb_records(offline_run)) if "eval/step" in item and "samples/mis_hard._type" in item
    )
    assert item["samples/mis_hard._type"] == "table-file"
    staged = (offline_run / "wandb" / "artifacts" / "staging").iterdir()
    table = json.loads(
        next(text for text in (path.read_bytes() for path in staged) if text.startswith(b'{"_type": "table"'))
    )
    columns = table["columns"]
    assert columns == [
        "id", "task", "picture_1", "picture_2", "question", "answer", "verdict", "reason", "category", "changed",
    ]  # fmt: skip
    first, second, third = (dict(zip(columns, line)) for line in table["data"])
    assert first["picture_1"]["width"] == TrackingConfig().picture_pixels and first["picture_2"]["height"] == 128
    assert first["verdict"] == "RSR" and first["changed"] == "HR -> RSR"
    assert second["picture_2"] is None
    assert third["picture_1"] is None and third["picture_2"]["_type"] == "image-file", (
        "an unreadable picture is left empty"
    )


def test_pictures_of_tables_stay_in_the_run_folder(offline_run: Path) -> None:
    assert list((offline_run / "wandb" / "artifacts" / "staging").iterdir())
    assert "WANDB_DATA_DIR" not in os.environ


def test_no_secret_reaches_any_file(offline_run: Path) -> None:
    files = [path for path in offline_run.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 8
    leaks = [path for path in files if PLANTED.encode() in path.read_bytes()]
    assert leaks == []
    assert any(HIDDEN.encode() in path.read_bytes() for path in files)


def test_mirror_holds_each_step_once(offline_run: Path) -> None:
    records = read_metrics(offline_run / "metrics.jsonl")
    train = [(record["step"], record["train/loss"]) for record in records if record["axis"] == "train"]
    assert [step for step, _ in train] == [1, 2, 3, 4]
    assert train[2][1] == 0.3333 and math.isnan(train[3][1])
    assert records[0]["train/lr"] == 0.1, "a name without its axis gets it"
    assert [record["step"] for record in records if record["axis"] == "eval"] == [2]
    rewound = read_metrics(offline_run / "metrics.rewound.jsonl")
    assert [(record["axis"], record["step"]) for record in rewound] == [("train", 3)]


def test_mirror_holds_sample_rows_without_pictures(offline_run: Path) -> None:
    pointer = next(record for record in read_metrics(offline_run / "metrics.jsonl") if record["axis"] == "samples")
    rows = [json.loads(line) for line in (offline_run / pointer["samples/mis_hard"]).read_text().splitlines()]
    assert [row["id"] for row in rows] == ["row0", "row1", "row2"]
    assert "image_paths" not in rows[0] and rows[0]["reason"] == "names both objects and the risk"


def test_every_line_is_strict_json(offline_run: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for name in ("metrics.jsonl", "summary.json"):
        text = (offline_run / name).read_text()
        for line in text.splitlines() if name.endswith("jsonl") else [text]:
            json.loads(line, parse_constant=refuse)
    assert json.loads((offline_run / "summary.json").read_text()) == {"last/train/loss": "nan", "steps": 4}


@pytest.mark.parametrize("value, text", [(math.inf, "inf"), (-math.inf, "-inf")])
def test_infinite_values_round_trip(tmp_path: Path, value: float, text: str) -> None:
    mirror = MetricsFile(tmp_path)
    mirror.append("train", 1, {"train/loss": value})
    mirror.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == text
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == value


def test_torn_last_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"axis": "train", "step": 1, "train/loss": 2.0}\n'
    path.write_bytes(whole + b'{"axis": "train", "st')
    mirror = MetricsFile(tmp_path)
    mirror.append("train", 2, {"train/loss": 1.0})
    mirror.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"axis": "train", "step": 1, "train/loss": 2.0}')
    MetricsFile(tmp_path).close()
    assert path.read_bytes().endswith(b"2.0}\n")


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"axis": "train", "step": 1}\nrubbish\n{"axis": "train", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: "):
        MetricsFile(tmp_path)


def test_step_logged_again_replaces_its_line(tmp_path: Path) -> None:
    mirror = MetricsFile(tmp_path)
    mirror.append("eval", 10, {"eval/a": 1.0})
    mirror.append("eval", 10, {"eval/b": 1.0})
    mirror.append("eval", 10, {"eval/a": 3.0})
    mirror.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert sorted((set(record) - {"axis", "step"}).pop() for record in records) == ["eval/a", "eval/b"]
    assert next(record["eval/a"] for record in records if "eval/a" in record) == 3.0
    assert MetricsFile(tmp_path).num_records == 3, "the count of lines ever written never shrinks"


def test_kill_loses_no_flushed_line(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mirage.tracking.mirror import MetricsFile\n"
        "mirror = MetricsFile(Path(sys.argv[1]))\n"
        "for step in range(1, 8): mirror.append('train', step, {'train/loss': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path])
    assert done.returncode == -signal.SIGKILL
    mirror = MetricsFile(tmp_path)
    mirror.rewind(5)
    for step in (6, 7):
        mirror.append("train", step, {"train/loss": step})
    mirror.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_kill_costs_wandb_no_more_than_its_last_second(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from mirage.config.schema import TrackingConfig\n"
        "from mirage.tracking.run import Tracker\n"
        "tracker = Tracker.open(\n"
        "    Path(sys.argv[1]), TrackingConfig(wandb='offline'), name='x', recipe={}, is_main=True\n"
        ")\n"
        "for step in (1, 2, 3): tracker.log({'loss': 1.0}, axis='train', step=step)\n"
        f"time.sleep({wandb_run.FLUSH_SECONDS + 0.8})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path])
    assert [item["train/step"] for item in history(wandb_records(tmp_path))] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path / "run", is_main=False)
    tracker.rewind(0)
    tracker.log({"loss": 1.0}, axis="train", step=1)
    tracker.log_samples("x", [{}], step=1)
    tracker.summary({"a": 1})
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_table_rows_limits_the_table(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, TrackingConfig(wandb="off", table_rows=2))
    tracker.log_samples("t", [sample_row(index, []) for index in range(5)], step=7)
    tracker.close()
    assert len((tmp_path / "tables" / "step-000007" / "t.jsonl").read_text().splitlines()) == 2


def test_tables_bear_the_names_of_tasks_and_variants(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, TrackingConfig(wandb="off"))
    tracker.log_samples("tsv:A.b-c@white1+cot3", [sample_row(0, [])], step=7)
    tracker.close()
    assert (tmp_path / "tables" / "step-000007" / "tsv:A.b-c@white1+cot3.jsonl").is_file()


def test_bad_table_calls_are_refused(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    with pytest.raises(ValueError, match="plain file name"):
        tracker.log_samples("../x", [], step=0)
    row = sample_row(0, [])
    del row["verdict"]
    with pytest.raises(ValueError, match="lacks 'verdict'"):
        tracker.log_samples("x", [row], step=0)
    tracker.close()


class BrokenRun:
    """A wandb run of which every call fails."""

    id, url, summary = "x", "x", SimpleNamespace(update=lambda values: 1 / 0)

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError(f"no route to host, key {PLANTED}")

    def finish(self, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")


def test_failing_wandb_never_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTHER_API_KEY", PLANTED)
    monkeypatch.setattr(wandb_run, "_init", lambda *args, **kwargs: BrokenRun())
    tracker = open_tracker(tmp_path, TrackingConfig(wandb="offline"))
    for step in range(1, 31):
        tracker.log({"loss": 1.0}, axis="train", step=step)
    tracker.summary({"a": 1.0})
    tracker.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and PLANTED not in "".join(said)
    assert "wandb failed (log: no route to host" in said[0]
    assert "32 of 32 calls to wandb failed" in said[1]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 30


def test_wandb_that_does_not_start_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken_init(*args: Any, mode: str, **kwargs: Any) -> None:
        raise RuntimeError(f"cannot start {mode}")

    monkeypatch.setattr(wandb_run, "_init", broken_init)
    monkeypatch.setattr(wandb_run, "has_key", lambda: True)
    tracker = open_tracker(tmp_path, TrackingConfig(wandb="auto"))
    tracker.log({"loss": 1.0}, axis="train", step=1)
    tracker.close()
    said = capsys.readouterr().err
    assert "did not start online: cannot start online" in said and "did not start offline: cannot start offline" in said
    assert "goes on without wandb" in said
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_mode_follows_key_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "has_key", lambda: True)
    assert [wandb_run.choose_mode(wanted) for wanted in ("auto", "online", "offline", "off")] == [
        "online", "online", "offline", "off",
    ]  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_run.choose_mode("auto") == "off"
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE='ofline'"):
        wandb_run.choose_mode("auto")


def test_online_without_a_key_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandb login"):
        open_tracker(tmp_path, TrackingConfig(wandb="online"))


def test_key_is_found_in_environment_and_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wandb_run.has_key()
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "a" * 40)
        assert wandb_run.has_key()
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {'b' * 40}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_run.has_key()


def test_run_id_is_made_once_and_checked(tmp_path: Path) -> None:
    first = wandb_run.run_id(tmp_path)
    assert wandb_run.run_id(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["wandb_id"]
    (tmp_path / "wandb_id").write_text("not an id\n")
    with pytest.raises(UserError, match="wandb_id: expected a wandb run id"):
        open_tracker(tmp_path, TrackingConfig(wandb="offline"))


def test_redact_hides_by_name_shape_and_environment() -> None:
    environ = {"HF_TOKEN": "hf-secret-value", "PATH": "/usr/bin", "DEBUG_KEY": "1"}
    value = {
        "api_key": "short",
        "url": "https://me:pw@host/x",
        "list": ["say hf-secret-value", "hf_" + "a" * 30],
        "train": {"lr": 0.1, "pack_tokens": 8192, "path": "/usr/bin1"},
    }
    assert redact(value, environ=environ) == {
        "api_key": HIDDEN,
        "url": f"https://{HIDDEN}@host/x",
        "list": [f"say {HIDDEN}", HIDDEN],
        "train": {"lr": 0.1, "pack_tokens": 8192, "path": "/usr/bin1"},
    }


def main_trainer(run_dir: Path, **more: Any) -> Any:
    """What the callback reads of a trainer."""
    rank = {"is_main": True, "device": torch.device("cpu"), "world_size": 2}
    return SimpleNamespace(**{"step": 0, "run_dir": run_dir, "kernels": {}} | rank | more)


def test_callback_logs_steps_and_closes(tmp_path: Path) -> None:
    callback = TrackingCallback(open_tracker(tmp_path))
    trainer = main_trainer(tmp_path, kernels={"attention": "eager (asked for)"})
    callback.on_start(trainer)
    for trainer.step in (1, 2):
        callback.on_step(trainer, {"train/loss": 2.0 / trainer.step})
    callback.on_step(trainer, {})
    callback.on_end(trainer)
    callback.on_close(trainer, None)
    assert [record["train/loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2.0, 1.0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.pop("versions/torch") == torch.__version__
    assert summary.pop("hardware/devices").startswith("2 CPU processes (")
    assert {key: value for key, value in summary.items() if not key.startswith(("versions/", "hardware/"))} == {
        "kernels/attention": "eager (asked for)",
        "last/train/loss": 1.0,
        "steps": 2,
    }


def test_callback_rewinds_to_the_resumed_step(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    for step in (1, 2, 3):
        tracker.log({"loss": 1.0}, axis="train", step=step)
    tracker.close()
    callback = TrackingCallback(open_tracker(tmp_path))
    trainer = main_trainer(tmp_path, step=2)
    callback.on_start(trainer)
    callback.on_close(trainer, RuntimeError("x"))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_callback_opens_the_tracker_for_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(name="x", run_dir=tmp_path, model=ModelConfig(family="internvl"), tracking=OFF)
    trainer = main_trainer(tmp_path, recipe=recipe, tracker=None)
    callback = TrackingCallback()
    callback.on_close(trainer, RuntimeError("before the start"))
    callback.on_start(trainer)
    trainer.tracker.log({"asr": 1.0}, axis="eval", step=0)
    callback.on_close(trainer, None)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["eval/asr"] == 1.0
    assert capsys.readouterr().out == f"metrics: {tmp_path / 'metrics.jsonl'}\n"
