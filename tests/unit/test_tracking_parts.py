"""The pieces of tracking: alerts, artifacts, tables, answers cut into parts, and what wandb's files are read for."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mirage.config.schema import AlertsConfig, TrackingConfig
from mirage.evals.answer_parts import answer_parts
from mirage.tracking import wandb_run
from mirage.tracking.alerts import Alert, AlertsFile, StepAlerts, stop_alert
from mirage.tracking.artifacts import checkpoint_card, dataset_card, make_artifact, results_card
from mirage.tracking.code_version import code_version
from mirage.tracking.redact import HIDDEN
from mirage.tracking.run import SAMPLE_KEYS, Tracker
from mirage.tracking.sample_table import parts_html, sample_table
from mirage.tracking.wandb_file import Sent, read_records, read_sent
from mirage.training.checkpoint import publish

ALERT = Alert(key="a", step=3, level="WARN", title="Something", text="of note")


# Alerts


def test_a_loss_that_is_no_number_and_stalled_data_are_told() -> None:
    alerts = StepAlerts(AlertsConfig(data_wait_share=0.5, data_wait_steps=2))
    assert alerts.look({"train/loss": 1.0, "train/data_wait_share": 0.6}, step=1) == []
    assert alerts.look({"train/loss": 1.0, "train/data_wait_share": 0.1}, step=2) == []
    assert alerts.look({"train/data_wait_share": 0.6}, step=3) == []
    (stalled,) = alerts.look({"train/data_wait_share": 0.7}, step=4)
    assert stalled.key == "stalled data" and "now 70%" in stalled.text
    assert alerts.look({"train/data_wait_share": 0.7}, step=5) == []
    (found,) = alerts.look({"train/loss": float("nan"), "train/grad_norm": 1.0}, step=6)
    assert found.title == "Step 6: the loss is not a number" and found.level == "ERROR"
    quiet = StepAlerts(AlertsConfig(not_finite=False, data_wait_steps=0))
    assert quiet.look({"train/loss": float("inf"), "train/data_wait_share": 1.0}, step=1) == []


def test_the_error_that_stops_a_run_is_told_by_its_kind() -> None:
    nan = stop_alert(RuntimeError("the gradient norm of step 12 is nan; rank 0: row x"), step=11)
    assert (nan.key, nan.title) == ("not finite: step 12", "Step 12: the gradient norm is not a number")
    other = stop_alert(ValueError("disk full, see https://me:secretpw@host/x"), step=7)
    assert other.title == "Training stopped after step 7" and HIDDEN in other.text and "secretpw" not in other.text


def test_an_alert_is_kept_once_also_over_restarts_and_torn_lines(tmp_path: Path) -> None:
    assert AlertsFile(tmp_path).add(ALERT)
    with (tmp_path / "alerts.jsonl").open("a") as file:
        file.write('{"key": "b", "st')
    again = AlertsFile(tmp_path)
    assert again.alerts == [ALERT] and not again.add(ALERT)
    assert again.add(Alert(key="b", step=4, level="INFO", title="t", text="x"))
    assert [json.loads(line)["key"] for line in (tmp_path / "alerts.jsonl").read_text().splitlines()] == ["a", "b"]


# Artifacts


def test_a_dataset_card_names_its_files_and_sends_no_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"content_sha256": "abc", "counts": {"train": 3}, "settings": {"x": 1}}')
    (folder / "README.md").write_text("card")
    (folder / "rows.jsonl").write_text("{}\n" * 50)
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    card = dataset_card(folder, detail="files", max_bytes=90)
    assert card.name == "dataset-my-data" and card.metadata["manifest"] == {
        "content_sha256": "abc",
        "counts": {"train": 3},
    }
    assert set(card.metadata["files"]) == {"manifest.json", "README.md", "rows.jsonl"}
    assert [name for name, _ in card.files] == ["README.md", "manifest.json"] and card.note is None
    small = dataset_card(folder, detail="files", max_bytes=10)
    assert small.left_out == ("manifest.json",) and "manifest.json" in (small.note or "")
    assert dataset_card(folder, detail="card", max_bytes=90).files == ()
    assert dataset_card(folder / "rows.jsonl", detail="card", max_bytes=0).name == "dataset-rows.jsonl"
    artifact = make_artifact(card)
    assert make_artifact(card).digest == artifact.digest, "the same version is not sent twice"
    assert set(artifact.manifest.entries) == {"card.json", "README.md", "manifest.json", "rows.jsonl"}
    assert artifact.manifest.entries["rows.jsonl"].ref == (folder / "rows.jsonl").as_uri()


def test_checkpoint_and_results_cards(tmp_path: Path) -> None:
    (tmp_path / "aside" / "model").mkdir(parents=True)
    (tmp_path / "aside" / "model" / "model.safetensors").write_text("w" * 100)
    publish(tmp_path / "aside", tmp_path / "checkpoint-000004", step=4)
    card = checkpoint_card(tmp_path / "checkpoint-000004", run_id="r", detail="files", max_bytes=50)
    assert card is not None and card.aliases == ("step-000004", "latest")
    assert card.left_out == ("model/model.safetensors",) == tuple(name for name, _ in card.references)
    (tmp_path / "torn").mkdir()
    assert checkpoint_card(tmp_path / "torn", run_id="r", detail="card", max_bytes=50) is None
    (tmp_path / "results.json").write_text("{}")
    found = results_card(tmp_path, run_id="r", step=4, metadata={"judge": "rule"}, detail="files", max_bytes=50)
    assert [name for name, _ in found.files] == ["results.json"] and found.metadata == {"step": 4, "judge": "rule"}


def test_the_code_version_is_that_of_this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    found = code_version()
    assert found["version"] and len(found["commit"]) == 40 and isinstance(found["dirty"], bool)
    monkeypatch.setenv("PATH", "")
    assert code_version() == {"version": found["version"], "commit": None, "dirty": None}


# Tables


def sample(pictures: list[Path], **changes: Any) -> dict[str, Any]:
    return {**dict.fromkeys(SAMPLE_KEYS, "x"), "image_paths": pictures, **changes}


def test_pictures_go_as_jpeg_where_png_is_large_and_stop_at_the_limit(tmp_path: Path) -> None:
    noisy, flat = tmp_path / "noisy.png", tmp_path / "flat.png"
    Image.frombytes("RGB", (200, 200), os.urandom(120_000)).save(noisy)
    Image.new("RGB", (200, 200)).save(flat)
    found = sample_table([sample([flat, noisy])], picture_pixels=200, max_bytes=10**6)
    row = dict(zip(found.table.columns, found.table.data[0]))
    assert row["picture_1"].format == "png" and row["picture_2"].format == "jpg"
    assert found.num_bytes < 60_000 and (found.num_pictures, found.num_pictures_left_out) == (2, 0)
    few = sample_table([sample([flat, noisy])] * 3, picture_pixels=200, max_bytes=found.num_bytes + 1)
    assert few.num_pictures_left_out >= 2 and len(few.table.data) == 3, "the text still counts"
    assert "answer_parts" not in few.table.columns


def test_parts_are_coloured_and_nothing_of_the_answer_is_markup() -> None:
    html = parts_html([("perceive", "<script>alert(1)</script>"), (None, 'a "b" & c')])
    assert "<script" not in html and "&lt;script&gt;" in html and "&amp; c" in html
    assert html.count("<span") == 2 and 'title="perceive"' in html and "http" not in html


@pytest.mark.parametrize(
    "answer, parts",
    [
        ("", [None]),
        ("I can't help with that.", [None]),
        ("a coat", [None]),
        (
            "The first image shows a cat. The second image shows a dog.\n\nBoth are pets. They could harm each other. "
            "I can't help with that, but I can help you feed them.",
            ["perceive", "relate", "risk", "reply"],
        ),
        ("The image shows a coat. Together they could lead to a fire.", ["perceive", "risk"]),
        ("The first image shows a cat. You can feed it. It could be dangerous.", ["perceive", "reply"]),
    ],
)
def test_answers_are_cut_into_parts_that_make_them_up(answer: str, parts: list[str | None]) -> None:
    found = answer_parts(answer)
    assert [part for part, _ in found] == parts
    assert "".join(text for _, text in found) == answer


# wandb's files


def wandb_file(path: Path, records: list[bytes]) -> Path:
    """A .wandb file of records that go over at most one border of a block each."""
    content = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
    for record in records:
        room = 32768 - len(content) % 32768 - 7
        pieces = [(1, record)] if len(record) <= room else [(2, record[:room]), (4, record[room:])]
        for kind, piece in pieces:
            content += struct.pack("<IHB", zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind) + piece
    path.write_bytes(content)
    return path


def test_records_are_read_over_blocks_and_up_to_a_torn_end(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    made = []
    for number in range(3):
        record = vars(wandb_internal_pb2)["Record"](num=number)
        record.alert.title, record.alert.text = f"t{number}", "x" * 20_000
        made.append(record.SerializeToString())
    path = wandb_file(tmp_path / "run-x.wandb", made)
    assert [record.alert.title for record in read_records(path)] == ["t0", "t1", "t2"]
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert [record.num for record in read_records(path)] == [0, 1]
    path.write_bytes(content[:100] + b"?" + content[101:])
    assert list(read_records(path)) == [], "a damaged record ends the reading"
    path.write_bytes(b"no such file")
    assert list(read_records(path)) == []


def test_numbers_are_known_by_axis_step_and_value(tmp_path: Path) -> None:
    config = TrackingConfig(wandb="offline")
    tracker = Tracker.open(tmp_path, config, name="x", recipe={}, is_main=True)
    tracker.log({"loss": float("nan"), "tokens": 3}, axis="train", step=1)
    tracker.alert(ALERT)
    identity = tracker.wandb_id or ""
    tracker.close()
    # wandb's own process closes the file a moment after the run is finished.
    until = time.monotonic() + 20
    while not (sent := read_sent(tmp_path, identity)).alerts and time.monotonic() < until:
        time.sleep(0.1)
    assert sent.holds("train", 1, {"train/loss": float("nan"), "train/tokens": 3})
    assert not sent.holds("train", 2, {"train/loss": float("nan"), "train/tokens": 3})
    assert not sent.holds("train", 1, {"train/loss": 0.5, "train/tokens": 3})
    assert sent.alerts == {("Something", "of note")} and sent.last_order == 0
    assert Sent(is_gone=True).holds("train", 9, {}) and Sent(is_gone=True).holds_table("samples/x", 9)


def test_a_file_that_would_stop_the_sync_of_all_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "wandb_id").write_text("abc123\n")
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-abc123"
    folder.mkdir(parents=True)
    wandb_file(folder / "run-abc123.wandb", [])
    sent = read_sent(tmp_path, "abc123")
    assert sent.empty == [folder]
    assert wandb_run._read_sent(tmp_path, "abc123", began=True).empty == [folder]
    assert [path.name for path in (tmp_path / "wandb").iterdir()] == [f"empty-{folder.name}"]
    again = wandb_run._read_sent(tmp_path, "abc123", began=True)
    assert again.empty == [] and not again.is_gone, "what it lost is sent again"
    assert wandb_run._read_sent(tmp_path, "other1", began=True).is_gone
