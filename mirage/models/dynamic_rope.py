"""Dynamic NTK rotary positions that depend on the current sample only, never on what the model saw before.

InternLM2 raises the rotary base once a sequence is longer than `max_position_embeddings` (upstream
`InternLM2DynamicNTKScalingRotaryEmbedding`): base * (factor * length / max - (factor - 1)) ** (dim / (dim - 2)).
transformers computes the same for growing lengths, but both keep the base of the longest sequence so far: a sequence
of 1.5 times the limit gets another result after one of 2.5 times. Then a loss depends on the order of the data, and a
resumed run differs from an unbroken one. Here every forward starts from the unscaled frequencies, as a new model does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def forget_longer_sequences(model: nn.Module) -> int:
    """Make every dynamic rotary embedding in `model` start each forward unscaled; returns how many there are.

    Generation is unchanged: with a cache the length only grows, and each step scales by its own length. A second call
    does nothing.
    """
    found = 0
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and hasattr(module, "original_inv_freq"):
            found += 1
            if not getattr(module, "forgets_longer_sequences", False):
                module.register_forward_pre_hook(_reset)
                setattr(module, "forgets_longer_sequences", True)  # noqa: B010  (a mark, no tensor)
    return found


def _reset(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
    if module.max_seq_len_cached != module.original_max_seq_len:
        device = module.inv_freq.device
        module.register_buffer("inv_freq", module.original_inv_freq.to(device).clone(), persistent=False)
        module.max_seq_len_cached = module.original_max_seq_len
