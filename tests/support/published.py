"""Small random checkpoints in the published InternVL layout, for tests of conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mirage.models.internvl_checkpoint import key_map
from mirage.models.internvl_config import native_config

FIXTURES = Path(__file__).parent.parent / "fixtures" / "internvl2_5_upstream"


def small_config(
    *, llm: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any
) -> dict[str, Any]:
    """The reference config with some fields changed."""
    config = json.loads((FIXTURES / "model" / "config.json").read_text())
    config["llm_config"].update(llm or {})
    config["vision_config"].update(vision or {})
    return config | top


def write_published(
    folder: Path, config: dict[str, Any], *, num_shards: int = 1, dtype: torch.dtype = torch.float32
) -> None:
    """Write config and random weights. Scales are large enough for every part to matter in the logits."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    native = native_config(config, image_token_id=5, tied=False, where=folder)
    keys = key_map(native, language=config["llm_config"]["architectures"][0])
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for entry in keys.entries:
        values = torch.randn(keys.published_shape(entry), generator=generator) * 0.15
        tensors[entry.published] = (values + (values.dim() == 1)).to(dtype)
    names = sorted(tensors)
    files = [f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" for number in range(num_shards)]
    weight_map = {name: files[index % num_shards] for index, name in enumerate(names)}
    for file in files:
        shard = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(shard, str(folder / file), metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
