"""One switch for attention kernels, and the packed-row attention that runs where flash-attn does not.

A packed row holds several samples, [1, L]; a token must see its own sample only. flash-attn takes the samples'
borders as `cu_seq_lens_q`. Elsewhere `mirage_varlen` lays samples of like length side by side in right-padded batches
and calls torch's fused SDPA once for each: causal attention never reaches the padding, so no mask tensor is needed.

The vision towers run the same implementation, and their pictures never see each other: InternViT's tiles are the rows
of a batch; Qwen2-VL's tower gives its own borders to flash-attn and calls any other implementation picture by picture.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.utils.import_utils import (
    KERNELS_MAX_VERSION,
    KERNELS_MIN_VERSION,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
)

from mirage.errors import UserError

PACKED_SDPA = "mirage_varlen"
# transformers' name -> (what people call it, its module, is it installed, GPU generations it has kernels for).
# flash-attn 2: Ampere and later. flash-attn 3: Ampere and Hopper (its setup.py builds sm80 and sm90a, nothing newer).
FLASH: dict[str, tuple[str, str, Any, tuple[int, int]]] = {
    "flash_attention_3": ("flash-attn 3", "flash_attn_interface", is_flash_attn_3_available, (8, 9)),
    "flash_attention_2": ("flash-attn 2", "flash_attn", is_flash_attn_2_available, (8, 99)),
}
# A sample joins a padded batch whose longest sample has at most this share, or so many tokens, more than it.
_PADDING_SHARE, _PADDING_TOKENS = 0.2, 64


def choose_attention(requested: str, *, device_type: str, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    """(transformers implementation name, the reason in words) for `model.attention`.

    `device_type` and `dtype` are where and in what the model will compute. Nothing is ever fetched unless
    `model.attention=kernels` asks for it. Raises `UserError` when what is asked for by name cannot run.
    """
    if requested in FLASH:
        why_not = _why_not(requested, device_type, dtype)
        if why_not is not None:
            raise UserError(f"model.attention={requested} cannot run: {why_not}. Use model.attention=auto")
        return requested, "asked for"
    if requested == "kernels":
        return _hub_build(device_type, dtype)
    if requested == "eager":
        return "eager", "asked for; slow, for comparison"
    if requested == "sdpa":
        return PACKED_SDPA, "asked for; torch SDPA over packed samples"
    if device_type != "cuda":
        return PACKED_SDPA, "torch SDPA over packed samples, because there is no GPU"
    problems = {name: _why_not(name, device_type, dtype) for name in FLASH}
    for name, problem in problems.items():
        if problem is None:
            return name, f"{FLASH[name][0]} is installed"
    # What keeps an installed package from running says more than that the other one is missing.
    installed = [problems[name] for name in FLASH if FLASH[name][2]()]
    why = "; ".join(dict.fromkeys(str(problem) for problem in installed)) or "flash-attn is not installed"
    return PACKED_SDPA, f"torch SDPA over packed samples, because {why}"


def attention_kernels(model: Any, requested: str, *, device_type: str, dtype: torch.dtype) -> dict[str, str]:
    """What a loaded model's language model and vision tower run, each with the reason, for the log of a run.

    `requested` is `model.attention`; `device_type` and `dtype` are as in `choose_attention`.
    """
    chosen, why = choose_attention(requested, device_type=device_type, dtype=dtype)
    parts = {"attention": model.config.text_config, "vision attention": model.config.vision_config}
    running = {part: config._attn_implementation for part, config in parts.items()}
    return {
        part: f"{name} ({why if name == chosen else f'in place of {chosen}, by transformers'})"
        for part, name in running.items()
    }


def _why_not(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the flash-attn package of that implementation cannot run; None where it can."""
    label, module, is_installed, generations = FLASH[name]
    problem = _no_flash_here(device_type, dtype, generations, label)
    if problem is not None:
        return problem
    if not is_installed():
        return f"{label} is not installed (pip install '.[gpu]' brings flash-attn 2)"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        # Built for another torch or another CUDA: undefined symbols, libraries that are not there.
        return f"{label} is installed and cannot be imported ({_first_line(error)}); build it for this torch"
    return None


