"""InternVL's two configs: the published `InternVLChatModel` one and the native one of transformers, both ways.

Field meanings: upstream `configuration_internvl_chat.py`, `configuration_intern_vit.py`, `configuration_internlm2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import InternVLConfig

from mirage.errors import UserError

PUBLISHED_MODEL_TYPE = "internvl_chat"
PUBLISHED_ARCHITECTURE = "InternVLChatModel"
NATIVE_ARCHITECTURE = "InternVLForConditionalGeneration"
INTERNLM2 = "InternLM2ForCausalLM"
# Published language architectures and the transformers model type that computes the same function.
LANGUAGE_MODEL_TYPES = {
    INTERNLM2: "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# All published vocabularies end with <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>.
TOKENS_AFTER_IMAGE_TOKEN = 7
UNSCALED_EPS = 1e-6
HUB_CODE = "OpenGVLab/InternVL2_5-8B"
_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_OPTIONAL_TEXT_FIELDS = (
    "head_dim",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)
_VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "attention_dropout": "attention_dropout",
    "dropout": "projection_dropout",
    "initializer_range": "initializer_range",
    "initializer_factor": "layer_scale_init_value",
    "qk_normalization": "use_qk_norm",
    "qkv_bias": "attention_bias",
}
# What upstream's config classes take when config.json leaves a field out.
_VISION_DEFAULTS = {
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
    "qk_normalization": True,
    "qkv_bias": False,
}
_TEXT_DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def native_config(published: Mapping[str, Any], *, image_token_id: int, tied: bool, where: Path) -> InternVLConfig:
    """The native config of a published one; `where` is the file to name in messages.

    `tied` says that the checkpoint stores no output head of its own. Raises `UserError` for an architecture or a
    setting that transformers' native class does not compute.
    """
    check_published(published, where)
    try:
        return _native_config(published, image_token_id=image_token_id, tied=tied, where=where)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for values of another type
        reason = f"{' '.join(str(error).split()):.200}"
        raise UserError(f"{where}: is not a usable config ({reason}); fetch the file again") from error


def _native_config(published: Mapping[str, Any], *, image_token_id: int, tied: bool, where: Path) -> InternVLConfig:
    vision, language = published["vision_config"], published["llm_config"]
    edge = _number(vision, "image_size", where)
    ratio = float(published.get("downsample_ratio", 0.5))
    config = InternVLConfig(
        vision_config=_native_vision(vision, where),
        text_config=_native_text(language, where) | {"tie_word_embeddings": tied},
        image_token_id=image_token_id,
        image_seq_length=int((edge // _number(vision, "patch_size", where)) ** 2 * ratio**2),
        downsample_ratio=ratio,
        projector_hidden_act="gelu",
        vision_feature_layer=int(published.get("select_layer", -1)),
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )
    config.architectures = [NATIVE_ARCHITECTURE]
    return config


def check_published(published: Mapping[str, Any], where: Path) -> None:
    """Raise `UserError` unless this is an `InternVLChatModel` whose parts the native class can compute."""
    model_type = published.get("model_type")
    if model_type != PUBLISHED_MODEL_TYPE:
        code = " and asks for remote code (auto_map), which MIRage never runs" if published.get("auto_map") else ""
        raise UserError(f"{where}: model_type is {model_type!r}{code}; expected {PUBLISHED_MODEL_TYPE!r}")
    for section in ("vision_config", "llm_config"):
        if not isinstance(published.get(section), Mapping):
            raise UserError(f"{where}: has no {section}; fetch the file again")
    check_language(published["llm_config"], where)
    vision = published["vision_config"]
    architecture = _first(vision.get("architectures"), "InternVisionModel")
    if architecture != "InternVisionModel":
        raise UserError(f"{where}: vision architecture {architecture!r} is unknown; expected 'InternVisionModel'")
    if published.get("ps_version", "v1") != "v2":
        raise UserError(f"{where}: ps_version must be 'v2', found {published.get('ps_version')!r}")
    forced = published.get("force_image_size")
    if forced and forced != vision.get("image_size"):
        raise UserError(
            f"{where}: force_image_size is {forced} and vision_config.image_size {vision.get('image_size')}; "
            "the native class takes one size"
        )
    if vision.get("qk_normalization", True) and vision.get("layer_norm_eps", UNSCALED_EPS) != UNSCALED_EPS:
        raise UserError(f"{where}: query/key normalisation needs layer_norm_eps {UNSCALED_EPS}, the native class's own")
    for key in ("use_backbone_lora", "use_llm_lora"):
        if published.get(key):
            raise UserError(f"{where}: {key} is {published[key]}; merge the LoRA weights upstream first")


def check_language(language: Mapping[str, Any], where: Path) -> str:
    """The language architecture's name; `UserError` when it is unknown."""
    architecture = _first(language.get("architectures"), None)
    if not isinstance(architecture, str) or architecture not in LANGUAGE_MODEL_TYPES:
        code = ", and it would need remote code (auto_map), which MIRage never runs" if language.get("auto_map") else ""
        known = ", ".join(LANGUAGE_MODEL_TYPES)
        raise UserError(f"{where}: llm_config.architectures is {architecture!r}{code}; known are {known}")
    if language.get("rope_pos_id_version", "default") != "default":
        raise UserError(f"{where}: rope_pos_id_version {language['rope_pos_id_version']!r} has no native counterpart")
    return str(architecture)


