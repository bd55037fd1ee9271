"""What a run needs before it starts: parameters, memory a GPU, floating-point work, all from sizes alone.

Nothing is loaded: models are built on the meta device, so an 8B plan takes a second on any machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mirage.config.schema import ModelConfig, Recipe
from mirage.errors import UserError
from mirage.models.adapter import ModelAdapter
from mirage.training.launch import MAX_LIVE_PARAMETERS, deepspeed_config

PARTS = ("vision", "projector", "embeddings", "language", "head")
_BYTES = {"bf16": 2, "fp32": 4}
# What a process holds besides tensors: CUDA context, kernels and NCCL buffers (between 1 and 2 GB), or the libraries of
# a CPU process.
_CONTEXT_BYTES = {"full": 1_500_000_000, "tiny": 700_000_000}
# Share of the rest that PyTorch's allocator loses to blocks that do not fit.
_FRAGMENTATION = 0.05

# config.json of the models that the paper trains (sections 4 and B.2), as transformers' native classes say it.
FULL_SIZE: dict[str, dict[str, Any]] = {
    "internvl": {
        "name": "InternVL2.5-8B",
        "text_config": {
            "model_type": "llama",
            "vocab_size": 92553,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
            "use_qk_norm": False,
            "norm_type": "layer_norm",
            "use_absolute_position_embeddings": True,
        },
        "downsample_ratio": 0.5,
        "image_token_id": 92546,
        "tie_word_embeddings": False,
    },
    "qwen2_vl": {
        "name": "Qwen2-VL-7B-Instruct",
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 3584,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part. `adapters` and `copies` exist only with LoRA and are not part of `total`.

    `copies`: parts trained beside adapters; peft keeps the untouched original of each.
    """

    total: Mapping[str, int]
    trained: Mapping[str, int]
    adapters: Mapping[str, int]
    copies: int
    largest: int

    @property
    def num_total(self) -> int:
        """Parameters of the plain model."""
        return sum(self.total.values())

    @property
    def num_trained(self) -> int:
        """Parameters that get a gradient, adapters included."""
        return sum(self.trained.values()) + self.num_adapters

    @property
    def num_adapters(self) -> int:
        return sum(self.adapters.values())

    @property
    def num_held(self) -> int:
        """Parameters in memory: the model, its adapters and peft's copies."""
        return self.num_total + self.num_adapters + self.copies


@dataclass(frozen=True)
class Shape:
    """Sizes that memory and work depend on. Image tokens are what the language model sees of a picture."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    kv_size: int
    num_heads: int
    vocab_size: int
    vision_hidden_size: int
    vision_layers: int
    vision_intermediate_size: int
    vision_tokens_per_image_token: float
    # Tokens that attend to each other in the tower; None: all of a picture's.
    vision_window_tokens: int | None


def model_config(recipe: Recipe) -> tuple[Any, str]:
    """(transformers config, what it is): the tiny model's, the local folder's config.json, else the full-size one."""
    family, model = recipe.model.family, recipe.model
    if model.tiny is not None:
        return _tiny_config(recipe), f"tiny {family}"
    local = _local_config(model, family)
    if local is not None:
        return local, f"{model.path}"
    entry = {key: value for key, value in FULL_SIZE[family].items() if key != "name"}
    from transformers import InternVLConfig, Qwen2VLConfig

    config = {"internvl": InternVLConfig, "qwen2_vl": Qwen2VLConfig}[family](**entry)
    return config, f"{FULL_SIZE[family]['name']} (sizes known to MIRage; nothing is loaded)"


def _local_config(model: ModelConfig, family: str) -> Any | None:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = Path(model.path).expanduser() if model.path else None
    if folder is None or not folder.is_dir():
        return None
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model.path={model.path}: the folder has no config.json")
    try:
        published = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    model_type = published.get("model_type") if isinstance(published, dict) else None
    if model_type == "internvl_chat":
        from mirage.models.internvl_config import native_config

        tied = bool(published.get("llm_config", {}).get("tie_word_embeddings", False))
        # Sizes are all that is asked of it: the token's number does not matter.
        return native_config(published, image_token_id=0, tied=tied, where=file)
    if model_type != family:
        raise UserError(f"{file}: model_type is {model_type!r}, but model.family={family}")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{file}: transformers cannot read it: {reason}") from None


class _Vocabulary:
    """As much of a tokenizer as a config needs: its size, and special tokens at its first ids."""

    def __init__(self, size: int, special_tokens: list[str]) -> None:
        self._size, self._special_tokens = size, special_tokens

    def __len__(self) -> int:
        return self._size

    def convert_tokens_to_ids(self, token: str) -> int:
        return self._special_tokens.index(token)


def _tiny_config(recipe: Recipe) -> Any:
    from mirage.models import tiny

    assert recipe.model.tiny is not None
    family = recipe.model.family
    vocabulary = _Vocabulary(recipe.model.tiny.vocab_size, tiny.SPECIAL_TOKENS[family])
    return tiny.model_config(family, recipe.model.tiny, recipe.preprocessing, vocabulary)


def plan_adapter(recipe: Recipe, config: Any, tokenizer: Any = None) -> ModelAdapter:
    """The family's adapter around a config alone: enough for module groups and image tokens."""
    from mirage.models.adapter import PreprocessingSpec
    from mirage.models.registry import FAMILIES

    adapter_class, _ = FAMILIES[recipe.model.family]
    spec = PreprocessingSpec(family=recipe.model.family, **recipe.preprocessing.model_dump())
    return adapter_class(tokenizer, config, spec)