def _no_flash_here(device_type: str, dtype: torch.dtype, generations: tuple[int, int], label: str) -> str | None:
    """Why no flash kernel can run on this device in this type; None where one can."""
    if device_type != "cuda":
        return "no GPU is present"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention computes in bf16 and the model is in {str(dtype).removeprefix('torch.')}"
    capability = _gpu_capability()
    if not generations[0] <= capability[0] <= generations[1]:
        return f"{label} has no kernels for this GPU (compute capability {capability[0]}.{capability[1]})"
    return None


def _gpu_capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _hub_build(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """A flash-attn build that the `kernels` package loads, from its cache or from the hub, where the user asks for it.

    transformers names the repositories of kernels-community and pins their major versions; `HF_HUB_OFFLINE=1` keeps to
    the cache and `LOCAL_KERNELS=REPOSITORY=FOLDER` takes a folder. Raises `UserError` when there is none.
    """
    problem = _no_flash_here(device_type, dtype, (8, 99), "flash-attn")
    if problem is None and not is_kernels_available():
        problem = f"it needs the package kernels >={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}, which is not installed"
    if problem is not None:
        raise UserError(f"model.attention=kernels cannot run: {problem}. Use model.attention=auto")
    major, minor = _gpu_capability()
    repository = FLASH_ATTN_KERNEL_FALLBACK["flash_attention_3" if major == 9 else "flash_attention_2"]
    try:
        lazy_import_flash_attention(repository)
    except Exception as error:  # the hub, the file system and the loader each raise their own kinds
        raise UserError(
            f"model.attention=kernels cannot run: {repository} could not be loaded ({_first_line(error)}). "
            "Use model.attention=auto"
        ) from error
    return repository, f"asked for; the hub's build for compute capability {major}.{minor}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def padded_positions(lengths: Sequence[int]) -> int:
    """Positions that `mirage_varlen` lays out for a packed row whose samples have these lengths, padding included."""
    return sum(num * longest for num, longest, _ in _groups(tuple(lengths)))


def _groups(lengths: tuple[int, ...]) -> list[tuple[int, int, list[int]]]:
    """Samples of like length: (how many, their longest, their numbers), longest group first."""
    groups: list[tuple[int, int, list[int]]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and groups[-1][1] - lengths[number] <= max(_PADDING_TOKENS, _PADDING_SHARE * groups[-1][1]):
            num, longest, members = groups[-1]
            groups[-1] = (num + 1, longest, [*members, number])
        else:
            groups.append((1, lengths[number], [number]))
    return groups


@lru_cache(maxsize=64)
def _layout(lengths: tuple[int, ...], device: torch.device) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """(groups as (samples, longest), the place of each token of the row among all groups' positions, [L] int64)."""
    places: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
    start = 0
    groups = _groups(lengths)
    for _, longest, members in groups:
        for number in members:
            places[number] = torch.arange(start, start + lengths[number])
            start += longest
    return [(num, longest) for num, longest, _ in groups], torch.cat(places).to(device)


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

    On the CPU, bf16 is computed in fp32, under autocast too: SDPA's bf16 backward there is 17 times slower than fp32's.
    """
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return packed_sdpa(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    dtype = value.dtype  # under autocast, rotary embedding leaves query and key in fp32
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
    return _grouped_sdpa(query, key, value, tuple(lengths), scaling=scaling, dropout=dropout).to(dtype), None


def _grouped_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Causal attention within each sample of a packed row: [1, heads, L, d] -> [1, L, heads, d]."""
    if query.device.type == "cuda" and query.dtype == torch.float32 and query.shape[1] != key.shape[1]:
        # In fp32 no fused CUDA kernel takes fewer key heads than query heads; the one left makes all scores.
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    groups, places = _layout(lengths, query.device)
    sizes = [num * longest for num, longest in groups]

    def lay_out(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Padding is zeros, not another sample's tokens: not even a NaN gets from one sample into another's gradient.
        tokens = tensor[0].transpose(0, 1)
        # index_put keeps the places for its gradient, where index_copy keeps the tokens too.
        return tokens.new_zeros(sum(sizes), *tokens.shape[1:]).index_put_((places,), tokens).split(sizes)

    outputs = []
    for group, *parts in zip(groups, *(lay_out(tensor) for tensor in (query, key, value))):
        queries, keys, values = (part.unflatten(0, group).transpose(1, 2) for part in parts)
        output = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    laid = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return laid.index_select(0, places).unsqueeze(0)


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
