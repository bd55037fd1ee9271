"""Tiny models: real architectures, the same bytes twice, and towers that learn to see."""

from __future__ import annotations

import json

import pytest

from mirage.config.schema import TinyConfig
from mirage.errors import UserError
from mirage.files import file_sha256
from mirage.models import load_model
from mirage.models.tiny import build_tiny, tiny_folder
from tests.support.models import PREPROCESSING, SMALL

LEARNS = SMALL.model_copy(update={"warmup_steps": 80})


def hashes(folder):
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", ["internvl", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_same_settings_give_the_same_bytes_and_learn(tmp_path, shapes, family):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build_tiny(tmp_path / name, family, LEARNS, PREPROCESSING, data_dir=shapes, seed=0)
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
    metrics = json.loads((tmp_path / "first" / "tiny.json").read_text())
    assert metrics["warmup_concepts"] == 8
    assert metrics["warmup_heldout_accuracy"] >= 0.5  # chance is 1 in 8


def test_cached_by_settings_seed_and_data(tmp_path, shapes, monkeypatch):
    monkeypatch.setenv("MIRAGE_CACHE", str(tmp_path))
    first = tiny_folder("internvl", SMALL, PREPROCESSING, data_dir=shapes, seed=0)
    assert tiny_folder("internvl", SMALL, PREPROCESSING, data_dir=shapes, seed=0) == first
    assert tiny_folder("internvl", SMALL, PREPROCESSING, data_dir=shapes, seed=1) != first
    assert not list(first.parent.glob("*.partial"))
    model, adapter = load_model(first)
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    assert not model.config.tie_word_embeddings
    assert adapter.spec.max_tiles == PREPROCESSING.max_tiles


def test_no_dataset(tmp_path):
    with pytest.raises(UserError, match="make datagen OUT="):
        tiny_folder("internvl", TinyConfig(), PREPROCESSING, data_dir=tmp_path, seed=0)
