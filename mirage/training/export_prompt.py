"""The fixed prompt on which an export is compared with the model in memory."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from mirage.data.row import ImagePart, Message, TextPart
from mirage.models.adapter import ModelAdapter

QUESTION = "What does the picture show? Answer in one sentence."


def export_prompt(adapter: ModelAdapter) -> dict[str, torch.Tensor]:
    """Model inputs of one picture and one question: ids [1, L] and pixels float32, on the CPU. Always the same."""
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    channels = (
        np.broadcast_to(ramp, (64, 64)),
        np.broadcast_to(ramp[:, None], (64, 64)),
        np.full((64, 64), 96, np.uint8),
    )
    image = Image.fromarray(np.stack(channels, axis=-1))
    picture = adapter.preprocess(image, num_images=1)
    message = Message(role="user", content=(ImagePart(index=0), TextPart(text=QUESTION)))
    rendered = adapter.render([message], [picture.num_tokens], generation=True)
    input_ids = torch.tensor([rendered.input_ids])
    return {"input_ids": input_ids, **adapter.token_inputs(input_ids), **adapter.picture_inputs([picture])}
