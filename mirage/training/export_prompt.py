"""The fixed prompt on which an export is compared with the model in memory, and how close the two must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from mirage.data.row import ImagePart, Message, TextPart
from mirage.models.adapter import ModelAdapter

QUESTION = "What does the picture show? Answer in one sentence."
EDGE = 64
# Largest difference over the largest logit. Measured on small models, other kernels on the same weights: 1e-6 in
# float32, 1e-2 in bfloat16; a lost output head or a swapped projection is off by 0.5 and more.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def export_prompt(adapter: ModelAdapter, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Model inputs of one picture and one question: ids [1, L], pixels of `dtype`, on the CPU. Always the same."""
    ramp = np.broadcast_to(np.linspace(0, 255, EDGE, dtype=np.uint8), (EDGE, EDGE))
    image = Image.fromarray(np.stack([ramp, ramp.T, np.full_like(ramp, 96)], axis=-1))
    picture = adapter.preprocess(image, num_images=1)
    message = Message(role="user", content=(ImagePart(index=0), TextPart(text=QUESTION)))
    rendered = adapter.render([message], [picture.num_tokens], generation=True)
    input_ids = torch.tensor([rendered.input_ids])
    pictures = adapter.picture_inputs([picture])
    pictures[adapter.pixel_key] = pictures[adapter.pixel_key].to(dtype)
    return {"input_ids": input_ids, **adapter.token_inputs(input_ids), **pictures}


def logits_of(model: Any, inputs: Mapping[str, torch.Tensor], *, device: str | torch.device = "cpu") -> torch.Tensor:
    """Logits [B, L, V] float32 on the CPU, in evaluation mode. Under ZeRO-3 every rank must call it."""
    was_training = model.training
    with torch.no_grad():
        placed = {name: tensor.to(device) for name, tensor in inputs.items()}
        logits = model.eval()(**placed, use_cache=False).logits
    model.train(was_training)
    return logits.float().cpu()
