"""Which parts are trained, and that what is saved is what plain peft and transformers load."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from mirage.config.schema import LoraConfig, ModelConfig, ModuleGroup
from mirage.models import ModelAdapter, load_model
from mirage.models.lora import count_parameters, linear_layers, select_trainable
from mirage.training.export import save_model
from mirage.training.export_prompt import export_prompt

FAMILIES = ("internvl", "qwen2_vl")
GROUPS: tuple[ModuleGroup, ...] = ("vision", "projector", "language")
WRAPPER = "base_model.model."


def prepared(
    folder: Path, *, train: tuple[ModuleGroup, ...] = (), targets: tuple[ModuleGroup, ...] | None = None
) -> tuple[Any, ModelAdapter, PeftModel | None]:
    """(model as training prepares it, adapter, peft's wrapper)."""
    model, adapter = load_model(folder, attention="eager")
    lora = LoraConfig(rank=4, alpha=8, targets=targets) if targets is not None else None
    config = ModelConfig(family=adapter.family, path=str(folder), train=train, lora=lora)
    return model, adapter, select_trainable(model, adapter, config, base=str(folder), seed=0)


def trained_by_group(model: Any, adapter: ModelAdapter) -> Counter[str]:
    """Numbers of trained parameters by module group."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[adapter.group_of(name)] += parameter.numel()
    return counts


def shake(model: Any) -> None:
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def logits_of(model: Any, adapter: ModelAdapter) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**export_prompt(adapter), use_cache=False).logits


# What is trained


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_freezes_vision_as_the_paper_does(tiny_folders, family):
    model, adapter, wrapped = prepared(tiny_folders[family], train=("projector", "language"))
    total: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        total[adapter.group_of(name)] += parameter.numel()
    assert wrapped is None and all(total[group] for group in GROUPS)
    assert trained_by_group(model, adapter) == {group: total[group] for group in ("projector", "language")}
    assert count_parameters(model) == (total["projector"] + total["language"], sum(total.values()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("language",), ("vision",), ("projector",), GROUPS])
def test_adapters_sit_on_the_linear_layers_of_their_groups_and_nowhere_else(tiny_folders, family, targets):
    plain, _ = load_model(tiny_folders[family])
    model, adapter, _ = prepared(tiny_folders[family], targets=targets)
    # Every linear layer but the output head, which peft would have to keep apart from the embedding.
    layers = {name: layer for name, layer in linear_layers(plain).items() if name != "lm_head"}
    expected: Counter[str] = Counter()
    for name, layer in layers.items():
        if adapter.group_of(name + ".weight") in targets:
            expected[adapter.group_of(name + ".weight")] += 4 * (layer.in_features + layer.out_features)
    assert set(expected) == set(targets)
    assert trained_by_group(model, adapter) == expected
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == {name for name in layers if adapter.group_of(name + ".weight") in targets}


def test_the_patch_convolution_of_qwen_is_not_adapted(tiny_folders):
    model, _, _ = prepared(tiny_folders["qwen2_vl"], targets=("vision",))
    names = [name for name, _ in model.named_parameters()]
    assert any("visual.blocks.0.attn.proj.lora_A" in name for name in names)
    assert not any("patch_embed" in name and "lora" in name for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_projector_in_full_beside_adapters_is_counted_once(tiny_folders, family):
    model, adapter, _ = prepared(tiny_folders[family], train=("projector",), targets=("language",))
    plain, _ = load_model(tiny_folders[family])
    size = sum(p.numel() for name, p in plain.named_parameters() if adapter.group_of(name) == "projector")
    assert trained_by_group(model, adapter)["projector"] == size
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and "original_module" in name]
    assert frozen and all(adapter.group_of(name) == "projector" for name in frozen)


# What is saved


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("train", "targets"),
    [((), ("language",)), (("projector",), ("language",)), (("projector",), ("vision", "language"))],
)
def test_saved_adapter_loads_in_plain_peft_with_equal_logits(tiny_folders, tmp_path, family, train, targets):
    model, adapter, wrapped = prepared(tiny_folders[family], train=train, targets=targets)
    untouched = logits_of(model, adapter)
    shake(model)
    ours = logits_of(model, adapter)
    assert (ours - untouched).abs().max() > 1e-3
    folder = tmp_path / "adapter"
    state = {f"hf.{name}": tensor for name, tensor in model.state_dict().items()}
    save_model(model, wrapped, adapter, folder, state_dict=state, base=tiny_folders[family])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folders[family])
    # The same bytes in each process: peft keeps sets, whose order depends on the process.
    for names in (config["target_modules"], config["modules_to_save"] or []):
        assert names == sorted(names)
    assert not list(folder.glob("*.bin"))
    base = AutoModelForImageTextToText.from_pretrained(tiny_folders[family], attn_implementation="eager")
    assert (logits_of(PeftModel.from_pretrained(base, folder), adapter) - ours).abs().max() < 1e-6
    through_mirage, _ = load_model(folder, attention="eager")
    assert (logits_of(through_mirage, adapter) - ours).abs().max() < 1e-6
    merged = through_mirage.merge_and_unload()
    assert (logits_of(merged, adapter) - ours).abs().max() < 1e-5
