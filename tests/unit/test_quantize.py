"""`model.quantize=4bit`: refused where it cannot work, and only the language model's layers are packed."""

from __future__ import annotations

import importlib.machinery

import pytest
import torch

from mirage.config.loader import load_recipe
from mirage.errors import UserError
from mirage.models import load_model
from mirage.models.quantize import check_quantize, kept_whole
from mirage.models.registry import FAMILIES

LORA = ["recipe=tiny_qwen2vl_mis_lora", "data.dir=/no", "model.quantize=4bit"]


def test_refused_under_zero_3_and_without_adapters() -> None:
    with pytest.raises(UserError, match=r"cannot work under train\.zero_stage=3; set train\.zero_stage=2"):
        load_recipe([*LORA, "train.zero_stage=3"])
    with pytest.raises(UserError, match=r"set model\.lora, and leave language out of model\.train"):
        load_recipe(["recipe=tiny_qwen2vl_mis", "data.dir=/no", "model.quantize=4bit", "train.zero_stage=2"])
    recipe = load_recipe([*LORA, "train.zero_stage=2"])
    assert recipe.model.quantize == "4bit"


def test_refused_without_gpu_and_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_recipe([*LORA, "train.zero_stage=2"]).model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU and none is present"):
        check_quantize(model)
    check_quantize(model.model_copy(update={"quantize": "none"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes, which is not installed: pip install '\.\[quantize\]'"):
        check_quantize(model)
    found = importlib.machinery.ModuleSpec("bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    check_quantize(model)


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_vision_projector_and_head_stay_whole(tiny_folders, family) -> None:
    _, adapter = load_model(tiny_folders[family])
    kept = kept_whole(FAMILIES[family][1], adapter)
    groups = {adapter.group_of(f"{name}.weight") for name in kept}
    assert groups == {"vision", "projector", "language"}
    assert [name for name in kept if adapter.group_of(f"{name}.weight") == "language"] == ["lm_head"]
