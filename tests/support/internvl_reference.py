"""The original InternVL2.5 computation on published tensors, written out plainly: what converted models are held to.

Independent of transformers and of MIRage. Follows upstream `modeling_intern_vit.py`, `modeling_internlm2.py` and
`modeling_internvl_chat.py`; everything float32, one sequence, no cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

Tensors = Mapping[str, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def inverse_frequencies(config: Mapping[str, Any], length: int) -> tuple[torch.Tensor, float]:
    """InternLM2's rotary frequencies for a forward of `length` tokens, and the divisor of positions."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    base, scaling = config["rope_theta"], config.get("rope_scaling") or {"type": "none", "factor": 1.0}
    factor, limit = scaling["factor"], config["max_position_embeddings"]
    if scaling["type"] == "dynamic" and length > limit:
        base = base * ((factor * length / limit) - (factor - 1)) ** (dim / (dim - 2))
    divisor = factor if scaling["type"] == "linear" else 1.0
    return 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim)), divisor


def rotate(x: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Rotary positions 0..L-1 on [heads, L, dim]."""
    frequencies, divisor = inverse_frequencies(config, x.shape[1])
    angles = torch.outer(torch.arange(x.shape[1]).float() / divisor, frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


def language_logits(tensors: Tensors, config: Mapping[str, Any], embeddings: torch.Tensor) -> torch.Tensor:
    """InternLM2: [L, H] embeddings -> [L, V] logits."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    groups, dim, eps = heads // kv_heads, config["hidden_size"] // heads, config["rms_norm_eps"]
    x, length = embeddings, len(embeddings)
    causal = torch.full((length, length), -math.inf).triu(1)
    for layer in range(config["num_hidden_layers"]):
        name = f"language_model.model.layers.{layer}."
        y = rms_norm(x, tensors[name + "attention_norm.weight"], eps)
        y = F.linear(y, tensors[name + "attention.wqkv.weight"], tensors.get(name + "attention.wqkv.bias"))
        y = y.view(length, kv_heads, groups + 2, dim)
        query = rotate(y[:, :, :groups].reshape(length, heads, dim).transpose(0, 1), config)
        key = rotate(y[:, :, groups].transpose(0, 1), config).repeat_interleave(groups, dim=0)
        value = y[:, :, groups + 1].transpose(0, 1).repeat_interleave(groups, dim=0)
        weights = (query @ key.transpose(1, 2) / math.sqrt(dim) + causal).softmax(dim=-1)
        y = (weights @ value).transpose(0, 1).reshape(length, heads * dim)
        x = x + F.linear(y, tensors[name + "attention.wo.weight"], tensors.get(name + "attention.wo.bias"))
        y = rms_norm(x, tensors[name + "ffn_norm.weight"], eps)
        gate = F.silu(F.linear(y, tensors[name + "feed_forward.w1.weight"]))
        y = gate * F.linear(y, tensors[name + "feed_forward.w3.weight"])
        x = x + F.linear(y, tensors[name + "feed_forward.w2.weight"])
    x = rms_norm(x, tensors["language_model.model.norm.weight"], eps)
    return F.linear(x, tensors["language_model.output.weight"])


def vision_hidden(tensors: Tensors, config: Mapping[str, Any], pixels: torch.Tensor, select_layer: int) -> torch.Tensor:
    """InternViT: [T, 3, S, S] -> hidden states [T, 1 + P, H] of the selected layer."""
    name, eps = "vision_model.embeddings.", config["layer_norm_eps"]
    patches = F.conv2d(
        pixels,
        tensors[name + "patch_embedding.weight"],
        tensors[name + "patch_embedding.bias"],
        stride=config["patch_size"],
    )
    patches = patches.flatten(2).transpose(1, 2)
    x = torch.cat((tensors[name + "class_embedding"].expand(len(pixels), 1, -1), patches), dim=1)
    x = x + tensors[name + "position_embedding"]
    states = [x]
    for layer in range(config["num_hidden_layers"]):
        name = f"vision_model.encoder.layers.{layer}."
        x = (
            x
            + vision_attention(tensors, config, name, norm(tensors, config, name + "norm1", x, eps))
            * tensors[name + "ls1"]
        )
        y = norm(tensors, config, name + "norm2", x, eps)
        y = F.gelu(F.linear(y, tensors[name + "mlp.fc1.weight"], tensors[name + "mlp.fc1.bias"]))
        x = x + F.linear(y, tensors[name + "mlp.fc2.weight"], tensors[name + "mlp.fc2.bias"]) * tensors[name + "ls2"]
        states.append(x)
    return states[select_layer]


def norm(tensors: Tensors, config: Mapping[str, Any], name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    if config["norm_type"] == "rms_norm":
        return rms_norm(x, tensors[name + ".weight"], eps)
    return F.layer_norm(x, x.shape[-1:], tensors[name + ".weight"], tensors[name + ".bias"], eps)


def vision_attention(tensors: Tensors, config: Mapping[str, Any], name: str, x: torch.Tensor) -> torch.Tensor:
    heads = config["num_attention_heads"]
    tiles, length, hidden = x.shape
    y = F.linear(x, tensors[name + "attn.qkv.weight"], tensors.get(name + "attn.qkv.bias"))
    query, key, value = y.view(tiles, length, 3, hidden).unbind(2)
    if config["qk_normalization"]:
        query = rms_norm(query, tensors[name + "attn.q_norm.weight"], config["layer_norm_eps"])
        key = rms_norm(key, tensors[name + "attn.k_norm.weight"], config["layer_norm_eps"])
    query, key, value = (part.view(tiles, length, heads, -1).transpose(1, 2) for part in (query, key, value))
    weights = (query @ key.transpose(2, 3) / math.sqrt(hidden // heads)).softmax(dim=-1)
    y = (weights @ value).transpose(1, 2).reshape(tiles, length, hidden)
    return F.linear(y, tensors[name + "attn.proj.weight"], tensors[name + "attn.proj.bias"])


def vision_features(tensors: Tensors, config: Mapping[str, Any], pixels: torch.Tensor) -> torch.Tensor:
    """Projected features [T, P/4, H] of tiles: class token dropped, pixel-unshuffle by 2 (`ps_version` v2), mlp1."""
    x = vision_hidden(tensors, config["vision_config"], pixels, config["select_layer"])[:, 1:]
    edge = math.isqrt(x.shape[1])
    x = x.view(len(x), edge // 2, 2, edge // 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(len(x), (edge // 2) ** 2, -1)
    x = F.layer_norm(x, x.shape[-1:], tensors["mlp1.0.weight"], tensors["mlp1.0.bias"])
    x = F.gelu(F.linear(x, tensors["mlp1.1.weight"], tensors["mlp1.1.bias"]))
    return F.linear(x, tensors["mlp1.3.weight"], tensors["mlp1.3.bias"])


def logits(
    tensors: Tensors, config: Mapping[str, Any], ids: torch.Tensor, *, pixels: torch.Tensor | None, image_token_id: int
) -> torch.Tensor:
    """[L] ids and [T, 3, S, S] pixels -> [L, V] logits."""
    embeddings = tensors["language_model.model.tok_embeddings.weight"][ids]
    if pixels is not None:
        embeddings = embeddings.clone()
        embeddings[ids == image_token_id] = vision_features(tensors, config, pixels).flatten(0, 1)
    return language_logits(tensors, config["llm_config"], embeddings)