# Parameters


def parameter_counts(config: Any, adapter: ModelAdapter, model: ModelConfig) -> ParameterCounts:
    """Count the parameters of a model with this config, and what `model.train` and `model.lora` train of it."""
    from mirage.models.lora import linear_layers
    from mirage.models.registry import FAMILIES

    _, model_class = FAMILIES[model.family]
    with torch.device("meta"):
        network = model_class(config)
    total, trained = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    copies, largest = 0, 0
    for name, parameter in network.named_parameters():
        part, group = _part(name, adapter), adapter.group_of(name)
        total[part] += parameter.numel()
        if group in model.train:
            trained[part] += parameter.numel()
            copies += parameter.numel() if model.lora is not None else 0
            largest = max(largest, parameter.numel())
    adapters: dict[str, int] = {}
    if model.lora is not None:
        layers = linear_layers(network)
        for name in adapter.lora_target_names(layers, model.lora.targets):
            group = next(g for g in model.lora.targets if any(name.startswith(p) for p in adapter.groups[g]))
            # A: [rank, in], B: [out, rank] (LoRA, arXiv:2106.09685, section 4.1).
            size_in, size_out = layers[name].in_features, layers[name].out_features
            adapters[group] = adapters.get(group, 0) + model.lora.rank * (size_in + size_out)
            largest = max(largest, model.lora.rank * max(size_in, size_out))
    return ParameterCounts(total, trained, adapters, copies, largest)


def _part(name: str, adapter: ModelAdapter) -> str:
    group = adapter.group_of(name)
    if group != "language":
        return group
    if "embed_tokens" in name:
        return "embeddings"
    return "head" if name.startswith("lm_head") else "language"


def model_shape(config: Any, adapter: ModelAdapter) -> Shape:
    """The sizes of a config of either family."""
    text, vision = config.text_config, config.vision_config
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if adapter.family == "qwen2_vl":
        hidden, layers = vision.embed_dim, vision.depth
        wide, per_token, window = int(hidden * vision.mlp_ratio), float(vision.spatial_merge_size**2), None
    else:
        hidden, layers, wide = vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size
        image_tokens = adapter.dummy_picture()[0].num_tokens
        # A tile is its patches and one class token; the pixel-unshuffle leaves one token of 1 / ratio^2 patches.
        window = round(image_tokens / config.downsample_ratio**2) + 1
        per_token = window / image_tokens
    return Shape(
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        intermediate_size=text.intermediate_size,
        kv_size=text.num_key_value_heads * head_size,
        num_heads=text.num_attention_heads,
        vocab_size=text.vocab_size,
        vision_hidden_size=hidden,
        vision_layers=layers,
        vision_intermediate_size=wide,
        vision_tokens_per_image_token=per_token,
        vision_window_tokens=window,
    )


