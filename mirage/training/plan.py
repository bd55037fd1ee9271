"""What a run needs before it starts: parameters and floating-point work, from sizes alone.

Nothing is loaded: models are built on the meta device, so an 8B plan takes a second on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirage.config.schema import ModelConfig, Recipe
from mirage.errors import UserError
from mirage.models.adapter import ModelAdapter
from mirage.strict_json import read_json_object

PARTS = ("vision", "projector", "embeddings", "language", "head")

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

    `copies`: parts trained beside adapters; peft keeps the untouched original of each. `largest`: the largest trained
    tensor. `num_quantised`: parameters of the frozen layers that `model.quantize` holds in 4 bits, part of `total`.
    """

    total: Mapping[str, int]
    trained: Mapping[str, int]
    adapters: Mapping[str, int]
    copies: int
    largest: int
    num_quantised: int = 0

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
    published = read_json_object(file, remedy="fetch it again", any_number=True)
    model_type = published.get("model_type")
    if model_type == "internvl_chat" and family == "internvl":
        from mirage.models.internvl_config import check_published, native_config

        check_published(published, file)
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
    layers = linear_layers(network)
    if model.lora is not None:
        for name in adapter.lora_target_names(layers, model.lora.targets):
            group = next(g for g in model.lora.targets if any(name.startswith(p) for p in adapter.groups[g]))
            # A: [rank, in], B: [out, rank] (LoRA, arXiv:2106.09685, section 4.1).
            size_in, size_out = layers[name].in_features, layers[name].out_features
            adapters[group] = adapters.get(group, 0) + model.lora.rank * (size_in + size_out)
            largest = max(largest, model.lora.rank * max(size_in, size_out))
    quantised = 0
    if model.quantize != "none":
        quantised = sum(layers[name].weight.numel() for name in adapter.lora_target_names(layers, ["language"]))
    return ParameterCounts(total, trained, adapters, copies, largest, quantised)


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


def vision_has_gradient(counts: ParameterCounts) -> bool:
    """Whether anything in the vision tower is trained."""
    return counts.trained["vision"] > 0 or counts.adapters.get("vision", 0) > 0


# Work


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiply-add is two): numbers, or arrays over samples."""

    vision: Any
    language: Any

    @property
    def total(self) -> Any:
        return self.vision + self.language


def sample_work(
    counts: ParameterCounts,
    shape: Shape,
    recipe: Recipe,
    *,
    num_tokens: Any,
    num_image_tokens: Any,
    num_images: Any,
    num_supervised_tokens: Any,
    recompute: bool = True,
) -> Work:
    """Work of one sample, forward and backward; of many where the numbers are arrays over samples.

    A linear layer of P parameters costs 2 P a token forward, 2 P for the gradient of its input and 2 P for that of its
    weights where they are trained; recomputation adds a forward pass of its layers, unless `recompute` is false.
    Attention over s tokens of width h costs 4 s^2 h forward, half of it when causal, and twice the forward pass
    backward. A tower whose features are kept (`model.cache_vision_features`) does not run in a step.
    """
    again = 1 if recipe.train.gradient_checkpointing and recompute else 0
    repeated = again * min(1.0, (recipe.train.checkpoint_layers or shape.num_layers) / shape.num_layers)
    language_passes = 2 + repeated + (1 if counts.trained["language"] else 0)
    language = 2 * counts.total["language"] * num_tokens * language_passes
    language += 2 * counts.adapters.get("language", 0) * num_tokens * (3 + repeated)
    language += 2 * shape.hidden_size * num_tokens**2 * shape.num_layers * (3 + repeated)
    # A head that is tied to the embeddings is counted as theirs.
    tied = counts.total["head"] == 0
    head_passes = 2 + (1 if counts.trained["embeddings" if tied else "head"] else 0)
    head_size = shape.hidden_size * shape.vocab_size if tied else counts.total["head"]
    language += 2 * head_size * num_supervised_tokens * head_passes
    gradient = vision_has_gradient(counts)
    projector_passes = 1 + (1 if counts.trained["projector"] else 0) + (1 if gradient else 0)
    vision = 2 * counts.total["projector"] * num_image_tokens * projector_passes
    if recipe.model.cache_vision_features == "off":
        vision += _tower_work(counts, shape, num_image_tokens, num_images, again=again)
    return Work(vision, language)


def _tower_work(counts: ParameterCounts, shape: Shape, num_image_tokens: Any, num_images: Any, *, again: int) -> Any:
    """Of the vision tower alone; a frozen one runs forward once."""
    tokens, gradient = num_image_tokens * shape.vision_tokens_per_image_token, vision_has_gradient(counts)
    passes = (2 + again + (1 if counts.trained["vision"] else 0)) if gradient else 1
    window = shape.vision_window_tokens or tokens / np.maximum(num_images, 1)
    work = 2 * (counts.total["vision"] * passes + counts.adapters.get("vision", 0) * (3 + again)) * tokens
    return work + 4 * shape.vision_hidden_size * tokens * window * shape.vision_layers * (3 + again if gradient else 1)


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