def _native_vision(vision: Mapping[str, Any], where: Path) -> dict[str, Any]:
    fields = {
        native: vision.get(name, _VISION_DEFAULTS[name]) if name in _VISION_DEFAULTS else _number(vision, name, where)
        for name, native in _VISION_FIELDS.items()
    }
    return fields | {"use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True}


def _native_text(language: Mapping[str, Any], where: Path) -> dict[str, Any]:
    architecture = check_language(language, where)
    fields = {
        name: language.get(name, _TEXT_DEFAULTS[name]) if name in _TEXT_DEFAULTS else _number(language, name, where)
        for name in _TEXT_FIELDS
        if name != "num_key_value_heads"
    }
    fields["num_key_value_heads"] = language.get("num_key_value_heads") or fields["num_attention_heads"]
    fields |= {name: language[name] for name in _OPTIONAL_TEXT_FIELDS if language.get(name) is not None}
    if architecture == INTERNLM2:
        # InternLM2's one `bias` covers wqkv and wo; its feed-forward never has one.
        fields |= {"attention_bias": bool(language.get("bias", False)), "mlp_bias": False}
    fields["rope_parameters"] = _rope(language, where)
    return fields | {"model_type": LANGUAGE_MODEL_TYPES[architecture], "use_cache": True}


def _rope(language: Mapping[str, Any], where: Path) -> dict[str, Any]:
    scaling = dict(language.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind not in ("default", "linear", "dynamic") and language["architectures"][0] == INTERNLM2:
        raise UserError(f"{where}: llm_config.rope_scaling type {kind!r} is not linear or dynamic, as InternLM2 has it")
    if kind in ("linear", "dynamic") and not isinstance(scaling.get("factor"), (int, float)):
        raise UserError(f"{where}: llm_config.rope_scaling needs a number as factor, found {scaling.get('factor')!r}")
    return {"rope_type": kind, "rope_theta": float(language.get("rope_theta") or 10000.0), **scaling}


def published_config(native: Mapping[str, Any], *, architecture: str | None = None) -> dict[str, Any]:
    """A published config for native weights that bring none of their own (they were not converted by MIRage).

    A Llama language model is written as InternLM2, which is what the published sizes with that shape are, unless it
    uses something that InternLM2 has not.
    """
    text, vision = native["text_config"], native["vision_config"]
    architecture = architecture or _published_language(text)
    image_size, patch_size = _edge(vision["image_size"]), _edge(vision["patch_size"])
    return {
        "architectures": [PUBLISHED_ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{HUB_CODE}--configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": f"{HUB_CODE}--modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": f"{HUB_CODE}--modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": native.get("downsample_ratio", 0.5),
        "dynamic_image_size": True,
        "force_image_size": image_size,
        "hidden_size": text["hidden_size"],
        "llm_config": _published_text(text, architecture),
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": PUBLISHED_MODEL_TYPE,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": native.get("vision_feature_layer", -1),
        "template": "internvl2_5",
        "tie_word_embeddings": bool(native.get("tie_word_embeddings", False)),
        "torch_dtype": native.get("dtype") or native.get("torch_dtype"),
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            name: vision[native_name] for name, native_name in _VISION_FIELDS.items() if native_name in vision
        }
        | {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": image_size,
            "patch_size": patch_size,
            "drop_path_rate": 0.0,
            "use_flash_attn": True,
        },
    }


def _published_language(text: Mapping[str, Any]) -> str:
    if text.get("model_type") == "llama":
        plain = not text.get("mlp_bias") and text.get("head_dim") in (
            None,
            text["hidden_size"] // text["num_attention_heads"],
        )
        kind = text["rope_parameters"]["rope_type"]
        return INTERNLM2 if plain and kind in ("default", "linear", "dynamic") else "LlamaForCausalLM"
    names = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    if text.get("model_type") not in names:
        raise UserError(
            f"text_config.model_type {text.get('model_type')!r} has no published layout (llama, qwen2, qwen3)"
        )
    return names[text["model_type"]]


def _published_text(text: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    rope = dict(text["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    fields = {name: text.get(name) for name in _TEXT_FIELDS}
    fields |= {"architectures": [architecture], "use_cache": True, "rope_theta": theta}
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    fields["tie_word_embeddings"] = bool(text.get("tie_word_embeddings", False))
    if architecture == INTERNLM2:
        code = f"{HUB_CODE}--"
        return fields | {
            "model_type": "internlm2",
            "bias": bool(text.get("attention_bias", False)),
            "attn_implementation": "eager",
            "auto_map": {
                "AutoConfig": f"{code}configuration_internlm2.InternLM2Config",
                "AutoModel": f"{code}modeling_internlm2.InternLM2ForCausalLM",
                "AutoModelForCausalLM": f"{code}modeling_internlm2.InternLM2ForCausalLM",
            },
        }
    return (
        fields
        | {name: text[name] for name in _OPTIONAL_TEXT_FIELDS if name in text}
        | {"model_type": text["model_type"]}
    )


def differing_fields(one: InternVLConfig, other: InternVLConfig) -> list[str]:
    """Names of the fields that shape the computation and differ between two native configs."""
    ignored = {
        "dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "layer_scale_init_value",
        "architectures",
    }
    ignored.add("layer_scale_init_value")
    # Token ids say how text is made, not what the weights compute.
    ignored |= {"bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "_name_or_path"}
    left, right = _flatten(one.to_dict()), _flatten(other.to_dict())
    names = sorted(set(left) | set(right))
    return [name for name in names if name.rsplit(".", 1)[-1] not in ignored and left.get(name) != right.get(name)]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            flat |= _flatten(entry, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(entry) if isinstance(entry, tuple) else entry
    return flat


def _number(section: Mapping[str, Any], name: str, where: Path) -> Any:
    value = section.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: {name} must be a number, found {value!r}")
    return value


def _first(values: Any, default: Any) -> Any:
    return values[0] if isinstance(values, (list, tuple)) and values else default


def _edge(size: Any) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size