# Memory


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU by what holds them, and in the host's memory for one process."""

    device: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes on one GPU."""
        return sum(self.device.values())


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
    pack_tokens: int | None = None,
    image_share: float = 1.0,
) -> MemoryPlan:
    """Memory of one rank while it trains packs of `pack_tokens` tokens (default: the recipe's).

    `image_share` is the largest share of a pack that is image tokens. Sharded parts are divided by `world_size` as the
    ZeRO stage says (ZeRO, arXiv:1910.02054, figure 1). Activations count what autograd keeps of each module; the rest
    is an estimate: allow 10 %.
    """
    stage, tokens = recipe.train.zero_stage, pack_tokens or recipe.data.pack_tokens
    per_parameter = state_bytes_per_parameter(recipe)
    sharded = {3: 1, 2: 2, 1: 3, 0: 4}[stage]
    divide = [1 if index < sharded - 1 else world_size for index in range(3)]
    weights = counts.num_held * per_parameter["weights"] // divide[0]
    gradients = counts.num_trained * per_parameter["gradients"] // divide[1]
    optimizer = counts.num_trained * (per_parameter["master weights"] + per_parameter["AdamW moments"]) // divide[2]
    device = {
        "weights": weights,
        "gradients": gradients,
        "optimiser": 0 if recipe.train.offload_optimizer else optimizer,
        "gathered and buckets": _communication_bytes(counts, recipe, per_parameter),
        "activations": _activation_bytes(counts, shape, recipe, tokens, image_share),
        "logits": _logit_bytes(shape, recipe, tokens),
    }
    context = _CONTEXT_BYTES["full" if recipe.model.tiny is None else "tiny"]
    device["context and fragmentation"] = context + int(_FRAGMENTATION * sum(device.values()))
    # Each rank reads the whole weights before they are sharded.
    host = {"weights while loading": counts.num_total * per_parameter["weights"]}
    if recipe.train.offload_optimizer:
        host["optimiser"] = optimizer
    return MemoryPlan(device, host)


def _communication_bytes(counts: ParameterCounts, recipe: Recipe, per_parameter: Mapping[str, int]) -> int:
    zero = deepspeed_config(recipe, world_size=1, has_gpu=True)["zero_optimization"]
    # Gradients travel in fp32, in two buckets when communication overlaps computation; one larger than a bucket
    # (embedding, head) is converted whole.
    gradient = 4 * min(counts.num_trained, 2 * zero["reduce_bucket_size"])
    if counts.largest > zero["reduce_bucket_size"]:
        gradient += counts.largest * (4 + per_parameter["weights"])
    if recipe.train.zero_stage < 3:
        return gradient
    gathered = min(counts.num_held, MAX_LIVE_PARAMETERS + zero["stage3_prefetch_bucket_size"])
    return gradient + gathered * per_parameter["weights"]


def decoder_layer_bytes(shape: Shape, dtype_bytes: int) -> int:
    """What autograd keeps of one token in one decoder layer (RMSNorm, grouped-query attention, gated MLP), bytes.

    Two norms: their input in fp32, and the normalised and scaled vectors; rotated q and k, v and the attention's
    output and log-sum; gate, up, their activation and product. Attention without a stored score matrix.
    """
    norms = 2 * shape.hidden_size * (4 + 2 * dtype_bytes)
    attention = dtype_bytes * (2 * shape.hidden_size + 2 * shape.kv_size) + 4 * shape.num_heads
    return norms + attention + 4 * dtype_bytes * shape.intermediate_size


def vision_layer_bytes(shape: Shape, dtype_bytes: int) -> int:
    """What autograd keeps of one vision token in one layer: two norms, q, k, v, attention, layer scales, MLP; bytes."""
    return dtype_bytes * (10 * shape.vision_hidden_size + 2 * shape.vision_intermediate_size)


def _activation_bytes(counts: ParameterCounts, shape: Shape, recipe: Recipe, tokens: int, image_share: float) -> int:
    size = _BYTES[recipe.train.precision]
    layer = decoder_layer_bytes(shape, size)
    recompute = recipe.train.gradient_checkpointing
    if recompute:
        # Inputs of all layers, one layer recomputed, and the gradients inside it.
        in_flight = size * 2 * (shape.hidden_size + shape.intermediate_size)
        language = tokens * (shape.num_layers * size * shape.hidden_size + layer + in_flight)
    else:
        language = tokens * shape.num_layers * layer
    vision_tokens = int(tokens * image_share * shape.vision_tokens_per_image_token)
    if _vision_has_gradient(counts):
        vision_layer = vision_layer_bytes(shape, size)
        kept = size * shape.vision_hidden_size * shape.vision_layers + vision_layer
        vision = vision_tokens * (kept if recompute else shape.vision_layers * vision_layer)
    else:
        # Without gradients one layer's tensors exist at a time, and they are gone when the language model peaks.
        vision = 0
    projector = int(tokens * image_share) * size * (4 * shape.vision_hidden_size + 2 * shape.hidden_size)
    return language + vision + projector


def _vision_has_gradient(counts: ParameterCounts) -> bool:
    return counts.trained["vision"] > 0 or counts.adapters.get("vision", 0) > 0


def _logit_bytes(shape: Shape, recipe: Recipe, tokens: int) -> int:
    # fp32 logits, log-probabilities and gradient of one chunk, and the gradient in the weights' type.
    per_logit = 12 + (2 if recipe.train.precision == "bf16" else 0)
    return min(recipe.train.loss_chunk_tokens, tokens) * shape.vocab_size * per_logit


def largest_pack(
    counts: ParameterCounts,
    shape: Shape,
    recipe: Recipe,
    *,
    world_size: int,
    memory_bytes: int,
    image_share: float = 1.0,
    step_tokens: int = 1024,
) -> int:
    """The most tokens a pack may have in `memory_bytes` a GPU, a multiple of `step_tokens`; 0 when none fits."""

    def fits(units: int) -> bool:
        plan = memory_plan(
            counts, shape, recipe, world_size=world_size, pack_tokens=units * step_tokens, image_share=image_share
        )
        return plan.total <= memory_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step_tokens


# Work


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one optimiser step over all ranks (a multiply-add is two)."""

    vision: float
    language: float

    @property
    def total(self) -> float:
        return self.vision + self.language


def sample_work(
    counts: ParameterCounts,
    shape: Shape,
    recipe: Recipe,
    *,
    num_tokens: float,
    num_image_tokens: float,
    num_images: float,
    num_supervised_tokens: float,
) -> Work:
    """Work of one sample, forward and backward.

    A linear layer of P parameters costs 2 P a token forward, 2 P for the gradient of its input and 2 P for that of its
    weights where they are trained; recomputation adds a forward pass. Attention over s tokens of width h costs 4 s^2 h
    forward, half of it when causal, and twice the forward pass backward.
    """
    again = 1 if recipe.train.gradient_checkpointing else 0
    language_passes = 2 + again + (1 if counts.trained["language"] else 0)
    head_passes = 2 + (1 if counts.trained["head"] else 0)
    language = 2 * counts.total["language"] * num_tokens * language_passes
    language += 2 * shape.hidden_size * num_tokens**2 * shape.num_layers * (3 + again)
    language += 2 * counts.total["head"] * num_supervised_tokens * head_passes
    vision_tokens = num_image_tokens * shape.vision_tokens_per_image_token
    gradient = _vision_has_gradient(counts)
    vision_passes = (2 + again + (1 if counts.trained["vision"] else 0)) if gradient else 1
    window = shape.vision_window_tokens or (vision_tokens / num_images if num_images else 0)
    vision = 2 * counts.total["vision"] * vision_tokens * vision_passes
    vision += (
        4 * shape.vision_hidden_size * vision_tokens * window * shape.vision_layers * (3 + again if gradient else 1)
    )
    projector_passes = 1 + (1 if counts.trained["projector"] else 0) + (1 if gradient else 0)
    vision += 2 * counts.total["projector"] * num_image_tokens * projector_passes
    return Work(vision, language)


def default_world_size(recipe: Recipe) -> tuple[int, str]:
    """Processes to plan for, and why: what runs, else this machine's GPUs, else 8 (the paper) or 2 for tiny models."""
    if os.environ.get("WORLD_SIZE", "").isdigit():
        return int(os.environ["WORLD_SIZE"]), "the processes that run"
    if torch.cuda.is_available():
        return torch.cuda.device_count(), "the GPUs of this machine"
    if recipe.model.tiny is not None:
        return 2, "two CPU processes; set gpus=N"
    return 8, "the paper's 8 GPUs; set gpus=N"


def parse_memory(text: str) -> int:
    """Bytes of `80GB`, `80`, `79.2GiB`; a plain number is GB. Raises `UserError`."""
    units = {"gib": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6, "g": 10**9, "": 10**9}
    word = text.strip().lower()
    for unit, factor in units.items():
        if word.endswith(unit):
            try:
                value = float(word.removesuffix(unit))
            except ValueError:
                break
            if 0 < value < 1e6:
                return int(value * factor)
            break
    raise UserError(f"gpu_memory={text}: must be a size such as 80GB or 79.2GiB")


def print_plan(recipe: Recipe, *, world_size: int | None = None, memory_bytes: int | None = None) -> None:
    """Print the resolved recipe and its plan. `memory_bytes` of one GPU: asks for the largest pack that fits."""
    from mirage.training.plan_report import render_plan

    render_plan(recipe, world_size=world_size, memory_bytes=memory_bytes)
