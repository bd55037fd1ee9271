"""Small random checkpoints in the published InternVL layout, for tests of conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent.parent / "fixtures" / "internvl2_5_upstream"
Shapes = dict[str, tuple[int, ...]]


def small_config(
    *, llm: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any
) -> dict[str, Any]:
    """The reference config with some fields changed."""
    config = json.loads((FIXTURES / "model" / "config.json").read_text())
    config["llm_config"].update(llm or {})
    config["vision_config"].update(vision or {})
    return config | top


def vision_shapes(config: dict[str, Any], language_size: int) -> Shapes:
    """Tensors of InternViT and the projector, as upstream's modules name them."""
    size, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    root = "vision_model.embeddings."
    shapes: Shapes = {
        root + "class_embedding": (1, 1, size),
        root + "position_embedding": (1, (config["image_size"] // patch) ** 2 + 1, size),
        root + "patch_embedding.weight": (size, 3, patch, patch),
        root + "patch_embedding.bias": (size,),
    }
    for layer in range(config["num_hidden_layers"]):
        root = f"vision_model.encoder.layers.{layer}."
        shapes |= {root + "ls1": (size,), root + "ls2": (size,), root + "attn.qkv.weight": (3 * size, size)}
        shapes |= {root + f"norm{number}.weight": (size,) for number in (1, 2)}
        if config["norm_type"] == "layer_norm":
            shapes |= {root + f"norm{number}.bias": (size,) for number in (1, 2)}
        if config["qk_normalization"]:
            shapes |= {root + "attn.q_norm.weight": (size,), root + "attn.k_norm.weight": (size,)}
        if config["qkv_bias"]:
            shapes[root + "attn.qkv.bias"] = (3 * size,)
        shapes |= {root + "attn.proj.weight": (size, size), root + "attn.proj.bias": (size,)}
        shapes |= {root + "mlp.fc1.weight": (inner, size), root + "mlp.fc1.bias": (inner,)}
        shapes |= {root + "mlp.fc2.weight": (size, inner), root + "mlp.fc2.bias": (size,)}
    shapes |= {"mlp1.0.weight": (4 * size,), "mlp1.0.bias": (4 * size,)}
    shapes |= {"mlp1.1.weight": (language_size, 4 * size), "mlp1.1.bias": (language_size,)}
    return shapes | {"mlp1.3.weight": (language_size, language_size), "mlp1.3.bias": (language_size,)}


def language_shapes(config: dict[str, Any]) -> Shapes:
    """Tensors of the language model: InternLM2's own names, or transformers' for the others."""
    size, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or size // heads
    architecture, top = config["architectures"][0], "language_model.model."
    internlm2 = architecture == "InternLM2ForCausalLM"
    shapes: Shapes = {
        top + ("tok_embeddings.weight" if internlm2 else "embed_tokens.weight"): (vocabulary, size),
        "language_model." + ("output.weight" if internlm2 else "lm_head.weight"): (vocabulary, size),
        top + "norm.weight": (size,),
    }
    for layer in range(config["num_hidden_layers"]):
        root = f"{top}layers.{layer}."
        if internlm2:
            rows = (heads + 2 * kv_heads) * dim
            shapes |= {root + "attention.wqkv.weight": (rows, size), root + "attention.wo.weight": (size, heads * dim)}
            if config["bias"]:
                shapes |= {root + "attention.wqkv.bias": (rows,), root + "attention.wo.bias": (size,)}
            shapes |= {root + f"feed_forward.w{number}.weight": (inner, size) for number in (1, 3)}
            shapes[root + "feed_forward.w2.weight"] = (size, inner)
            shapes |= {root + "attention_norm.weight": (size,), root + "ffn_norm.weight": (size,)}
            continue
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[root + f"self_attn.{name}_proj.weight"] = (count * dim, size)
            if architecture == "Qwen2ForCausalLM":
                shapes[root + f"self_attn.{name}_proj.bias"] = (count * dim,)
        if architecture == "Qwen3ForCausalLM":
            shapes |= {root + f"self_attn.{name}_norm.weight": (dim,) for name in "qk"}
        shapes |= {root + "self_attn.o_proj.weight": (size, heads * dim), root + "mlp.down_proj.weight": (size, inner)}
        shapes |= {root + "mlp.gate_proj.weight": (inner, size), root + "mlp.up_proj.weight": (inner, size)}
        shapes |= {root + "input_layernorm.weight": (size,), root + "post_attention_layernorm.weight": (size,)}
    return shapes


def write_published(
    folder: Path, config: dict[str, Any], *, num_shards: int = 1, dtype: torch.dtype = torch.float32
) -> None:
    """Write config and random weights. Scales are large enough for every part to matter in the logits."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = vision_shapes(config["vision_config"], config["llm_config"]["hidden_size"])
    shapes |= language_shapes(config["llm_config"])
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        values = torch.randn(shape, generator=generator) * 0.15
        tensors[name] = (values + ("norm" in name and name.endswith("weight"))).to(dtype)
    files = [f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" for number in range(num_shards)]
    weight_map = {name: files[index % num_shards] for index, name in enumerate(tensors)}
    for file in files:
        shard = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(shard, str(folder / file), metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
