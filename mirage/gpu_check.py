"""`python -m mirage.gpu_check`: what only a GPU runs, at the published models' sizes, against plain fp32 arithmetic.

Each check takes one layer's sizes and a device. Off a GPU the same functions run small, which is how they are tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import InternVLVisionConfig, LlamaConfig, Qwen2VLTextConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention, Qwen2VLRotaryEmbedding, VisionAttention

from mirage.errors import UserError
from mirage.models.attention import FLASH, choose_attention
from mirage.tracking.terminal_text import SafeConsole
from mirage.training.head_loss import choose_kernel, head_loss

# Largest relative error against fp32. bf16 has 8 bits (one rounding is 2^-9); a layer rounds about ten times in a row,
# and a token that sees another sample, or a wrong weight, is off by 1e-1 and more. fp32: room for TF32 kernels.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
_GIB = 1 << 30
_ATTENTION_NAMES = {"sdpa": "torch SDPA", "kernels": "hub build"}


@dataclass(frozen=True)
class AttentionSizes:
    """One attention layer of a published model, and the lengths of the samples (or pictures) in its packed row."""

    name: str
    kind: Literal["llama", "qwen2_vl", "internvit", "qwen2_vl_tower"]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    lengths: tuple[int, ...]

    @property
    def text(self) -> str:
        heads = f"{self.num_heads}" if self.num_heads == self.num_kv_heads else f"{self.num_heads}/{self.num_kv_heads}"
        return f"{self.hidden_size} wide, {heads} heads, {sum(self.lengths):,} tokens in {len(self.lengths)}"


@dataclass(frozen=True)
class HeadSizes:
    """An output head, and how many supervised positions go through it."""

    name: str
    hidden_size: int
    vocab_size: int
    num_positions: int

    @property
    def text(self) -> str:
        return f"{self.hidden_size} x {self.vocab_size:,}, {self.num_positions:,} positions"


@dataclass(frozen=True)
class Result:
    """One row of the table. `error` None: it did not run, and `note` says why; `failed` when it ran and is wrong."""

    path: str
    sizes: str
    dtype: str
    note: str
    error: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    failed: bool = False


@dataclass(frozen=True)
class CheckSizes:
    """What to check: attention layers, heads, and (hidden size, feed-forward size) of blocks by name."""

    attention: tuple[AttentionSizes, ...]
    heads: tuple[HeadSizes, ...]
    blocks: Mapping[str, tuple[int, int]]
    num_block_tokens: int
    dtype: torch.dtype = torch.bfloat16


# A row of 8,192 tokens as multi-image samples fill it: long ones, short ones, and one of a few tokens.
_ROW = (3072, 2048, 1536, 1024, 400, 96, 16)
# InternVL2.5-8B (InternLM2 and InternViT-300M: 1,025 positions a tile) and Qwen2-VL-7B, from their config.json.
PUBLISHED = CheckSizes(
    attention=(
        AttentionSizes("InternVL2.5-8B", "llama", 4096, 32, 8, _ROW),
        AttentionSizes("Qwen2-VL-7B", "qwen2_vl", 3584, 28, 4, _ROW),
        AttentionSizes("InternViT-300M", "internvit", 1024, 16, 16, (1025,) * 8),
        AttentionSizes("Qwen2-VL-7B tower", "qwen2_vl_tower", 1280, 16, 16, (2816, 2304, 1600, 1024, 384, 64)),
    ),
    heads=(
        HeadSizes("InternVL2.5-8B head", 4096, 92_553, 2048),
        HeadSizes("Qwen2-VL-7B head", 3584, 151_936, 2048),
    ),
    blocks={"InternVL2.5-8B": (4096, 14_336), "Qwen2-VL-7B": (3584, 18_944)},
    num_block_tokens=2048,
)


def check_attention(
    sizes: AttentionSizes, implementation: str, *, device: str, dtype: torch.dtype, path: str | None = None
) -> Result:
    """One attention layer over a packed row: outputs and gradients against each sample alone, eager, in fp32.

    Compared are each sample's outputs [n, H] and input gradients [n, H], and the weights' gradients. Then the first
    sample is drawn anew, which must leave every other sample's outputs as they were, to the bit.
    """
    module = _attention(sizes, implementation).to(device, dtype)
    exact = _attention(sizes, "eager").to(device, torch.float32)
    exact.load_state_dict(module.state_dict())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, sum(sizes.lengths), sizes.hidden_size, generator=generator).to(device, dtype)
    hidden, upstream, other = drawn.unbind(0)

    def step() -> list[torch.Tensor]:
        return _with_gradients(module, partial(_attend, module, sizes, lengths=sizes.lengths), hidden, upstream)

    found, seconds, peak = _measure(step, device)
    rows, gradients = (tensor.float().split(sizes.lengths) for tensor in (hidden, upstream))
    alone = [
        _with_gradients(exact, partial(_attend, exact, sizes, lengths=(len(row),)), row, gradient)
        for row, gradient in zip(rows, gradients)
    ]
    weights = [torch.stack(parts).sum(0) for parts in zip(*(part[2:] for part in alone))]
    pairs = [pair for n in (0, 1) for pair in zip(found[n].split(sizes.lengths), [part[n] for part in alone])]
    error = max(_distance(a, b) for a, b in [*pairs, *zip(found[2:], weights)])
    leak = _leak(module, sizes, hidden, other)
    result = _judge(path or implementation, sizes, dtype, error, seconds, peak)
    if leak > 0:
        return replace(result, note=f"LEAK of {leak:.1e} between samples", failed=True)
    return result


def _leak(module: Any, sizes: AttentionSizes, hidden: torch.Tensor, other: torch.Tensor) -> float:
    """How far the outputs of all samples but the first move when the first is another one; 0 where they are apart."""
    first = sizes.lengths[0]
    with torch.no_grad():
        before = _attend(module, sizes, hidden, lengths=sizes.lengths)[first:]
        after = _attend(module, sizes, torch.cat([other[:first], hidden[first:]]), lengths=sizes.lengths)[first:]
    return float((after - before).abs().max())


def _attention(sizes: AttentionSizes, implementation: str) -> Any:
    """The transformers module of one attention layer; weights such that queries and keys have a spread of about 1."""
    heads: dict[str, Any] = {"num_attention_heads": sizes.num_heads, "attn_implementation": implementation}
    text = {**heads, "hidden_size": sizes.hidden_size, "num_key_value_heads": sizes.num_kv_heads}
    text |= {"intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8, "max_position_embeddings": 32_768}
    if sizes.kind == "llama":
        module: Any = LlamaAttention(LlamaConfig(**text), 0)
    elif sizes.kind == "qwen2_vl":
        half = sizes.hidden_size // sizes.num_heads // 2
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}
        module = Qwen2VLAttention(Qwen2VLTextConfig(**text, rope_parameters=rope), 0)
    elif sizes.kind == "internvit":
        config = InternVLVisionConfig(**heads, hidden_size=sizes.hidden_size, attention_bias=True)
        module = InternVLVisionAttention(config)
    else:
        tower = {"embed_dim": sizes.hidden_size, "num_heads": sizes.num_heads, "attn_implementation": implementation}
        module = VisionAttention(Qwen2VLVisionConfig(**tower))
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 1.3 / sizes.hidden_size**0.5
    return module.train()


def _attend(module: Any, sizes: AttentionSizes, row: torch.Tensor, *, lengths: Sequence[int]) -> torch.Tensor:
    """[L, H] -> [L, H], given to the module as a model gives it: borders, positions that restart, no mask."""
    borders = torch.tensor([0, *lengths], device=row.device).cumsum(0).int()
    positions = torch.cat([torch.arange(length, device=row.device) for length in lengths])
    if sizes.kind == "internvit":
        return module(row.unflatten(0, (len(lengths), lengths[0])))[0].flatten(0, 1)
    head_dim = sizes.hidden_size // sizes.num_heads
    if sizes.kind == "qwen2_vl_tower":
        rates = 1e4 ** -torch.linspace(0, 1, head_dim // 2, device=row.device)
        angles = (positions[:, None] * rates).repeat(1, 2)
        return module(row, cu_seqlens=borders, position_embeddings=(angles.cos(), angles.sin()))
    rope = LlamaRotaryEmbedding if sizes.kind == "llama" else Qwen2VLRotaryEmbedding
    ids = positions[None] if sizes.kind == "llama" else positions[None, None].expand(3, 1, -1)
    kwargs: dict[str, Any] = {"position_embeddings": rope(module.config).to(row.device)(row[None], ids)}
    kwargs["attention_mask"] = None
    if module.config._attn_implementation == "eager":
        # Eager adds its mask; the reference has one sample in a row, so that causality is all there is to it.
        full = torch.full((len(row), len(row)), torch.finfo(row.dtype).min, device=row.device, dtype=row.dtype)
        kwargs["attention_mask"] = full.triu(1)[None, None]
    kwargs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    kwargs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return module(row[None], position_ids=positions[None], **kwargs)[0][0]


def check_head_loss(sizes: HeadSizes, kernel: str, *, device: str, dtype: torch.dtype) -> Result:
    """The fused head and loss by `kernel` against `cross_entropy` of all logits in fp32: losses and both gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sizes.vocab_size, sizes.hidden_size, generator=generator) / sizes.hidden_size**0.5
    head = torch.nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False, device=device, dtype=dtype)
    head.weight.data.copy_(weight)
    hidden = torch.randn(sizes.num_positions, sizes.hidden_size, generator=generator).to(device, dtype)
    target = torch.randint(0, sizes.vocab_size, (sizes.num_positions,), generator=generator).to(device)
    # Liger rounds weights to the model's type (see `choose_kernel`), so it is asked for weights that keep their value.
    weights = torch.ones(sizes.num_positions, device=device)
    if kernel == "torch":
        weights = (torch.rand(sizes.num_positions, generator=generator) + 0.5).to(device)

    def step() -> list[torch.Tensor]:
        inputs = hidden.clone().requires_grad_()
        head.weight.grad = None
        found = head_loss(head, inputs, target, weights, num_chunks=4, kernel=kernel)
        (found.total * 0.37).backward()
        return [found.losses, inputs.grad, head.weight.grad]  # type: ignore[list-item]

    found, seconds, peak = _measure(step, device)
    exact_hidden, exact_weight = hidden.float().requires_grad_(), head.weight.detach().float().requires_grad_()
    losses = F.cross_entropy(F.linear(exact_hidden, exact_weight), target, reduction="none")
    ((losses * weights).sum() * 0.37).backward()
    error = max(_distance(a, b) for a, b in zip(found, (losses.detach(), exact_hidden.grad, exact_weight.grad)))  # type: ignore[arg-type]
    return _judge(f"head loss, {kernel}", sizes, dtype, error, seconds, peak)


