"""A run on a published InternVL model by the real command: both layouts at its end, adapters merged on request."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from mirage.cli import dispatch
from mirage.errors import UserError
from mirage.files import write_atomic
from mirage.models import load_model
from mirage.models.export_gate import ExportError
from mirage.models.internvl_checkpoint import convert
from mirage.models.safetensors_stream import TensorFolder
from mirage.training.export_callback import _export, _is_done
from mirage.training.export_prompt import export_prompt, logits_of
from tests.support.published import FIXTURES, small_config, write_published

LAST = "checkpoint-000002"
SETTINGS = [
    "recipe=tiny_internvl_mis",
    "model.tiny=null",
    "train.batch_samples=4",
    "train.max_steps=2",
    "train.lr=1e-3",
    "train.precision=fp32",
    "data.pack_tokens=2048",
    "data.num_workers=0",
    "eval.mode=off",
    "tracking.wandb=off",
    "tracking.console=plain",
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small published folder with the reference tokenizer."""
    folder = tmp_path_factory.mktemp("export") / "published"
    write_published(folder, small_config(llm={"vocab_size": 1509, "num_hidden_layers": 2}), num_shards=2)
    for path in (FIXTURES / "tokenizer").iterdir():
        if path.name != "expected_ids.json":
            shutil.copyfile(path, folder / path.name)
    (folder / "LICENSE").write_text("MIT\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# published by somebody\n")
    return folder


