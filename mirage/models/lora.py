"""Which parts are trained: freezing by module group, low-rank adapters, and the names peft saves them under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict

from mirage.config.schema import ModelConfig
from mirage.errors import UserError
from mirage.models.adapter import ModelAdapter


def select_trainable(
    model: Any, adapter: ModelAdapter, config: ModelConfig, *, base: str, seed: int
) -> PeftModel | None:
    """Freeze and unfreeze `model` in place; with `config.lora`, inject adapters and return peft's wrapper.

    `base` is written into the adapter's config as the model it belongs to. Groups in `config.train` are trained in
    full; beside adapters they go through peft's `modules_to_save`, so that what is trained is also saved.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.lora is None and adapter.group_of(name) in config.train)
    if config.lora is None:
        return None
    targets = adapter.lora_target_names(linear_layers(model), config.lora.targets)
    if not targets:
        raise UserError(f"model.lora.targets={','.join(config.lora.targets)} matches no linear layer")
    saved = [name for group in config.train for name in save_modules(model, adapter, group)]
    peft_config = PeftLoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, peft_config)
    written = wrapped.peft_config["default"]
    written.base_model_name_or_path = base
    # peft makes sets of these, whose order in adapter_config.json would differ from process to process.
    written.target_modules = sorted(written.target_modules)
    written.modules_to_save = sorted(written.modules_to_save) if written.modules_to_save else None
    return wrapped


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """The linear layers by name, quantised ones too; Qwen2-VL's patch embedding ends in `proj` and is a convolution."""
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def load_adapter_weights(peft_model: PeftModel, folder: Path) -> None:
    """Read the adapter saved in `folder` into `peft_model`. Raises `UserError` unless every tensor has its place."""
    weights = load_peft_weights(str(folder), device="cpu")
    result = set_peft_model_state_dict(peft_model, weights)
    if result.unexpected_keys:
        raise UserError(
            f"{folder}: adapter tensors without a place in this model: {', '.join(result.unexpected_keys[:3])}"
        )


def save_modules(model: Any, adapter: ModelAdapter, group: str) -> list[str]:
    """Names of the outermost modules that make up `group` and nothing else (no lists: peft cannot wrap those)."""
    prefixes = adapter.groups[group]
    owned = {name for name, _ in model.named_parameters() if adapter.group_of(name) == group}
    names: list[str] = []
    for name, module in model.named_modules():
        parameters = {f"{name}.{suffix}" for suffix, _ in module.named_parameters()}
        inside_another = any(name.startswith(f"{outer}.") for outer in names)
        is_list = isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential))
        if parameters and parameters <= owned and not inside_another and not is_list:
            names.append(name)
    if not names:
        raise UserError(f"model.train names {group}, of which {type(model).__name__} has no parameters ({prefixes})")
    return names


def count_parameters(model: Any) -> tuple[int, int]:
    """(trained, all) parameters, also when DeepSpeed holds them in shards."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
