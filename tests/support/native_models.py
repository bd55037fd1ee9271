"""Tiny random-weight models of families that only evaluation knows, each with its own processor, made offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
    "<|vision_end|>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>",
    "[IMG]", "[IMG_BREAK]", "[IMG_END]", "TILE", "TILE_GLOBAL", "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>",
    "<row_2_col_2>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}MARK{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(named: dict[str, str]) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of every family; `named` are attributes such as image_token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=built, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named
    )


def _siglip(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "image_size": 56, "patch_size": 14, "model_type": "siglip_vision_model", **more}


def _qwen_vision(**more: Any) -> dict[str, Any]:
    return {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "intermediate_size": 64, "out_hidden_size": 32, **more}  # fmt: skip


def _mrope(ids: Callable[[str], int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return {"rope_parameters": rope, **ids_of_qwen(ids)}


def ids_of_qwen(ids: Callable[[str], int]) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {key: ids(token) for key, token in names.items()}


QWEN_IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, "temporal_patch_size": 2}
QWEN_IMAGES |= {"size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}}


def _families(ids: Callable[[str], int]) -> dict[str, dict[str, Any]]:
    """By model_type: config, the image processor's settings, the processor's, and the placeholder in the template."""
    return _idefics(ids) | _llava(ids) | _qwen(ids) | _others(ids)


def _idefics(ids: Callable[[str], int]) -> dict[str, dict[str, Any]]:
    image = ids("<image>")
    llama = {**TEXT, "model_type": "llama"}
    return {
        "idefics3": {
            "config": {"text_config": llama, "vision_config": _siglip(model_type="idefics3_vision"), "scale_factor": 2,
                       "image_token_id": image},
            "images": {"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 112},
                       "max_image_size": {"longest_edge": 56}},
            "processor": {"processor_class": "Idefics3Processor", "image_seq_len": 4},
            "mark": "<image>",
        },
        "idefics2": {
            "config": {"text_config": {**TEXT, "model_type": "mistral"}, "image_token_id": image,
                       "vision_config": _siglip(model_type="idefics2_vision"),
                       "perceiver_config": {"model_type": "idefics2_perceiver", "hidden_size": 32,
                                            "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                                            "resampler_head_dim": 16, "num_key_value_heads": 1}},
            "images": {"image_processor_type": "Idefics2ImageProcessor",
                       "size": {"shortest_edge": 28, "longest_edge": 56}, "do_image_splitting": False},
            "processor": {"processor_class": "Idefics2Processor", "image_seq_len": 4},
            "mark": "<image>",
        },
        "smolvlm": {
            "config": {"text_config": llama, "vision_config": _siglip(model_type="smolvlm_vision"), "scale_factor": 2,
                       "image_token_id": image},
            "images": {"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 112},
                       "max_image_size": {"longest_edge": 56}},
            "processor": {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
            "mark": "<image>",
        },
    }  # fmt: skip


def _llava(ids: Callable[[str], int]) -> dict[str, dict[str, Any]]:
    image = ids("<image>")
    square = {"height": 56, "width": 56}
    grid = [[56, 112], [112, 56], [112, 112]]
    qwen_text = {**TEXT, "model_type": "qwen2"}
    llama = {**TEXT, "model_type": "llama"}
    return {
        "llava": {
            "config": {"text_config": llama, "vision_config": _siglip(), "image_token_index": image,
                       "image_token_id": image, "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
            "images": {"image_processor_type": "SiglipImageProcessor", "size": square},
            "processor": {"processor_class": "LlavaProcessor", "patch_size": 14,
                          "vision_feature_select_strategy": "full"},
            "mark": "<image>",
        },
        "llava_next": {
            "config": {"text_config": qwen_text, "vision_config": _siglip(), "image_token_index": image,
                       "image_token_id": image, "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
                       "image_grid_pinpoints": grid},
            "images": {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 56},
                       "crop_size": square, "image_grid_pinpoints": grid},
            "processor": {"processor_class": "LlavaNextProcessor", "patch_size": 14,
                          "vision_feature_select_strategy": "full"},
            "mark": "<image>",
        },
        "llava_onevision": {
            "config": {"text_config": qwen_text, "vision_config": _siglip(), "image_token_index": image,
                       "image_token_id": image, "video_token_index": ids("<video>"), "video_token_id": ids("<video>"),
                       "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
                       "image_grid_pinpoints": grid},
            "images": {"image_processor_type": "LlavaOnevisionImageProcessor", "size": square,
                       "image_grid_pinpoints": grid},
            "processor": {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16,
                          "vision_feature_select_strategy": "full"},
            "mark": "<image>",
        },
    }  # fmt: skip


def _qwen(ids: Callable[[str], int]) -> dict[str, dict[str, Any]]:
    rope = _mrope(ids)
    return {
        "qwen2_5_vl": {
            "config": {"text_config": {**TEXT, **rope}, "vision_config": _qwen_vision(fullatt_block_indexes=[1],
                       window_size=56), **ids_of_qwen(ids)},
            "images": {**QWEN_IMAGES, "patch_size": 14},
            "processor": {"processor_class": "Qwen2_5_VLProcessor"},
            "mark": "<|vision_start|><|image_pad|><|vision_end|>",
        },
        "qwen3_vl": {
            "config": {"text_config": {**TEXT, **rope}, "vision_config": _qwen_vision(deepstack_visual_indexes=[0],
                       num_position_embeddings=64), **ids_of_qwen(ids)},
            "images": {**QWEN_IMAGES, "patch_size": 14},
            "processor": {"processor_class": "Qwen3VLProcessor"},
            "mark": "<|vision_start|><|image_pad|><|vision_end|>",
        },
    }  # fmt: skip


def _others(ids: Callable[[str], int]) -> dict[str, dict[str, Any]]:
    square = {"height": 56, "width": 56}
    return {
        "gemma3": {
            "config": {"text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 64},
                       "vision_config": _siglip(), "mm_tokens_per_image": 4,
                       "image_token_index": ids("<image_soft_token>"),
                       "image_token_id": ids("<image_soft_token>"), "boi_token_index": ids("<start_of_image>"),
                       "eoi_token_index": ids("<end_of_image>")},
            "images": {"image_processor_type": "Gemma3ImageProcessor", "size": square},
            "processor": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
            "mark": "<start_of_image>",
            "named": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                      "image_token": "<image_soft_token>"},
        },
        "aya_vision": {
            "config": {"text_config": {**TEXT, "model_type": "cohere2", "sliding_window": 64},
                       "vision_config": _siglip(), "image_token_index": ids("<|IMG_PATCH|>"),
                       "image_token_id": ids("<|IMG_PATCH|>"),
                       "downsample_factor": 2, "adapter_layer_norm_eps": 1e-6, "vision_feature_layer": -1},
            "images": {"image_processor_type": "GotOcr2ImageProcessor", "size": square, "crop_to_patches": True,
                       "max_patches": 4},
            "processor": {"processor_class": "AyaVisionProcessor", "patch_size": 14, "img_size": 56,
                          "downsample_factor": 2},
            "mark": "<image>",
        },
    }  # fmt: skip


def write_native(folder: Path, model_type: str) -> Path:
    """A folder as such a model is published: weights, config, tokenizer, image processor, processor, chat template."""
    folder.mkdir(parents=True)
    plain = tokenizer({})
    family = _families(plain.convert_tokens_to_ids)[model_type]
    tokens = tokenizer(family["named"]) if "named" in family else plain
    eos = tokens.eos_token_id
    text = {"vocab_size": len(tokens), "eos_token_id": eos, "pad_token_id": tokens.pad_token_id}
    settings = dict(family["config"])
    settings["text_config"] = {**settings["text_config"], **text}
    config = AutoConfig.for_model(model_type, tie_word_embeddings=False, eos_token_id=eos, **settings)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = tokens.pad_token_id
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("MARK", family["mark"]))
    (folder / "preprocessor_config.json").write_text(json.dumps(family["images"]))
    (folder / "processor_config.json").write_text(json.dumps(family["processor"]))
    return folder