def check_optimizer(name: str, num_parameters: int, *, device: str, dtype: torch.dtype) -> Result:
    """Three AdamW steps as training takes them (fp32 master weights, `dtype` weights from them), against fp64.

    The reference is Loshchilov and Hutter's algorithm 2 (arXiv:1711.05101), written out. The error of an update is over
    the update's own size; the weights must be the reference's, rounded, but for where fp32 falls on the other side.
    """
    rate, betas, eps, decay = 1e-3, (0.9, 0.95), 1e-8, 0.05
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(num_parameters, generator=generator).mul_(0.02).to(device)
    gradients = [torch.randn(num_parameters, generator=generator).mul_(1e-3).to(device) for _ in range(3)]
    master, weights = start.clone().requires_grad_(), start.to(dtype, copy=True)
    optimizer = torch.optim.AdamW([master], lr=rate, betas=betas, eps=eps, weight_decay=decay)

    def step() -> list[torch.Tensor]:
        master.data.copy_(start)
        optimizer.state.clear()
        for gradient in gradients:
            master.grad = gradient
            optimizer.step()
            weights.copy_(master.data)
        return [master.detach() - start]

    found, seconds, peak = _measure(step, device)
    exact, first, second = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for number, gradient in enumerate(gradients, start=1):
        wide = gradient.double()
        first = betas[0] * first + (1 - betas[0]) * wide
        second = betas[1] * second + (1 - betas[1]) * wide**2
        update = first / (1 - betas[0] ** number) / ((second / (1 - betas[1] ** number)).sqrt() + eps)
        exact = exact - rate * (update + decay * exact)
    error = _distance(found[0], exact - start.double())
    rounded = float((weights != exact.to(dtype)).float().mean()) if dtype != torch.float32 else 0.0
    result = _judge("AdamW step", None, dtype, max(error, rounded), seconds, peak, tolerance=1e-3)
    return replace(result, sizes=f"{name}, {num_parameters / 1e6:.1f} M parameters")