@pytest.fixture(scope="module")
def train(repo_root: Path, shapes: Path, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("cache")

    def run(run_dir: Path, *more: str, code: int = 0) -> str:
        settings = [*SETTINGS, f"model.path={published}", f"run_dir={run_dir}", f"data.dir={shapes}", *more]
        done = subprocess.run(
            [sys.executable, "mirage/train.py", *settings],
            cwd=repo_root,
            env={**os.environ, "MIRAGE_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
            text=True,
            capture_output=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def full_run(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "full"
    assert "exported to" in train(run_dir)
    return run_dir


def plain_logits(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return logits_of(AutoModelForImageTextToText.from_pretrained(folder), inputs)


def test_a_run_on_a_published_model_ends_with_both_layouts(full_run: Path, published: Path, tmp_path: Path) -> None:
    export = full_run / "export"
    summary = json.loads((export / "export.json").read_text())
    assert summary["checkpoint"] == LAST and set(summary["logit_differences"]) == {"native", "published"}
    assert all(difference < 1e-5 for difference in summary["logit_differences"].values())
    assert (export / "native").resolve() == (full_run / LAST / "model").resolve()
    model, adapter = load_model(full_run / LAST)
    inputs = export_prompt(adapter)
    ours = logits_of(model, inputs)
    convert(export / "published", tmp_path / "back", layout="native")
    assert (plain_logits(export / "native", inputs) - ours).abs().max() < 1e-5
    assert (plain_logits(tmp_path / "back", inputs) - ours).abs().max() < 1e-5
    before, _ = load_model(published, preprocessing=None)
    assert (logits_of(before, inputs) - ours).abs().max() > 1e-3
    for name in ("config.json", "tokenizer.model", "LICENSE"):
        assert (export / "published" / name).read_bytes() == (published / name).read_bytes()
    # The tensors of the published model, no more and no fewer.
    assert TensorFolder(export / "published").info == TensorFolder(published).info
    cards = {folder: ModelCard.load(export / folder / "README.md") for folder in (".", "native", "published")}
    assert all(
        "**Not evaluated.**" in card.text and "| hardware | 1 CPU process (" in card.text for card in cards.values()
    )
    assert cards["native"].data.license == "mit" and cards["native"].data.library_name == "transformers"
    assert "has InternVL's published layout" in cards["published"].text
    assert str(full_run.parent) not in cards["."].content and str(published) not in cards["."].content


def test_an_export_that_cannot_be_written_stops_the_run(full_run: Path, train: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "again"
    shutil.copytree(full_run, run_dir, symlinks=True)
    assert _is_done(run_dir / "export", run_dir / LAST)
    shutil.rmtree(run_dir / "export")
    assert not _is_done(run_dir / "export", run_dir / LAST)
    original = run_dir / LAST / "model" / "published" / "config.json"
    config = json.loads(original.read_text())
    config["llm_config"]["rope_theta"] = 3.0
    original.write_text(json.dumps(config))
    said = train(run_dir, code=2)
    assert "rope_theta differ from" in said and "Traceback" not in said
    assert not (run_dir / "export" / "export.json").exists()


def test_the_gate_stops_a_run_whose_export_is_not_the_model(full_run: Path, tmp_path: Path) -> None:
    model, adapter = load_model(full_run / LAST)
    inputs = export_prompt(adapter)
    trainer: Any = SimpleNamespace(
        model=model, adapter=adapter, peft_model=None, base=None,
        recipe=SimpleNamespace(model=SimpleNamespace(quantize="none"), tracking=SimpleNamespace(console="quiet")),
    )  # fmt: skip
    with pytest.raises(ExportError, match="the export is not the trained model"):
        _export(trainer, full_run / LAST, tmp_path / "export", inputs, logits_of(model, inputs) * 1.1)
    assert not (tmp_path / "export" / "export.json").exists()
    _export(trainer, full_run / LAST, tmp_path / "export", inputs, logits_of(model, inputs))
    assert (tmp_path / "export" / "export.json").exists()


def test_adapter_run_exports_adapter_and_merged_weights(train: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "lora"
    train(run_dir, "model.train=projector", "model.lora={rank: 4, alpha: 8, targets: [language]}")
    summary = json.loads((run_dir / "export" / "export.json").read_text())
    assert set(summary["logit_differences"]) == {"native"} and summary["logit_differences"]["native"] < 1e-5
    model, adapter = load_model(run_dir / LAST)
    inputs = export_prompt(adapter)
    ours = logits_of(model, inputs)
    merged, again, copied = tmp_path / "merged", tmp_path / "published", tmp_path / "adapter"
    assert dispatch(["export", str(run_dir), str(merged), "--merge"]) == 0
    assert (plain_logits(merged, inputs) - ours).abs().max() < 1e-4
    assert dispatch(["export", str(run_dir / LAST), str(again), "--merge", "--layout", "published"]) == 0
    convert(again, tmp_path / "back", layout="native")
    assert (plain_logits(tmp_path / "back", inputs) - ours).abs().max() < 1e-4
    assert dispatch(["export", str(run_dir), str(copied)]) == 0
    assert (copied / "adapter_model.safetensors").exists()
    libraries = [ModelCard.load(folder / "README.md").data.library_name for folder in (copied, merged, again)]
    assert libraries == ["peft", "transformers", "transformers"]
    assert (run_dir / "export" / "README.md").read_text().startswith("---\n")
    assert (run_dir / "export" / "native" / "README.md").read_text().count("PeftModel") > 0
    with pytest.raises(UserError, match="holds an adapter, which has no published layout; add --merge"):
        dispatch(["export", str(run_dir), str(tmp_path / "x"), "--layout", "published"])
    with pytest.raises(UserError, match="holds full weights and no adapter"):
        dispatch(["export", str(merged), str(tmp_path / "x"), "--merge"])
    with pytest.raises(UserError, match="exists already"):
        dispatch(["export", str(run_dir), str(merged)])
    assert (
        not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.merged")) and not (tmp_path / "x").exists()
    )


def test_exports_of_full_weights_and_damage(full_run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    assert dispatch(["export", str(full_run), str(tmp_path / "native")]) == 0
    assert dispatch(["export", str(full_run), str(tmp_path / "published"), "--layout", "published"]) == 0
    assert "reloaded logits within" in capsys.readouterr().out
    for path in (full_run / "export" / "published").glob("*.safetensors"):
        assert (tmp_path / "published" / path.name).read_bytes() == path.read_bytes()
    import mirage.training.export_cli as module

    honest = shutil.copytree

    def spoilt(source: Path, target: Path, *options: Any) -> None:
        honest(source, target, *options)
        config = json.loads((Path(target) / "config.json").read_text())
        if "text_config" in config:
            config["text_config"]["rms_norm_eps"] = 1.0
            write_atomic(Path(target) / "config.json", json.dumps(config))

    monkeypatch.setattr(module.shutil, "copytree", spoilt)
    assert dispatch(["export", str(full_run), str(tmp_path / "bad")]) == 1
    assert "the export is not the trained model" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists() and not (tmp_path / "bad.partial").exists()
