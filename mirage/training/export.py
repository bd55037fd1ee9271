"""The model part of a checkpoint: files that plain transformers, peft and vLLM load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mirage.models.adapter import ModelAdapter
from mirage.models.internvl_checkpoint import copy_published_files

WRAPPER_PREFIX = "hf."
# What ZeRO-3 puts together at once: far below a layer of an 8B model, and enough for a collective to be worth it.
_GATHERED_ELEMENTS = 64 * 1024**2


def gather_state(engine: Any, *, is_main: bool, trained_only: bool) -> dict[str, torch.Tensor]:
    """Parameters and kept buffers of the engine's module, by name, copied into the main rank's host memory.

    A collective under ZeRO-3; the other ranks get {}. A checkpoint of adapters needs what is trained and no more: the
    frozen rest of an 8B model is 16 GB to carry.
    """
    from deepspeed.runtime.zero import GatheredParameters

    module, sharded = engine.module, engine.zero_optimization_partition_weights()
    state: dict[str, torch.Tensor] = {}
    parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad or not trained_only]
    for names in _buckets(parameters):
        with GatheredParameters(list(names.values()), enabled=sharded):
            if is_main:
                state |= {name: p.detach().to("cpu", copy=True) for name, p in names.items()}
    if is_main:
        kept = {
            f"{prefix}.{name}" if prefix else name
            for prefix, part in module.named_modules()
            for name, _ in part.named_buffers(recurse=False)
            if name not in part._non_persistent_buffers_set
        }
        state |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in module.named_buffers() if name in kept}
    return state


def _buckets(parameters: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """The parameters in order, some at a time."""
    bucket: dict[str, Any] = {}
    num_elements = 0
    for name, parameter in parameters:
        bucket[name] = parameter
        num_elements += getattr(parameter, "ds_numel", parameter.numel())
        if num_elements >= _GATHERED_ELEMENTS:
            yield bucket
            bucket, num_elements = {}, 0
    if bucket:
        yield bucket


def save_model(
    model: Any,
    peft_model: Any,
    adapter: ModelAdapter,
    folder: Path,
    *,
    state_dict: dict[str, torch.Tensor],
    base: Path,
) -> None:
    """Write consolidated safetensors (full) or the peft adapter (LoRA), tokenizer, processor and spec into `folder`.

    `state_dict` is the gathered state of `PackedLossModel`, whose parameter names begin with `hf.`; with adapters, of
    what is trained alone. `base` is the folder trained from; the published originals it carries go along, so that full
    weights can be published again.
    """
    folder.mkdir(parents=True)
    state = {name.removeprefix(WRAPPER_PREFIX): tensor for name, tensor in state_dict.items()}
    if peft_model is not None:
        prefix = "base_model.model."
        state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        peft_model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        # peft's template of a card; the real one is written when its results are there (mirage.model_card).
        (folder / "README.md").unlink(missing_ok=True)
    else:
        model.save_pretrained(folder, state_dict=state)
        copy_published_files(base, folder)
    adapter.save_files(folder)


def link_untouched_model(base: Path, folder: Path, adapter: ModelAdapter) -> None:
    """`base` under the run's own tokenizer files and preprocessing spec; weights are links, not copies."""
    folder.mkdir(parents=True)
    for path in sorted(base.iterdir()):
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            try:
                os.link(path.resolve(), folder / path.name)
            except OSError:
                (folder / path.name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, folder / path.name)
    copy_published_files(base, folder)
    adapter.save_files(folder)
