"""Output head and cross-entropy in one pass: the gradient is made beside the loss, one chunk of logits at a time.

The head's product is computed once (checkpointed chunks compute it twice), and no chunk's logits outlive it. The same
idea as Liger's fused linear cross-entropy (arXiv:2410.10989, section 3.2), in plain PyTorch for any device, and with a
weight for each token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.utils import ModulesToSaveWrapper
from torch.autograd.function import once_differentiable

from mirage.errors import UserError

# 16 bytes in the narrowest type that is trained in, bf16.
_ALIGNED_ELEMENTS = 8


class HeadLoss(NamedTuple):
    """`total` scalar fp32, differentiable: sum of weight x loss. Per position, not: `losses` [N] fp32, `right` [N]."""

    total: torch.Tensor
    losses: torch.Tensor
    right: torch.Tensor


def choose_kernel(requested: str, *, device_type: str) -> tuple[str, str]:
    """("torch" or "liger", the reason in words) for `train.loss_kernel`. Raises `UserError` where liger cannot run.

    auto is torch: on an H100 with both published heads Liger took 1.1 to 12 times as long (docs/training.md), and it
    rounds token weights to the model's type, which leaves 1 as it is and other weights up to 0.4 % off in bf16. It
    holds fewer logits at a time, so it is there by name for runs short of memory.
    """
    if requested != "liger":
        return "torch", "asked for" if requested == "torch" else "faster than liger-kernel"
    installed = importlib.util.find_spec("liger_kernel") is not None
    if device_type != "cuda" or not installed:
        missing = "no GPU is present" if device_type != "cuda" else "liger-kernel is not installed (pip install .[gpu])"
        raise UserError(f"train.loss_kernel=liger cannot run: {missing}. Use train.loss_kernel=auto")
    return "liger", "asked for"


def head_loss(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor,
    *,
    num_chunks: int = 1,
    kernel: str = "torch",
) -> HeadLoss:
    """Weighted cross-entropy of `head` on hidden [N, H], target [N] int64, weights [N] fp32; logits of N / num_chunks.

    Runs inside a call of `head`, so that hooks on it (ZeRO-3 gathers its weight, and takes its gradient) see one
    ordinary forward and backward pass. Gradients go to `hidden` and to the head's weight, in their own types.
    """

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        keep = torch.is_grad_enabled()
        return _HeadLoss.apply(hidden, head.weight, target, weights, num_chunks, kernel, keep)  # type: ignore[no-any-return]

    return HeadLoss(*_call_as(head, forward, hidden))


def plain_linear(head: torch.nn.Module) -> torch.nn.Linear | None:
    """The linear layer that `head` is, or that peft trains in its place; None where a head computes more than that."""
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]]
    return head if type(head) is torch.nn.Linear and head.bias is None else None


def _call_as(module: torch.nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """`module(*args)` with another forward: its hooks run as for its own."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        return module(*args)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


class _HeadLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass for an upstream gradient of 1, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        token_weights: torch.Tensor,
        num_chunks: int,
        kernel: str,
        keep_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        compute = _liger_loss if kernel == "liger" and len(target) else _chunked_loss
        wanted = keep_gradients and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        losses, right, grad_hidden, grad_weight = compute(
            hidden,
            weight,
            target,
            token_weights,
            num_chunks=num_chunks,
            with_gradients=wanted,
            with_weight=wanted and ctx.needs_input_grad[1],
        )
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses, right)
        return (losses * token_weights).sum(), losses, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the head's gradients were used up by an earlier backward pass through this loss")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                gradient.mul_(upstream)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    num_chunks: int,
    with_gradients: bool,
    with_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(losses [N], right [N], gradient of hidden [N, H], gradient of weight [V, H]); one fp32 [N / chunks, V] alive."""
    grad_hidden = torch.empty_like(hidden) if with_gradients else None
    grad_weight = torch.zeros_like(weight) if with_weight else None
    losses = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
    right = torch.empty(len(target), dtype=torch.bool, device=hidden.device)
    size = max(1, -(-len(target) // num_chunks))
    blocks = _vocabulary_blocks(len(weight), device_type=weight.device.type)
    for start in range(0, len(target), size):
        part = slice(start, start + size)
        chosen, scale = target[part, None], token_weights[part, None].float()
        # In the model's type the rows' own places are used twice, for logits and for their gradient.
        rows = _aligned_rows(len(target[part]), weight)
        # In place from here on: logits, then shifted, exponentials, weighted probabilities, their gradient.
        for entries in blocks:
            torch.mm(hidden[part], weight[entries].t(), out=rows[:, entries])
        logits = rows.float()
        highest, predicted = logits.max(-1, keepdim=True)
        right[part] = (predicted == chosen).squeeze(1)
        at_target = logits.sub_(highest).gather(1, chosen)
        normalizer = logits.exp_().sum(-1, keepdim=True)
        losses[part] = (normalizer.log() - at_target).squeeze(1)
        if grad_hidden is not None:
            gradient = rows.copy_(logits.mul_(scale / normalizer).scatter_add_(1, chosen, -scale))
            torch.mm(gradient[:, blocks[0]], weight[blocks[0]], out=grad_hidden[part])
            for entries in blocks[1:]:
                grad_hidden[part].addmm_(gradient[:, entries], weight[entries])
            if grad_weight is not None:
                for entries in blocks:
                    grad_weight[entries].addmm_(gradient[:, entries].t(), hidden[part])
        del logits, rows
    return losses, right, grad_hidden, grad_weight


def _aligned_rows(num_rows: int, weight: torch.Tensor) -> torch.Tensor:
    """Room for logits [num_rows, V] whose rows all start at a multiple of 16 bytes, as a GPU loads them."""
    width = -(-len(weight) // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
    return weight.new_empty(num_rows, width)[:, : len(weight)]


def _vocabulary_blocks(vocab_size: int, *, device_type: str) -> list[slice]:
    """The vocabulary as blocks to multiply one by one: on a GPU as many entries as 16 bytes divide, then the rest.

    InternVL2.5-8B's vocabulary is odd (92,553), and cuBLAS has only slow kernels for a product with such a side: on an
    H100 the three products of 3,072 positions took 20.7, 17.3 and 5.7 ms in bf16, and in two blocks 2.9 ms each.
    """
    rest = vocab_size % _ALIGNED_ELEMENTS if device_type == "cuda" else 0
    whole = slice(0, vocab_size - rest)
    return [whole, slice(vocab_size - rest, vocab_size)] if rest and vocab_size > rest else [slice(0, vocab_size)]


def _liger_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    num_chunks: int,
    with_gradients: bool,
    with_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`_chunked_loss` by Liger's Triton kernels, which choose their own chunks (logits as large as `hidden`)."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    losses, _, _, predicted, grad_hidden, grad_weight, _ = fused_linear_cross_entropy_forward(
        hidden.contiguous(),
        weight,
        target,
        reduction="none",
        return_predicted_tokens=True,
        token_grad_output=token_weights,
        compute_gradients=with_gradients,
        weight_requires_grad=with_weight,
    )
    return losses, predicted == target, grad_hidden if with_gradients else None, grad_weight
