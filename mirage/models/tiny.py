"""Small models of the real architectures, built from nothing and from a dataset folder's own text and pictures.

Sizes and initial scales are those that learn in minutes on two CPU cores: with the usual 0.02 the language model never
learns to look at its pictures, and a vision tower trained only through the language loss stays at chance.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
)

from mirage.config.schema import Family, PreprocessingConfig, TinyConfig
from mirage.data.row import Row, canonical_json
from mirage.data.sources import read_rows
from mirage.errors import UserError
from mirage.models.adapter import ModelAdapter, Picture, PreprocessingSpec
from mirage.models.attention import PACKED_SDPA
from mirage.models.registry import FAMILIES, cache_dir

BUILD_VERSION = 1
MAX_TOKENS = 8192
TRAIN_SPLITS = ("train", "train_twins", "train_general")
PICTURES_PER_CONCEPT = 40
WARMUP_BATCH = 128
SPECIAL_TOKENS = {
    "internvl": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"],
    "qwen2_vl": [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ],
}


def tiny_folder(
    family: Family, config: TinyConfig, preprocessing: PreprocessingConfig, *, data_dir: Path, seed: int
) -> Path:
    """The folder of the tiny model for these settings and this dataset, built on the first call, cached after it.

    The same settings, seed and dataset give the same bytes on the same machine. Safe to call from several processes.
    """
    manifest = data_dir / "manifest.json"
    if not manifest.exists():
        raise UserError(f"{data_dir} is no dataset folder (no manifest.json); write one with: make datagen OUT={data_dir}")
    identity = [BUILD_VERSION, family, config.model_dump(), preprocessing.model_dump(), seed, manifest.read_text()]
    key = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]
    folder = cache_dir() / "tiny" / f"{family}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            aside = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            build_tiny(aside, family, config, preprocessing, data_dir=data_dir, seed=seed)
            aside.replace(folder)
    return folder


def build_tiny(
    folder: Path,
    family: Family,
    config: TinyConfig,
    preprocessing: PreprocessingConfig,
    *,
    data_dir: Path,
    seed: int,
) -> None:
    """Write tokenizer, weights, config and preprocessing spec of a tiny model into `folder`."""
    rows = [row for row in read_rows(data_dir, splits=TRAIN_SPLITS)]
    texts = [message.text for row in rows for message in row.messages]
    tokenizer = train_tokenizer(texts, family=family, vocab_size=config.vocab_size)
    adapter_class, model_class = FAMILIES[family]
    model_config = _model_config(family, config, preprocessing, tokenizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class._from_config(model_config, attn_implementation=PACKED_SDPA, dtype=torch.float32)
            spec = PreprocessingSpec(family=family, **preprocessing.model_dump())
            adapter = adapter_class(tokenizer, model.config, spec)
            metrics = warm_up_vision(model, adapter, rows, data_dir=data_dir, config=config, seed=seed)
    finally:
        torch.set_num_threads(threads)
    model.generation_config.eos_token_id = adapter.stop_ids
    model.generation_config.pad_token_id = adapter.pad_id
    model.save_pretrained(folder)
    adapter.save_files(folder)
    (folder / "tiny.json").write_text(json.dumps({"config": config.model_dump(), **metrics}, indent=2) + "\n")


def train_tokenizer(texts: Iterable[str], *, family: Family, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over `texts`, with the family's real special tokens at its first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS[family],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _model_config(family: Family, config: TinyConfig, preprocessing: PreprocessingConfig, tokenizer: Any) -> Any:
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": MAX_TOKENS,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "tie_word_embeddings": False,
    }
    if family == "internvl":
        edge = preprocessing.image_size
        return InternVLConfig(
            text_config=LlamaConfig(**text),
            vision_config=InternVLVisionConfig(
                hidden_size=config.vision_hidden_size,
                num_hidden_layers=config.vision_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=3 * config.vision_hidden_size,
                image_size=[edge, edge],
                patch_size=[14, 14],
                attention_bias=True,
                use_qk_norm=False,
                norm_type="layer_norm",
                layer_scale_init_value=1.0,
                use_absolute_position_embeddings=True,
                initializer_range=config.vision_init_std,
            ),
            image_token_id=token_id("<IMG_CONTEXT>"),
            image_seq_length=(edge // 14 // 2) ** 2,
            downsample_ratio=0.5,
            vision_feature_layer=-1,
            tie_word_embeddings=False,
        )
    pairs = config.hidden_size // config.num_heads // 2
    third = 3 * pairs // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs - 2 * third, third, third]}
    return Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={
            "depth": config.vision_layers,
            "embed_dim": config.vision_hidden_size,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_heads,
            "mlp_ratio": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": config.vision_init_std,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def warm_up_vision(
    model: Any, adapter: ModelAdapter, rows: list[Row], *, data_dir: Path, config: TinyConfig, seed: int
) -> dict[str, Any]:
    """Teach the vision tower and projector to tell the training pictures' concepts apart; the class head is thrown away.

    Returns the number of concepts and pictures and the accuracy on the last tenth of the steps.
    """
    pictures, labels, concepts = _concept_pictures(rows, adapter, data_dir)
    if config.warmup_steps == 0 or len(concepts) < 2:
        return {"warmup_concepts": len(concepts), "warmup_accuracy": None}
    head = torch.nn.Linear(config.hidden_size, len(concepts))
    trained = [
        parameter for name, parameter in model.named_parameters() if adapter.group_of(name) in ("vision", "projector")
    ] + list(head.parameters())
    optimizer = torch.optim.AdamW(trained, lr=config.warmup_lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.warmup_lr, total_steps=config.warmup_steps, pct_start=0.1, final_div_factor=50
    )
    order = random.Random(seed)
    right: list[float] = []
    model.train()
    for _ in range(config.warmup_steps):
        chosen = [order.randrange(len(pictures)) for _ in range(WARMUP_BATCH)]
        inputs = adapter.picture_inputs([pictures[index] for index in chosen])
        pooled = picture_vectors(model, inputs, [pictures[index].num_tokens for index in chosen])
        logits = head(pooled)
        target = labels[torch.tensor(chosen)]
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        right.append((logits.argmax(1) == target).float().mean().item())
    last = right[-max(1, len(right) // 10) :]
    return {"warmup_concepts": len(concepts), "warmup_accuracy": round(sum(last) / len(last), 4)}


def picture_vectors(model: Any, inputs: dict[str, torch.Tensor], num_tokens: list[int]) -> torch.Tensor:
    """Mean projected feature of each picture, [pictures, H]."""
    features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    flat = torch.cat(list(features)) if isinstance(features, (tuple, list)) else features.flatten(0, 1)
    return torch.stack([part.mean(0) for part in flat.split(num_tokens)])


def _concept_pictures(
    rows: list[Row], adapter: ModelAdapter, data_dir: Path
) -> tuple[list[Picture], torch.Tensor, list[str]]:
    paths: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for image in row.images:
            if image.concept:
                paths[image.concept].add(image.path)
    concepts = sorted(paths)
    pictures, labels = [], []
    for label, concept in enumerate(concepts):
        for path in sorted(paths[concept])[:PICTURES_PER_CONCEPT]:
            with Image.open(data_dir / path) as image:
                pictures.append(adapter.preprocess(image.convert("RGB"), num_images=2))
            labels.append(label)
    return pictures, torch.tensor(labels), concepts
