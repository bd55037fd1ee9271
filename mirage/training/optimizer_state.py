"""Optimiser state out of and into DeepSpeed, parameter by parameter, for every ZeRO stage and world size.

Through DeepSpeed's `safe_get_full_*` and `safe_set_*` functions (deepspeed.utils, "ZeRO API"), each parameter's fp32
master weights and AdamW moments are put together whole; the ranks share the writing. safetensors only, no pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import save_file

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")


def _trained_parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """What the engine's module trains, by name, in the module's order: the same on every rank."""
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def collect_optimizer_state(engine: Any, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """This rank's share, copied into the host's memory: every `world_size`-th parameter, whole. All ranks call."""
    _link_moments(engine)
    tensors: dict[str, torch.Tensor] = {"rng": torch.get_rng_state()}
    for number, (name, parameter) in enumerate(_trained_parameters(engine)):
        state = {MASTER: safe_get_full_fp32_param(parameter)}
        state |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        if number % world_size == rank:
            tensors |= {f"{name}/{key}": _host(value) for key, value in state.items()}
    return tensors


def write_optimizer_state(tensors: dict[str, torch.Tensor], folder: Path, *, rank: int) -> Path:
    """Write a rank's share into `rank-NNNNN.safetensors`."""
    file = folder / f"rank-{rank:05d}.safetensors"
    save_file(tensors, file)
    return file


def load_optimizer_state(engine: Any, folder: Path, *, num_steps: int, rank: int) -> None:
    """Read the state of a run after `num_steps` optimiser steps into a fresh engine, whatever world size wrote it."""
    _create_moments(engine, num_steps)
    where: dict[str, Path] = {}
    for file in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            where |= {key: file for key in tensors.keys() if key != "rng"}  # noqa: SIM118
    files = {file: safe_open(file, framework="pt") for file in set(where.values())}
    for name, parameter in _trained_parameters(engine):
        for key in (MASTER, *MOMENTS):
            full_name = f"{name}/{key}"
            _set(parameter, key, files[where[full_name]].get_tensor(full_name))
    own = folder / f"rank-{rank:05d}.safetensors"
    if own.exists():
        with safe_open(own, framework="pt") as tensors:
            torch.set_rng_state(tensors.get_tensor("rng"))


def _host(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


def _flat_partitions(engine: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors that the wrapped optimiser steps, by DeepSpeed's three kinds of sharding."""
    optimizer = engine.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise RuntimeError(f"DeepSpeed's {type(optimizer).__name__} shards its state in a way that is not known here")


def _create_moments(engine: Any, num_steps: int) -> None:
    # A fresh engine has no moments before its first step; AdamW's own layout of them.
    base = engine.optimizer.optimizer
    for flat in _flat_partitions(engine):
        moments = {key: torch.zeros_like(flat.detach()) for key in MOMENTS}
        base.state[flat] = {"step": torch.tensor(float(num_steps)), **moments}
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    # ZeRO-1/2 connect parameters with their slices of the moments late, and in 0.19 only those of the first group.
    optimizer = engine.optimizer
    groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "bf16_groups", None)
    if groups is None or hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return
    for parameters, flat in zip(groups, _flat_partitions(engine)):
        lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)


def _set(parameter: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
    value = value.to(parameter.device)
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: this rank's slice of the flattened tensor, padded at the end
        size = parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank()
        flat = torch.zeros(size, dtype=value.dtype, device=value.device)
        part = value.flatten()[rank * size : (rank + 1) * size]
        flat[: len(part)] = part
        if key == MASTER:
            safe_set_local_fp32_param(parameter, flat)
        else:
            safe_set_local_optimizer_state(parameter, flat, key)
        return
    if key == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
