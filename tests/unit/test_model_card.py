"""Model cards: what they say follows from the run's own files, results come in later, nothing of the machine leaks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from mirage.config.loader import load_recipe, recipe_hash, resolved_json
from mirage.evals.hook import run_job
from mirage.evals.schedule import Job
from mirage.files import write_atomic
from mirage.model_card import write as write_module
from mirage.model_card.facts import read_facts
from mirage.model_card.text import code, plain, without_paths
from mirage.model_card.write import refresh_cards, refresh_cards_of, write_export_card, write_run_cards
from mirage.tracking.console import make_console
from mirage.training.checkpoint import publish, read_ready
from tests.support.evaluations import labels, write_evaluation

TASKS = {
    "mis_hard": labels(asr=10, rsr=90, rr=20),
    "twins": labels(refused=5, helped=95),
    "general": labels(right=80, wrong=40),
}
BEFORE = {"mis_hard": labels(asr=120), "twins": labels(helped=100), "general": labels(right=90, wrong=30)}
LORA = ["model.train=projector", "model.lora={rank: 4, alpha: 8, targets: [language]}"]


def make_dataset(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True)
    front = {"license": "cc-by-sa-4.0", "pretty_name": "Shapes (seed 0)", "language": ["en"]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front | more)}---\n# Shapes\n")
    manifest = {
        "content_sha256": "ab" * 32,
        "counts": {"rows": 90, "splits": {"train": {"rows": 60, "category": {"Violent": 50, "Hate": 10}}}},
        "licences": {"pictures": "drawn here, CC0"},
        "limitations": ["Shapes are no photographs."],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def make_run(folder: Path, *settings: str, data: Path) -> Path:
    """A run folder with one trained checkpoint that is exported, as the trainer leaves it, without training."""
    run_dir = folder / "runs" / "mine"
    recipe = load_recipe(
        [
            "recipe=tiny_internvl_mis",
            f"run_dir={run_dir}",
            f"data.dir={data}",
            "data.sources=[{split: train}]",
            *settings,
        ]
    )
    aside = run_dir / ".checkpoint-000020.partial"
    (aside / "resume").mkdir(parents=True)
    (aside / "model").mkdir()
    adapter = recipe.model.lora is not None
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    save_file({"a": torch.zeros(30, 10), "b": torch.zeros(7)}, aside / "model" / name)
    (aside / "model" / ("adapter_config.json" if adapter else "config.json")).write_text('{"model_type": "internvl"}')
    write_atomic(aside / "recipe.json", resolved_json(recipe) + "\n")
    write_atomic(aside / "resume" / "state.json", json.dumps({"step": 20, "world_size": 2}))
    publish(aside, run_dir / "checkpoint-000020", step=20)
    write_atomic(run_dir / "recipe.json", resolved_json(recipe) + "\n")
    counts = {"data/rows": 60, "data/tokens": 6000, "data/supervised_tokens": 2000, "data/rows_unusable": 2}
    write_atomic(run_dir / "summary.json", json.dumps(counts))
    records = [
        {"axis": "train", "step": step, "train/loss": 2.0 / step, "train/tokens": 100.0, "train/epoch": step / 10}
        for step in range(1, 31)  # the run goes on after the exported checkpoint
    ]
    write_atomic(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    (run_dir / "export").mkdir()
    summary = {
        "checkpoint": "checkpoint-000020",
        "fingerprint": weights(run_dir),
        "logit_differences": {"native": 1e-7},
    }
    write_atomic(run_dir / "export" / "export.json", json.dumps(summary))
    return run_dir


def weights(run_dir: Path) -> str:
    ready = read_ready(run_dir / "checkpoint-000020")
    assert ready is not None
    return str(ready["fingerprint"])


def evaluate(run_dir: Path, tasks: dict[str, Sequence[str]] | None = None, **more: Any) -> None:
    first = run_dir / "evals" / "step-000000"
    if not first.exists():
        write_evaluation(first, {name: BEFORE[name] for name in tasks or TASKS}, step=0)
    write_evaluation(
        run_dir / "evals" / "step-000020", tasks or TASKS, step=20, baseline=first, weights=weights(run_dir), **more
    )


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "elsewhere" / "shapes")


@pytest.fixture
def run_dir(tmp_path: Path, data: Path) -> Path:
    return make_run(tmp_path, data=data)


def test_the_card_of_a_full_run(run_dir: Path, tmp_path: Path) -> None:
    evaluate(run_dir)
    assert refresh_cards(run_dir)
    text = card_of(run_dir / "export")
    found = ModelCard(text).data
    assert (found.license, found.library_name, found.pipeline_tag) == ("unknown", "transformers", "image-text-to-text")
    assert found.base_model is None and found.language == ["en"] and found.datasets == ["shapes-seed-0"]
    assert found.tags == ["mirage", "multi-image", "safety", "internvl"]
    rates = {(result.dataset_name, result.metric_type): result for result in found.eval_results}
    asr = rates["mis_hard", "asr"]
    assert asr.metric_value == 8.33 and asr.metric_args["n"] == 120 and asr.metric_args["ci95"] == [4.59, 14.66]
    assert rates["general", "accuracy"].metric_value == 66.67
    assert "a small internvl model built from nothing" in text and "307 parameters" in text
    assert "- Safety: mis_hard asr 8.3% \\[4.6, 14.7\\], 100.0% at step 0\n" in text
    training_data = section(text, "Training data")
    assert "| train | shapes | train (rows) | 60 | 6,000 | 2,000 | as it is |" in training_data
    assert "**Shapes (seed 0)**, 90 rows in all; licence: cc-by-sa-4.0; sha256 of its manifest `abab" in training_data
    assert "not trained on: 2 unusable." in training_data
    training = section(text, "Training")
    assert "| optimiser steps | 20, 2.00 epochs |" in training and "| tokens | 2,000 |" in training
    assert "| last training loss | 0.1000 |" in training and "2 processes; what on is not recorded" in training
    results = section(text, "Results")
    assert results.index("Safety:") < results.index("Over-refusal:") < results.index("General ability:")
    assert "| mis_hard | asr ↓ | 120 | 100.0 [96.9, 100.0] | 8.3 [4.6, 14.7] | -91.7 | &lt;0.001 |" in results
    assert "Judge fake-v1. invented" in results
    limits = section(text, "Limits")
    assert "- Verdicts are by the model fake. invented." in limits and "- Shapes are no photographs." in limits
    assert "No training rows of these categories of risk: Illegal Activity, Self-Harm, Privacy, Erotic." in limits
    assert "A model of 307 parameters" in limits and "Training text is in: en." in limits
    assert "- pictures: drawn here, CC0" in section(text, "Licence")
    assert "within 1e-07 (native)" in section(text, "Checked")
    # In each folder to give away, the same but for where the weights lie.
    own = card_of(run_dir / "checkpoint-000020" / "model")
    assert own == text.replace("THIS_FOLDER/native", "THIS_FOLDER")
    assert str(tmp_path) not in text and str(Path.home()) not in text and str(tmp_path.name) not in text


def test_the_card_of_an_adapter_names_its_base(tmp_path: Path, data: Path) -> None:
    hub = ["model.path=OpenGVLab/InternVL2_5-8B", "model.tiny=null", *LORA]
    run_dir = make_run(tmp_path, *hub, data=data)
    evaluate(run_dir)
    assert refresh_cards(run_dir)
    text = card_of(run_dir / "export")
    found = ModelCard(text).data
    assert (found.library_name, found.base_model, found.license) == ("peft", "OpenGVLab/InternVL2_5-8B", "mit")
    assert found.to_dict()["base_model_relation"] == "adapter" and "lora" in found.tags
    assert "A LoRA adapter of the family `internvl`" in text and "307 parameters in the adapter" in text
    assert "PeftModel.from_pretrained" in text and "# OpenGVLab/InternVL2_5-8B" in text
    assert "| LoRA | rank 4, alpha 8.0, on language |" in text and "| trained in full | projector |" in text
    assert "A model of" not in section(text, "Limits")  # an adapter's size says nothing of the model's
    merged = tmp_path / "merged"
    merged.mkdir()
    save_file({"a": torch.zeros(500, 2)}, merged / "model.safetensors")
    write_export_card(merged, run_dir / "checkpoint-000020" / "model", form="merged", difference=1e-4)
    text = card_of(merged)
    assert "PeftModel" not in text and ModelCard(text).data.library_name == "transformers"
    assert ModelCard(text).data.to_dict()["base_model_relation"] == "finetune" and "1,000 parameters;" in text
    assert len(ModelCard(text).data.eval_results) == len(found.eval_results) > 0


def test_what_was_not_evaluated_is_said_plainly(run_dir: Path) -> None:
    assert refresh_cards(run_dir)
    text = card_of(run_dir / "export")
    assert ModelCard(text).data.eval_results is None and "model-index" not in text and "In short" not in text
    assert section(text, "Results").strip() == "**Not evaluated.** No results of these weights were found."
    assert "- Not evaluated: nothing was measured on these weights" in section(text, "Limits")
    # Results of other weights are not these weights' results.
    write_evaluation(run_dir / "evals" / "step-000020", TASKS, step=20, weights="0" * 16)
    assert refresh_cards(run_dir) and card_of(run_dir / "export") == text


def test_results_that_come_later_are_written_in(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refresh_cards(run_dir)
    assert "Not evaluated" in card_of(run_dir / "export")

    def measured(*args: Any, **more: Any) -> None:
        evaluate(run_dir)

    monkeypatch.setattr("mirage.evals.hook.evaluate_checkpoint", measured)
    recipe = load_recipe(["recipe=tiny_internvl_mis", f"run_dir={run_dir}"])
    ended = run_job(run_dir, Job(20, "full"), recipe=recipe, device=torch.device("cpu"), console=None)
    assert ended.state == "done"
    for folder in (run_dir / "export", run_dir / "checkpoint-000020" / "model"):
        assert "Not evaluated" not in card_of(folder) and "asr 8.3%" in card_of(folder)


def test_void_and_missing_figures(run_dir: Path) -> None:
    evaluate(run_dir, {"mis_hard": labels(asr=10, unscored=110), "twins": labels(helped=49, unscored=1)})
    refresh_cards(run_dir)
    text = card_of(run_dir / "export")
    named = {result.dataset_name for result in ModelCard(text).data.eval_results}
    assert named == {"twins"}, "a void task has no number in the metadata"
    limits = section(text, "Limits")
    assert "- mis_hard has no valid figure: 110 of 120 samples have no verdict" in limits
    assert "- twins: 1 of 50 answers have no verdict." in limits
    assert "- General ability was not evaluated." in limits and "twins (50); see the intervals" in limits
    assert "mis_hard has no valid figure" in text.split("## Intended use")[0]


def test_alarms_and_damaged_evaluations_are_limits(run_dir: Path) -> None:
    evaluate(run_dir)
    folder = run_dir / "evals" / "step-000020"
    request = json.loads((folder / "results.json").read_text())["request"]
    alarm = {"rate": "general:accuracy", "baseline_percent": 75.0, "percent": 66.7}
    (folder / "guards.json").write_text(json.dumps({"request": request, "alarms": [alarm]}))
    other = run_dir / "evals" / "other-checkpoint-000020-aa"
    shutil.copytree(folder, other)
    (other / "results.json").write_text("{")
    refresh_cards(run_dir)
    limits = section(card_of(run_dir / "export"), "Limits")
    assert "Worse than at step 0 beyond the allowed margin: general:accuracy (75.0% to 66.7%)." in limits
    assert "the evaluation other-checkpoint-000020-aa is damaged" in limits
    (folder / "guards.json").write_text(json.dumps({"request": "of older results", "alarms": [alarm]}))
    refresh_cards(run_dir)
    assert "Worse than" not in card_of(run_dir / "export")


def test_text_of_others_is_only_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef-secret")
    name = "<script>alert(1)</script> A | B ![x](http://e.example/p.png) <!-- hidden --> ```\n## Results"
    data = make_dataset(tmp_path / "elsewhere" / "sha|pes", pretty_name=name, license="My <b>own</b> terms")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["limitations"] = ["key 0123456789abcdef-secret <img src=x onerror=alert(1)> a\nb"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    run_dir = make_run(tmp_path, "preprocessing.system_prompt='``` <i>0123456789abcdef-secret'", data=data)
    refresh_cards(run_dir)
    text = card_of(run_dir / "export")
    body = text.split("\n---\n", 1)[1]
    for bad in ("<script", "<img", "<b>", "<!--", "![x]", "0123456789abcdef-secret"):
        assert bad not in body.replace(section(text, "Recipe"), ""), bad
    assert "0123456789abcdef-secret" not in text and "alert(1) A \\| B !\\[x\\](http" in body
    assert body.count("\n## Results\n") == 1 and "sha\\|pes" in body
    # Three fences: use, recipe, command; none is ended from inside.
    assert body.count("```") == 6
    assert ModelCard(text).data.license == "unknown"


def test_a_licence_that_the_hub_does_not_know_has_a_name(tmp_path: Path, data: Path) -> None:
    base = tmp_path / "home" / "someone" / "base-model"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"model_type": "internvl"}')
    (base / "README.md").write_text("---\nlicense: Company Terms 2\n---\n")
    run_dir = make_run(tmp_path, f"model.path={base}", "model.tiny=null", data=data)
    refresh_cards(run_dir)
    text = card_of(run_dir / "export")
    found = ModelCard(text).data
    assert (found.license, found.license_name, found.base_model) == ("other", "company-terms-2", None)
    assert "the local folder `base-model`" in text and "someone" not in text and str(tmp_path) not in text
    assert "Base model: Company Terms 2." in section(text, "Licence")


def test_the_recipe_in_the_card_runs_again(run_dir: Path, tmp_path: Path, data: Path) -> None:
    refresh_cards(run_dir)
    block = section(card_of(run_dir / "export"), "Recipe").split("```yaml\n")[1].split("```")[0]
    assert "dir: shapes" in block
    file = tmp_path / "again.yaml"
    file.write_text(block.replace("dir: shapes", f"dir: {data}"))
    again = load_recipe([f"recipe={file}", "name=x"])
    original = load_recipe(["recipe=tiny_internvl_mis", f"data.dir={data}", "data.sources=[{split: train}]"])
    for name in ("model", "preprocessing", "data", "train"):
        assert getattr(again, name) == getattr(original, name)
    own = load_recipe([f"recipe={run_dir / 'recipe.json'}"])
    assert f"`{recipe_hash(own)}`" in card_of(run_dir / "export")


def trainer_of(run_dir: Path, data: Path) -> Any:
    return SimpleNamespace(
        run_dir=run_dir, world_size=2, device=torch.device("cpu"), base=data, num_trained_parameters=123
    )  # fmt: skip


def test_a_card_keeps_what_the_run_knew(run_dir: Path, data: Path) -> None:
    write_run_cards(trainer_of(run_dir, data), run_dir / "checkpoint-000020")
    text = card_of(run_dir / "export")
    assert "| hardware | 2 CPU processes (" in text and "no GPU |" in text and "| parameters trained | 123 |" in text
    assert "| software | mirage " in text and f"torch {torch.__version__}" in text
    assert read_facts(run_dir / "export", fingerprint=weights(run_dir)) is not None
    # The data may change after the training that it describes.
    shutil.rmtree(data)
    assert refresh_cards(run_dir) and card_of(run_dir / "export") == text
    (run_dir / "export" / "card.json").unlink()
    refresh_cards(run_dir)
    assert "no hash: it is no longer there" in card_of(run_dir / "export")


def test_the_card_is_the_same_each_time(run_dir: Path) -> None:
    evaluate(run_dir)
    refresh_cards(run_dir)
    text = card_of(run_dir / "export")
    os.utime(run_dir / "recipe.json", (0, 0))
    refresh_cards(run_dir)
    assert card_of(run_dir / "export") == text and "\n\n\n" not in text


def test_nothing_is_written_without_an_export(run_dir: Path) -> None:
    (run_dir / "export" / "export.json").unlink()
    assert not refresh_cards(run_dir) and not (run_dir / "export" / "README.md").exists()
    summary = {"checkpoint": "checkpoint-000020", "fingerprint": "of an older training"}
    write_atomic(run_dir / "export" / "export.json", json.dumps(summary))
    assert not refresh_cards(run_dir)


def test_a_card_that_fails_stops_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(card: Any) -> str:
        raise RuntimeError("no template")

    monkeypatch.setattr(write_module, "render_card", broken)
    refresh_cards_of(run_dir, make_console("quiet"))
    assert "no model card: RuntimeError: no template" in capsys.readouterr().err


def test_weights_without_a_run_say_so(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "internvl"}')
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    write_export_card(out, folder, form="native", difference=0.0)
    text = card_of(out)
    assert "Not recorded: these weights were exported without the run" in section(text, "Training data")
    assert section(text, "Recipe").strip() == section(text, "Training").strip() == "Not recorded."
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a<b", "a&lt;b"),
        ("p <0.001 and >2", "p &lt;0.001 and &gt;2"),
        ("<a href='x'>link</a> | `code`", "link \\| \\`code\\`"),
        ("one\n# two\u202e\x1b[31m", "one # two\\[31m"),
        ("<unclosed", "&lt;unclosed"),
    ],
)
def test_plain_text(given: str, expected: str) -> None:
    assert plain(given) == expected


def test_code_and_paths() -> None:
    assert code("a`b|c\nd") == "`a'b\\|c d`" and code("") == ""
    given = {"path": "/home/me/data/x", "list": ["~/y", "runs/z", "C:\\data\\w"], "base_url": "http://10.0.0.3:8000"}
    assert without_paths(given) == {"path": "x", "list": ["y", "runs/z", "w"], "base_url": "(a server)"}
