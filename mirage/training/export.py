"""The model part of a checkpoint: files that plain transformers, peft and vLLM load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from mirage.models.adapter import ModelAdapter
from mirage.models.internvl_checkpoint import copy_published_files

WRAPPER_PREFIX = "hf."


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

    `state_dict` is the gathered state of `PackedLossModel`, whose parameter names begin with `hf.`. `base` is the
    folder trained from; the published originals it carries go along, so that full weights can be published again.
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