def check_block(
    name: str, widths: tuple[int, int], num_tokens: int, *, device: str, dtype: torch.dtype, compiled: bool
) -> Result:
    """A feed-forward block behind its norm, which is what `train.compile` compiles, against fp32."""
    config = LlamaConfig(hidden_size=widths[0], intermediate_size=widths[1])

    def build(kind: torch.dtype) -> torch.nn.Sequential:
        norm, mlp = LlamaRMSNorm(widths[0]), LlamaMLP(config)
        generator = torch.Generator().manual_seed(1)
        for parameter in mlp.parameters():
            parameter.data = (torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5).to(dtype)
        return torch.nn.Sequential(norm, mlp).to(device, kind)

    module, exact = build(dtype), build(torch.float32)
    if compiled:
        for part in module:
            part.compile(dynamic=True)
    drawn = torch.randn(2, num_tokens, widths[0], generator=torch.Generator().manual_seed(0))
    row, upstream = drawn.to(device, dtype).unbind(0)
    found, seconds, peak = _measure(lambda: _with_gradients(module, module, row, upstream), device)
    wanted = _with_gradients(exact, exact, row.float(), upstream.float())
    error = max(_distance(a, b) for a, b in zip(found, wanted))
    path = "torch.compile, norm and feed-forward" if compiled else "norm and feed-forward"
    result = _judge(path, None, dtype, error, seconds, peak)
    return replace(result, sizes=f"{name}, {widths[0]} x {widths[1]}, {len(row):,} tokens")


