"""The real command with cached vision features, under ZeRO-3: the losses are those without the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_train_resume import command, losses, run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("recipe", "mode", "processes"),
    [
        ("tiny_internvl_mis", "memory", 1),
        pytest.param("tiny_internvl_mis", "memory", 2, marks=pytest.mark.slow),
        pytest.param("tiny_qwen2vl_mis_lora", "disk", 2, marks=pytest.mark.slow),
    ],
)
def test_cached_features_give_the_same_losses(tmp_path, repo_root, shapes, cache, recipe, mode, processes):
    more = ["train.gradient_checkpointing=true"]

    def train(name: str) -> str:
        return run(command(recipe, tmp_path / name, shapes, *more, processes=processes), repo_root, cache)

    train("plain")
    # One worker a rank is forked beside gloo's and DeepSpeed's threads; resized pictures are kept on disk.
    more += [f"model.cache_vision_features={mode}", "data.num_workers=1", "data.tile_cache=auto"]
    said = train("cached")
    assert "vision features of 8 pictures computed" in said
    assert list((cache / "tiles").glob("??/*.safetensors"))
    found, wanted = losses(tmp_path / "cached"), losses(tmp_path / "plain")
    assert len(wanted) == 6 and found == pytest.approx(wanted, rel=1e-6)
    if mode == "disk":
        said = train("again")
        assert "vision features of 0 pictures computed" in said
        assert losses(tmp_path / "again") == found
