"""One switch for attention kernels, and the packed-row attention that runs where flash-attn does not.

A packed row holds several samples, [1, L]; a token must see its own sample only. flash-attn takes the samples'
borders as `cu_seq_lens_q`. Elsewhere `mirage_varlen` lays the samples side by side in a right-padded batch and calls
torch's fused SDPA once: causal attention never reaches the padding, so no mask tensor is needed.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mirage.errors import UserError

PACKED_SDPA = "mirage_varlen"


def choose_attention(requested: str, *, device_type: str) -> tuple[str, str]:
    """(transformers implementation name, the reason in words) for `model.attention`.

    Raises `UserError` when flash attention is asked for by name and cannot run.
    """
    flash = importlib.util.find_spec("flash_attn") is not None
    flash3 = importlib.util.find_spec("flash_attn_interface") is not None
    if requested in ("flash_attention_2", "flash_attention_3"):
        present = flash if requested == "flash_attention_2" else flash3
        if device_type != "cuda" or not present:
            missing = (
                "no GPU is present" if device_type != "cuda" else "its package is not installed (pip install .[gpu])"
            )
            raise UserError(f"model.attention={requested} cannot run: {missing}. Use model.attention=auto")
        return requested, "asked for"
    if requested == "eager":
        return "eager", "asked for; slow, for comparison"
    if requested == "sdpa":
        return PACKED_SDPA, "asked for; torch SDPA over packed samples"
    if device_type == "cuda" and flash3:
        return "flash_attention_3", "flash-attn 3 is installed"
    if device_type == "cuda" and flash:
        return "flash_attention_2", "flash-attn 2 is installed"
    why = "no GPU" if device_type != "cuda" else "flash-attn is not installed"
    return PACKED_SDPA, f"torch SDPA over packed samples, because {why}"


@lru_cache(maxsize=64)
def _padded_index(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps between a packed row and a padded batch: [S, M] source positions (0 where padded) and [L] flat targets."""
    longest = max(lengths)
    source = torch.zeros(len(lengths), longest, dtype=torch.long)
    target, start = [], 0
    for row, length in enumerate(lengths):
        source[row, :length] = torch.arange(start, start + length)
        target.append(torch.arange(length) + row * longest)
        start += length
    return source, torch.cat(target)


def _segment_lengths(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]
) -> list[int]:
    """Lengths of the samples in a packed row; one length when the call is not a packed row."""
    length = query.shape[2]
    whole = [length]
    if query.shape[0] != 1 or key.shape[2] != length or length == 1 or not getattr(module, "is_causal", True):
        return whole
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    if cu_seq_lens is not None:
        return cu_seq_lens.diff().tolist()
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        return whole
    starts = (position_ids.view(-1, length)[0] == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], length])] if starts else whole


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers attention function: query [B, heads, L, d], key and value [B, kv_heads, K, d] -> [B, L, heads, d].

    On the CPU, bf16 is computed in fp32: SDPA's bf16 backward there is 17 times slower than its fp32 one.
    """
    dtype = query.dtype
    if query.device.type == "cpu" and dtype != torch.float32:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    lengths = _segment_lengths(module, query, key, kwargs) if attention_mask is None else [query.shape[2]]
    if len(lengths) == 1:
        kwargs.pop("is_causal", None)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output.to(dtype), None
    source, target = (index.to(query.device) for index in _padded_index(tuple(lengths)))
    queries, keys, values = (tensor[0].transpose(0, 1)[source].transpose(1, 2) for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    flat = output.transpose(1, 2).flatten(0, 1)
    return flat[target].unsqueeze(0).to(dtype), None


def _packed_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """No mask for packed or plain rows (borders and causality are the kernel's work); SDPA's own for padded batches."""
    continues_a_cache = 1 < q_length != kv_length
    if not continues_a_cache and (attention_mask is None or bool(attention_mask.all())):
        return None
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _packed_mask)