def check_nf4(name: str, widths: tuple[int, int], num_tokens: int, *, device: str) -> Result:
    """bitsandbytes' NF4 product and its input gradient, against fp32 products with the same weights unpacked."""
    import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(0)
    layer = bnb.nn.Linear4bit(
        *widths, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(widths[1], widths[0], generator=generator).bfloat16() / widths[0] ** 0.5,
        requires_grad=False, compress_statistics=True, quant_type="nf4",
    )  # fmt: skip
    layer = layer.to(device)
    row = torch.randn(num_tokens, widths[0], generator=generator).to(device, torch.bfloat16)
    upstream = torch.randn(num_tokens, widths[1], generator=generator).to(device, torch.bfloat16)
    found, seconds, peak = _measure(lambda: _with_gradients(None, layer, row, upstream), device)
    plain = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    wanted = _with_gradients(None, lambda part: F.linear(part, plain), row.float(), upstream.float())
    error = max(_distance(a, b) for a, b in zip(found, wanted))
    result = _judge("NF4 linear layer", None, torch.bfloat16, error, seconds, peak)
    return replace(result, sizes=f"{name}, {widths[0]} x {widths[1]}")


def _with_gradients(
    module: torch.nn.Module | None,
    forward: Callable[[torch.Tensor], torch.Tensor],
    row: torch.Tensor,
    upstream: torch.Tensor,
) -> list[torch.Tensor]:
    """[output, gradient of the input, of each weight matrix ..., of all vectors as one], `upstream` being the output's.

    A key's bias alone would be compared with nothing: it moves no softmax, its gradient is zero but for rounding.
    """
    inputs = row.detach().clone().requires_grad_()
    parameters = list(module.parameters()) if module is not None else []
    output = forward(inputs)
    row_gradient, *gradients = torch.autograd.grad(output, [inputs, *parameters], upstream)
    vectors = [gradient for gradient in gradients if gradient.dim() == 1]
    joined = [torch.cat(vectors)] if vectors else []
    return [output.detach(), row_gradient, *(g for g in gradients if g.dim() > 1), *joined]


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact tensor; infinite where something is not a number."""
    difference = (found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)
    return float(difference) if difference.isfinite() else float("inf")


def _measure(
    step: Callable[[], list[torch.Tensor]], device: str, *, repeats: int = 5
) -> tuple[list[torch.Tensor], float, int | None]:
    """(what `step` gives, median seconds of a call, peak bytes above what is there). CPU: one call, no peak."""
    if device == "cpu":
        start = time.perf_counter()
        return step(), time.perf_counter() - start, None
    found = step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return found, statistics.median(times), torch.cuda.max_memory_allocated() - before


def _judge(
    path: str,
    sizes: AttentionSizes | HeadSizes | None,
    dtype: torch.dtype,
    error: float,
    seconds: float,
    peak: int | None,
    *,
    tolerance: float | None = None,
) -> Result:
    tolerance, failed = tolerance or TOLERANCES[dtype], False
    failed = not error <= tolerance
    return Result(
        path=path,
        sizes=f"{sizes.name}, {sizes.text}" if sizes else "",
        dtype=str(dtype).removeprefix("torch."),
        note="MISMATCH" if failed else "ok",
        error=error,
        tolerance=tolerance,
        seconds=seconds,
        peak_bytes=peak,
        failed=failed,
    )


def run_checks(sizes: CheckSizes = PUBLISHED, *, device: str, hub_kernels: bool = False) -> list[Result]:
    """Every path at those sizes. What is not installed gets a row that says so; nothing is fetched.

    `hub_kernels` takes attention builds of the `kernels` package too, from its cache or from the hub.
    """
    results = _attention_results(sizes, device, hub_kernels=hub_kernels)
    for kernel in ("torch", "liger"):
        path, options = f"head loss, {kernel}", {"device": device, "dtype": sizes.dtype}
        problem = _problem(choose_kernel, kernel, device_type=torch.device(device).type)
        if kernel == "liger" and problem is not None:
            results.append(Result(path, "", "", problem))
            continue
        results += [_try(path, head.name, check_head_loss, head, kernel, **options) for head in sizes.heads]
    return results + _block_results(sizes, device)


def _attention_results(sizes: CheckSizes, device: str, *, hub_kernels: bool) -> list[Result]:
    results: list[Result] = []
    for requested in ("sdpa", *FLASH, "kernels"):
        path = "attention, " + (FLASH[requested][0] if requested in FLASH else _ATTENTION_NAMES[requested])
        if requested == "kernels" and not hub_kernels:
            results.append(Result(path, "", "", "not asked for (--hub-kernels, which may fetch it)"))
            continue
        problem = _problem(choose_attention, requested, device_type=torch.device(device).type, dtype=sizes.dtype)
        if problem is not None:
            results.append(Result(path, "", "", problem))
            continue
        name, _ = choose_attention(requested, device_type=torch.device(device).type, dtype=sizes.dtype)
        # Only torch's own attention takes fp32, and is what runs there.
        dtypes = dict.fromkeys((sizes.dtype, torch.float32) if requested == "sdpa" else (sizes.dtype,))
        for layer in sizes.attention:
            for dtype in dtypes:
                options = {"device": device, "dtype": dtype, "path": path}
                results.append(_try(path, layer.name, check_attention, layer, name, **options))
    return results


def _block_results(sizes: CheckSizes, device: str) -> list[Result]:
    results: list[Result] = []
    options: dict[str, Any] = {"device": device, "dtype": sizes.dtype}
    # The CPU has no compiled path to compare: there the block itself is what is tested.
    compiled = torch.device(device).type == "cuda"
    for name, widths in sizes.blocks.items():
        args = (name, widths, sizes.num_block_tokens)
        results.append(_try("torch.compile", name, check_block, *args, compiled=compiled, **options))
        results.append(_try("AdamW step", name, check_optimizer, name, widths[0] * widths[1], **options))
        if compiled and importlib.util.find_spec("bitsandbytes") is not None:
            results.append(_try("NF4 linear layer", name, check_nf4, *args, device=device))
    if importlib.util.find_spec("bitsandbytes") is None:
        results.append(Result("NF4 linear layer", "", "", "bitsandbytes is not installed (pip install '.[quantize]')"))
    return results


def _problem(choose: Callable[..., Any], requested: str, **options: Any) -> str | None:
    """Why what is asked for by name cannot run here, without the advice; None where it can."""
    try:
        choose(requested, **options)
    except UserError as error:
        return str(error).split("cannot run: ")[-1].split(". Use ")[0]
    return None


def _try(path: str, sizes: str, check: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    """The check's result; a row that fails where the check itself cannot go on, so that the others still run."""
    try:
        return check(*args, **kwargs)
    except Exception as error:  # kernels raise many kinds; whichever it is, this path does not work here
        reason = (str(error).splitlines() or [""])[0][:120]
        return Result(path, sizes, "", f"FAILED: {type(error).__name__}: {reason}", failed=True)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def table(results: Sequence[Result], *, title: str) -> Table:
    """All results, one line each."""
    shown = Table(title=title, title_justify="left")
    for column in ("path", "sizes", "type"):
        shown.add_column(column)
    for column in ("max error", "allowed", "ms", "peak GiB"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("result")
    for result in results:
        shown.add_row(
            result.path,
            result.sizes,
            result.dtype,
            "" if result.error is None else f"{result.error:.1e}",
            "" if result.tolerance is None else f"{result.tolerance:.0e}",
            "" if result.seconds is None else f"{result.seconds * 1e3:.1f}",
            "" if result.peak_bytes is None else f"{result.peak_bytes / _GIB:.2f}",
            Text(result.note),
            style="red" if result.failed else "dim" if result.error is None else None,
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a path that ran is wrong, 0 otherwise and where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m mirage.gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--hub-kernels",
        action="store_true",
        help="check the attention build of the kernels package, fetched if need be",
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: no NVIDIA GPU on this machine; nothing was checked")
        return 0
    results = run_checks(device="cuda", hub_kernels=options.hub_kernels)
    # Wide enough for every column where the output is a file.
    console = SafeConsole() if sys.stdout.isatty() else SafeConsole(width=180)
    return report(results, console, title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


def report(results: Sequence[Result], console: Console, *, title: str) -> int:
    """Print the table and its sum; the exit code, 1 where a path that ran is wrong."""
    console.print(table(results, title=title))
    wrong = [result for result in results if result.failed]
    ran = sum(result.error is not None or result.failed for result in results)
    console.print(f"{ran - len(wrong)} of {ran} checks passed; {len(results) - ran} paths are not available here")
    for result in wrong:
        console.print(f"wrong: {result.path}, {result.sizes}: {result.note}", markup=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
