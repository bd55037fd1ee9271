"""The helpful base: its maker on a small dataset, and the weights that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mirage.config.schema import TinyConfig
from mirage.data.sources import read_rows
from mirage.errors import UserError
from mirage.files import file_sha256
from mirage.miniature import base
from mirage.miniature.base import Stage, build_base
from mirage.models.registry import find_weights, load_model
from mirage.models.shipped import BASE_FILE, find_shipped

MOST_BYTES = 4 * 1024**2
SMALL = TinyConfig(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128, vision_hidden_size=32,
    vision_layers=1, vocab_size=400, warmup_steps=2,
)  # fmt: skip
FAMILIES = ("internvl", "qwen2_vl")


@pytest.fixture
def small_curriculum(monkeypatch: pytest.MonkeyPatch, shapes: Path) -> None:
    kinds = {str(row.sub_category): 1.0 for row in read_rows(shapes, splits=("train_general",))}
    monkeypatch.setattr(base, "SIZE", SMALL)
    monkeypatch.setattr(base, "CURRICULUM", (Stage("everything", 8, 4, 3e-3, kinds),))


def test_a_base_is_built_and_loads(tmp_path: Path, shapes: Path, small_curriculum: None) -> None:
    said: list[str] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build_base(tmp_path / name, "internvl", data_dir=shapes, seed=3, say=said.append)
    model, adapter = load_model(tmp_path / "one")
    assert adapter.family == "internvl" and not model.training
    facts = json.loads((tmp_path / "one" / BASE_FILE).read_text())
    assert facts["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["last_losses"]["everything"] < 6.5 and any("everything 8/8" in line for line in said)
    weights = [file_sha256(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0] == weights[1], "one seed must give one base"


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make datagen OUT=.*SIZE=mini"):
        build_base(tmp_path, "internvl", data_dir=tmp_path / "nothing", seed=0, say=print)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_base_loads_and_is_small(family: str) -> None:
    folder = find_weights(f"shipped:{family}")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    model, adapter = load_model(f"shipped:{family}")
    assert adapter.family == family
    assert adapter.num_image_tokens(112, 112, num_images=2) == 4
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_base_says_how_it_was_made_and_what_it_can_do(family: str) -> None:
    facts = json.loads((find_shipped(f"shipped:{family}") / BASE_FILE).read_text())
    assert facts["command"] == f"python -m mirage.miniature.base --family {family} --seed {facts['seed']}"
    measured = facts["measured_percent"]
    assert measured["mis_easy"]["asr"] >= 80 and measured["mis_hard"]["asr"] >= 80
    assert measured["general"]["accuracy"] >= 90


def test_an_unknown_shipped_model_is_named() -> None:
    with pytest.raises(UserError, match="no such model comes with MIRage; there are internvl, qwen2_vl"):
        find_weights("shipped:llama")
