"""Memory of a training step from sizes alone: what stays, and the largest of the moments that come and go.

A step has three moments that can be its peak: the loss (all activations and the logits), the backward pass through a
layer, and the optimiser's update (the activations are gone, AdamW's copies have come). The plan is the largest of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mirage.config.schema import Recipe
from mirage.training.launch import MAX_LIVE_PARAMETERS, deepspeed_config
from mirage.training.plan import ParameterCounts, Shape, vision_has_gradient

_BYTES = {"bf16": 2, "fp32": 4}
# What a process holds besides tensors. On a GPU: CUDA context, kernels and NCCL buffers, between 1 and 2 GB. On a CPU:
# Python and the imported libraries, 0.53 to 0.56 GB in benchmarks/plan_memory.py, whatever the model.
_CONTEXT_BYTES = {"cuda": 1_500_000_000, "cpu": 550_000_000}
# Share of the rest that PyTorch's caching allocator loses to blocks that do not fit; the CPU has no such allocator.
_FRAGMENTATION = {"cuda": 0.05, "cpu": 0.0}
# DeepSpeed's default `sub_group_size`: ZeRO-3 updates at most about this many elements of a rank at a time.
_SUB_GROUP_ELEMENTS = 1_000_000_000
# NF4 with doubly quantised scales (QLoRA, arXiv:2305.14314, section 3): 4 bits, and 0.127 bits of scales.
_NF4_BYTES = (4 + 0.127) / 8
ATTENTION_KINDS = ("flash", "padded", "scores")


@dataclass(frozen=True)
class PackShape:
    """What one rank trains at a time.

    `image_share` and `supervised_share` are the largest shares of a pack's tokens that are image tokens and learnt.
    `attention_padding` is what `mirage_varlen` lays side by side: `attention.padded_positions` / tokens.
    """

    tokens: int
    image_share: float = 1.0
    supervised_share: float = 1.0
    attention_padding: float = 1.0


@dataclass(frozen=True)
class Kernels:
    """What activations depend on besides sizes: where a step runs, and what its attention keeps for backward.

    `attention`: "flash" keeps q, k, v and its output; "padded" (`mirage_varlen`) keeps copies of them in which each
    sample is as long as the longest of its group; "scores" (eager) keeps the score matrix of the whole packed row.
    """

    device_type: str
    attention: str

    def attention_itemsize(self, dtype_bytes: int) -> int:
        """Bytes of an element inside attention: on the CPU it is computed in fp32 (see `packed_sdpa`)."""
        return 4 if self.device_type == "cpu" else dtype_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU, or of one CPU process, by what holds them; and in the host's memory for one process.

    `state` is always there, `moments` are what each moment of a step adds to it; one moment exists at a time.
    """

    state: Mapping[str, int]
    moments: Mapping[str, Mapping[str, int]]
    context: int
    host: Mapping[str, int]

    @property
    def peak(self) -> str:
        """The name of the largest moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    def tensor_bytes(self, moment: str) -> int:
        """Bytes of all tensors at that moment."""
        return sum(self.state.values()) + sum(self.moments[moment].values())

    @property
    def device(self) -> dict[str, int]:
        """Everything at the largest moment."""
        return {**self.state, **self.moments[self.peak], "context and fragmentation": self.context}

    @property
    def total(self) -> int:
        """Bytes at the largest moment."""
        return sum(self.device.values())


def planned_kernels(recipe: Recipe) -> Kernels:
    """Where the recipe's steps run: a tiny model on the CPU where there is no GPU, all else on a GPU.

    A machine without a GPU plans for one that has flash-attn, as `pip install '.[gpu]'` brings it.
    """
    requested, has_gpu = recipe.model.attention, torch.cuda.is_available()
    device_type = "cpu" if recipe.model.tiny is not None and not has_gpu else "cuda"
    if requested == "eager":
        return Kernels(device_type, "scores")
    installed = any(importlib.util.find_spec(name) is not None for name in ("flash_attn", "flash_attn_interface"))
    possible = device_type == "cuda" and requested != "sdpa" and recipe.train.precision == "bf16"
    flash = possible and (installed or not has_gpu or requested == "kernels")
    return Kernels(device_type, "flash" if flash else "padded")


def state_bytes_per_parameter(recipe: Recipe) -> dict[str, int]:
    """Bytes that a trained parameter costs before sharding: weight, gradient, fp32 master copy, two AdamW moments.

    bf16 under ZeRO: 2 + 4 + 4 + 8 = 18 (gradients are summed in fp32). fp32 under ZeRO: 4 + 4 + 4 + 8 = 20, for
    DeepSpeed keeps its flat copy of the weights there too.
    """
    return {
        "weights": _BYTES[recipe.train.precision],
        "gradients": 4,
        "master weights": 4,
        "AdamW moments": 8,
    }


def memory_plan(
    counts: ParameterCounts,
    shape: Shape,
    recipe: Recipe,
    *,
    world_size: int,
    pack: PackShape | None = None,
    kernels: Kernels | None = None,
) -> MemoryPlan:
    """Memory of one rank while it trains packs of shape `pack` (default: the recipe's size, all of it image tokens).

    Sharded parts are divided by `world_size` as the ZeRO stage says (ZeRO, arXiv:1910.02054, figure 1). Activations
    count what autograd keeps of each module; the rest is an estimate: allow 10 %.
    """
    kernels, pack = kernels or planned_kernels(recipe), pack or PackShape(recipe.data.pack_tokens)
    per_parameter, train = state_bytes_per_parameter(recipe), recipe.train
    sharded = {3: 1, 2: 2, 1: 3}[train.zero_stage]
    divide = [1 if index < sharded - 1 else world_size for index in range(3)]
    gradients = counts.num_trained * per_parameter["gradients"] // divide[1]
    if train.zero_stage == 1 and train.precision == "bf16":
        # Stage 1 does not free what the backward pass has written when it has added it to the sum in fp32.
        gradients += counts.num_trained * per_parameter["weights"]
    optimizer = counts.num_trained * (per_parameter["master weights"] + per_parameter["AdamW moments"]) // divide[2]
    step = _step_bytes(counts, recipe, world_size=world_size, device_type=kernels.device_type)
    # Each rank reads the whole weights before they are sharded.
    host = {
        "weights while loading": counts.num_total * per_parameter["weights"],
        "a checkpoint being written (the first process)": _checkpoint_bytes(counts, recipe, world_size=world_size),
    }
    on_host = train.offload_optimizer
    if on_host:
        host |= {"optimiser": optimizer, "optimiser's update": step}
        optimizer = step = 0
    if on_host and train.zero_stage == 3:
        # Summed there too, beside the optimiser's own buffer for them.
        host["gradients"], gradients = 2 * gradients, 0
    weights = _weight_bytes(counts, per_parameter["weights"]) // divide[0]
    if train.offload_parameters:
        host["weights"], weights = weights, 0
    state = {
        "weights": weights,
        "gradients": gradients,
        "optimiser": optimizer,
        "gradient buckets": _bucket_bytes(counts, shape, recipe),
    }
    moments = _moments(counts, shape, recipe, pack, kernels, world_size=world_size)
    moments["optimiser step"] = {"optimiser's update": step}
    plan = MemoryPlan(state, moments, 0, host)
    tensors = plan.tensor_bytes(plan.peak)
    return replace(plan, context=with_context(tensors, device_type=kernels.device_type) - tensors)


def _checkpoint_bytes(counts: ParameterCounts, recipe: Recipe, *, world_size: int) -> int:
    """The state that the first rank holds until it is written: its share in fp32, and the weights that are saved."""
    saved = counts.num_trained if recipe.model.lora is not None else counts.num_total
    return 12 * counts.num_trained // world_size + saved * state_bytes_per_parameter(recipe)["weights"]


def _weight_bytes(counts: ParameterCounts, dtype_bytes: int) -> int:
    return (counts.num_held - counts.num_quantised) * dtype_bytes + int(counts.num_quantised * _NF4_BYTES)


def _zero(recipe: Recipe, shape: Shape) -> dict[str, int]:
    return deepspeed_config(recipe, world_size=1, hidden_size=shape.hidden_size, has_gpu=True)["zero_optimization"]


def _bucket_bytes(counts: ParameterCounts, shape: Shape, recipe: Recipe) -> int:
    # Gradients travel in fp32, in two buckets when communication overlaps computation.
    return 4 * min(counts.num_trained, 2 * _zero(recipe, shape)["reduce_bucket_size"])


def _step_bytes(counts: ParameterCounts, recipe: Recipe, *, world_size: int, device_type: str) -> int:
    """fp32 copies that exist while a rank updates its share of the parameters.

    AdamW makes the denominator from the second moment: one copy in torch's multi-tensor form (GPU), two in its
    single-tensor form (the root, and the root over the bias correction). ZeRO-3 works through sub-groups, and beside
    these copies holds one that it has made of their gradients; stages 1 and 2 free the gradients that they have copied.
    """
    share, copies = counts.num_trained // world_size, 1 if device_type == "cuda" else 2
    if recipe.train.zero_stage == 3:
        share, copies = min(share, _SUB_GROUP_ELEMENTS), copies + 1
    return 4 * share * copies


def _moments(
    counts: ParameterCounts, shape: Shape, recipe: Recipe, pack: PackShape, kernels: Kernels, *, world_size: int
) -> dict[str, dict[str, int]]:
    """What the loss and the backward pass hold beside the state."""
    size = _BYTES[recipe.train.precision]
    name, gathered = "gathered weights", 0
    # One rank has all shards: DeepSpeed then uses them in place.
    if recipe.train.zero_stage == 3 and world_size > 1:
        limit = MAX_LIVE_PARAMETERS + _zero(recipe, shape)["stage3_prefetch_bucket_size"]
        gathered = size * min(counts.num_held, limit)
    if counts.num_quantised:
        # One matrix at a time is unpacked to the type that it is multiplied in.
        name, gathered = "unpacked weights", size * shape.hidden_size * shape.intermediate_size
    always = {name: gathered, "activations": _kept_bytes(counts, shape, recipe, pack, kernels)}
    head, work = _head_bytes(counts, shape, recipe, pack), _layer_work_bytes(counts, shape, recipe, pack, kernels)
    return {
        "loss": {**always, "logits and head's gradient": head},
        "backward": {**always, "work in one layer": work},
    }


def attention_bytes(shape: Shape, dtype_bytes: int, kernels: Kernels, pack: PackShape) -> float:
    """What autograd keeps of one token in one layer's attention, from rotated q and k to the output, bytes."""
    queries, keys, inside = shape.hidden_size, shape.kv_size, kernels.attention_itemsize(dtype_bytes)
    if kernels.attention == "flash":
        return dtype_bytes * (2 * queries + 2 * keys) + 4 * shape.num_heads
    if kernels.attention == "padded":
        copies = inside * (2 * queries + 2 * keys) + 4 * shape.num_heads
        # The output projection's input is cut out of the padded output.
        return copies * pack.attention_padding + dtype_bytes * queries
    # Keys and values repeated for every head; fp32 softmax over the whole row, and its copy in the weights' type.
    copy = dtype_bytes if dtype_bytes < 4 else 0
    return dtype_bytes * 4 * queries + shape.num_heads * pack.tokens * (4 + copy)


def decoder_layer_bytes(
    shape: Shape, dtype_bytes: int, kernels: Kernels, pack: PackShape, *, norms_trained: bool = True
) -> float:
    """What autograd keeps of one token in one decoder layer (RMSNorm, grouped-query attention, gated MLP), bytes.

    Two norms: their input in fp32, the scaled vector, and the normalised one where their weights are trained; attention
    (`attention_bytes`); gate, up, their activation and product.
    """
    norms = 2 * shape.hidden_size * (4 + dtype_bytes * (2 if norms_trained else 1))
    return norms + attention_bytes(shape, dtype_bytes, kernels, pack) + 4 * dtype_bytes * shape.intermediate_size


def vision_layer_bytes(shape: Shape, dtype_bytes: int, kernels: Kernels) -> int:
    """What autograd keeps of one vision token in one layer: two norms, q, k, v, attention, layer scales, MLP; bytes."""
    inside = 4 * kernels.attention_itemsize(dtype_bytes)
    return shape.vision_hidden_size * (6 * dtype_bytes + inside) + dtype_bytes * 2 * shape.vision_intermediate_size


def _kept_bytes(counts: ParameterCounts, shape: Shape, recipe: Recipe, pack: PackShape, kernels: Kernels) -> int:
    """Activations that wait for the backward pass when the forward pass is over."""
    size, tokens, recompute = _BYTES[recipe.train.precision], pack.tokens, recipe.train.gradient_checkpointing
    image_tokens = tokens * pack.image_share
    whole_layer = decoder_layer_bytes(shape, size, kernels, pack, norms_trained=counts.trained["language"] > 0)
    num_recomputed = min(recipe.train.checkpoint_layers or shape.num_layers, shape.num_layers) if recompute else 0
    layers = num_recomputed * size * shape.hidden_size + (shape.num_layers - num_recomputed) * whole_layer
    # The last norm, and the embeddings with the pictures' features put in.
    ends = shape.hidden_size * (4 + 3 * size)
    language = tokens * (layers + ends)
    # Without gradients one layer's tensors exist at a time, and they are gone when the language model peaks.
    vision = 0.0
    if vision_has_gradient(counts):
        vision_layer = vision_layer_bytes(shape, size, kernels)
        kept = size * shape.vision_hidden_size * shape.vision_layers + vision_layer
        vision = image_tokens * shape.vision_tokens_per_image_token
        vision *= kept if recompute else shape.vision_layers * vision_layer
    projector = image_tokens * size * (4 * shape.vision_hidden_size + 2 * shape.hidden_size)
    return int(language + vision + projector)


def _layer_work_bytes(counts: ParameterCounts, shape: Shape, recipe: Recipe, pack: PackShape, kernels: Kernels) -> int:
    """What the backward pass through the last layer adds: its recomputed activations, and gradients inside it.

    In the MLP three gradients of its width exist when its product is no longer needed, and two of the layer's width.
    The backward pass of the last norm, before it, holds five fp32 tensors of the layer's width. With eager attention
    the softmax has the fp32 gradients of its output and input, when the copy of its output is no longer needed.
    """
    size = _BYTES[recipe.train.precision]
    mlp, norm = size * 2 * (shape.hidden_size + shape.intermediate_size), 5 * 4 * shape.hidden_size
    copy = size if size < 4 else 0
    scores = shape.num_heads * pack.tokens * (8 - copy) if kernels.attention == "scores" else 0
    recomputed = 0.0
    if recipe.train.gradient_checkpointing:
        trained = counts.trained["language"] > 0
        recomputed = decoder_layer_bytes(shape, size, kernels, pack, norms_trained=trained)
    return int(pack.tokens * max(norm, recomputed + max(mlp, scores)))


def _head_bytes(counts: ParameterCounts, shape: Shape, recipe: Recipe, pack: PackShape) -> int:
    """The loss of one chunk of supervised positions beside the head's gradient, or that gradient on its way out."""
    size, chunk = _BYTES[recipe.train.precision], recipe.train.loss_chunk_tokens
    positions = min(chunk, pack.tokens * pack.supervised_share)
    # Logits become their gradient in place, in fp32; below fp32 there is a copy in the weights' type.
    logits = positions * shape.vocab_size * (4 + (size if size < 4 else 0))
    gradient = counts.trained["head"] * size
    # A gradient larger than a bucket (head, embedding) is converted to fp32 whole before it is reduced.
    whole = counts.largest * (size + 4) if counts.largest > _zero(recipe, shape)["reduce_bucket_size"] else 0
    return int(max(logits + gradient, whole))


def evaluation_bytes(
    counts: ParameterCounts, shape: Shape, recipe: Recipe, plan: MemoryPlan, *, prompt_tokens: int
) -> dict[str, int]:
    """What a rank holds while it answers between steps, by part; {} where no rank of the run does.

    Training's own tensors stay. The checkpoint is read whole beside them, unquantised, and each answer of a batch keeps
    the keys and values of its prompt of `prompt_tokens` and of what it writes.
    """
    config = recipe.eval
    if config.mode not in ("inline", "deferred"):
        return {}
    # bf16 on a GPU and fp32 on a CPU, whatever the run is trained in.
    size = 2 if planned_kernels(recipe).device_type == "cuda" else 4
    held_tokens = config.batch_size * (prompt_tokens + config.max_new_tokens)
    return {
        "training's tensors": sum(plan.state.values()),
        "the model once more": size * counts.num_held,
        "keys and values": 2 * size * shape.num_layers * shape.kv_size * held_tokens,
    }


def with_context(tensor_bytes: int, *, device_type: str) -> int:
    """Tensors, and what a process on such a device holds besides."""
    return tensor_bytes + _CONTEXT_BYTES[device_type] + int(_FRAGMENTATION[device_type] * tensor_bytes)


def largest_pack(
    counts: ParameterCounts,
    shape: Shape,
    recipe: Recipe,
    *,
    world_size: int,
    memory_bytes: int,
    pack: PackShape | None = None,
    step_tokens: int = 1024,
) -> int:
    """The most tokens a pack may have in `memory_bytes` a GPU, a multiple of `step_tokens`; 0 when none fits.

    Shares and padding are those of `pack`.
    """
    pack = pack or PackShape(recipe.data.pack_tokens)

    def fits(units: int) -> bool:
        longer = replace(pack, tokens=units * step_tokens)
        return memory_plan(counts, shape, recipe, world_size=world_size, pack=longer).total <= memory_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step_tokens
