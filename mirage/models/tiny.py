"""Small models of the real architectures, built from nothing and from a dataset folder's own text and pictures.

Sizes and initial scales are those that learn in minutes on two CPU cores: with the usual 0.02 the language model never
learns to look at its pictures, and a vision tower trained only through the language loss stays at chance.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
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
from mirage.files import cache_dir
from mirage.models.adapter import ModelAdapter, Picture, PreprocessingSpec
from mirage.models.attention import PACKED_SDPA
from mirage.models.registry import FAMILIES

BUILD_VERSION = 3
MAX_TOKENS = 8192
# What chat templates put around the rows' own text; often enough that each word becomes one token.
TEMPLATE_TEXTS = ("system\n", "user\n", "assistant\n", "Image-1: \n", "Image-2: \n", "Image-3: \n", "Image-4: \n")
TEMPLATE_REPEATS = 100
TRAIN_SPLITS = ("train", "train_twins", "train_general")
PICTURES_PER_CONCEPT = 40
WARMUP_EDGE = 72
# Look-up tables that make a colour channel up to a tenth darker or brighter.
TINTS = [[min(255, value * percent // 100) for value in range(256)] for percent in range(90, 111, 2)]
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
    family: Family,
    config: TinyConfig,
    preprocessing: PreprocessingConfig,
    *,
    data_dir: Path,
    seed: int,
    on_build: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """The folder of the tiny model for these settings and this dataset, built on the first call, cached after it.

    `on_build` hears of the folder that is about to be built, by the one process that builds it.
    The same settings, seed and dataset give the same bytes on the same machine. Safe to call from several processes.
    """
    manifest = data_dir / "manifest.json"
    if not manifest.exists():
        raise UserError(
            f"{data_dir} is no dataset folder (no manifest.json); write one with: make datagen OUT={data_dir}"
        )
    identity = [BUILD_VERSION, family, config.model_dump(), preprocessing.model_dump(), seed, manifest.read_text()]
    key = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]
    folder = cache_dir() / "tiny" / f"{family}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            aside = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            on_build(folder)
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
    rows = list(read_rows(data_dir, splits=TRAIN_SPLITS))
    texts = [message.text for row in rows for message in row.messages]
    tokenizer = train_tokenizer(texts, family=family, vocab_size=config.vocab_size)
    adapter_class, model_class = FAMILIES[family]
    network = model_config(family, config, preprocessing, tokenizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class._from_config(network, attn_implementation=PACKED_SDPA, dtype=torch.float32)
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
    tokenizer.train_from_iterator([*sorted(set(texts)), *TEMPLATE_TEXTS * TEMPLATE_REPEATS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def model_config(family: Family, config: TinyConfig, preprocessing: PreprocessingConfig, tokenizer: Any) -> Any:
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
    """Teach vision tower and projector to tell the training pictures' concepts apart; the class head is thrown away.

    Each time a picture is seen it is turned, scaled, shifted, mirrored and tinted anew: the few pictures of a concept
    are otherwise learnt by heart. Returns the number of concepts and the accuracy on pictures kept out.
    """
    concepts = _concept_paths(rows)
    if config.warmup_steps == 0 or len(concepts) < 2:
        return {"warmup_concepts": len(concepts), "warmup_heldout_accuracy": None}
    chance = random.Random(seed)
    edge = adapter.spec.image_size
    train, heldout = _labelled_pictures(concepts, data_dir)
    head = torch.nn.Linear(config.hidden_size, len(concepts))
    groups = ("vision", "projector")
    trained = [parameter for name, parameter in model.named_parameters() if adapter.group_of(name) in groups]
    trained += list(head.parameters())
    optimizer = torch.optim.AdamW(trained, lr=config.warmup_lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.warmup_lr, total_steps=config.warmup_steps, pct_start=0.1, final_div_factor=50
    )

    def next_batch() -> list[tuple[Picture, int]]:
        chosen = [chance.choice(train) for _ in range(WARMUP_BATCH)]
        return [
            (adapter.preprocess(vary(picture, chance, edge=edge), num_images=2), label) for picture, label in chosen
        ]

    model.train()
    for _ in range(config.warmup_steps):
        logits, labels = _classify(model, adapter, head, next_batch())
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        kept_out = [(adapter.preprocess(picture, num_images=2), label) for picture, label in heldout]
        logits, labels = _classify(model, adapter, head, kept_out)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"warmup_concepts": len(concepts), "warmup_heldout_accuracy": round(accuracy, 4)}


def _classify(
    model: Any, adapter: ModelAdapter, head: torch.nn.Linear, batch: list[tuple[Picture, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class scores [pictures, concepts] and labels [pictures]."""
    pictures = [picture for picture, _ in batch]
    with torch.autocast("cpu", torch.bfloat16):
        pooled = picture_vectors(model, adapter.picture_inputs(pictures), [picture.num_tokens for picture in pictures])
    return head(pooled.float()), torch.tensor([label for _, label in batch])


def picture_vectors(model: Any, inputs: dict[str, torch.Tensor], num_tokens: list[int]) -> torch.Tensor:
    """Mean projected feature of each picture, [pictures, H]."""
    features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    flat = torch.cat(list(features)) if isinstance(features, (tuple, list)) else features.flatten(0, 1)
    return torch.stack([part.mean(0) for part in flat.split(num_tokens)])


def _concept_paths(rows: list[Row]) -> dict[str, list[str]]:
    """Picture paths of each concept that the rows show, both sorted."""
    paths: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for image in row.images:
            if image.concept:
                paths[image.concept].add(image.path)
    return {concept: sorted(paths[concept])[:PICTURES_PER_CONCEPT] for concept in sorted(paths)}


def _labelled_pictures(
    concepts: dict[str, list[str]], data_dir: Path
) -> tuple[list[tuple[Image.Image, int]], list[tuple[Image.Image, int]]]:
    """(training pictures, pictures kept out: one in twelve), with labels; small, since the tower sees them small."""
    train: list[tuple[Image.Image, int]] = []
    heldout: list[tuple[Image.Image, int]] = []
    for label, paths in enumerate(concepts.values()):
        for number, path in enumerate(paths):
            (heldout if number < len(paths) // 12 else train).append((small_picture(data_dir / path), label))
    return train, heldout or train


def small_picture(path: Path) -> Image.Image:
    """A picture as small as a tiny tower sees it, with a margin to turn and shift it in."""
    with Image.open(path) as image:
        return image.convert("RGB").resize((WARMUP_EDGE, WARMUP_EDGE), Image.Resampling.BICUBIC)


def vary(picture: Image.Image, chance: random.Random, *, edge: int) -> Image.Image:
    """A turned, scaled, shifted, perhaps mirrored and tinted copy of `edge` x `edge` pixels."""
    size = picture.width
    angle, scale = chance.uniform(-0.15, 0.15), chance.uniform(0.85, 1.2) * size / edge
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    mirror = chance.choice((-1, 1))
    x = size * (0.5 + chance.uniform(-0.1, 0.1)) - (mirror * cos - sin) * edge / 2
    y = size * (0.5 + chance.uniform(-0.1, 0.1)) - (mirror * sin + cos) * edge / 2
    matrix = (mirror * cos, -sin, x, mirror * sin, cos, y)
    border = picture.getpixel((0, 0))
    turned = picture.transform(
        (edge, edge), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=border
    )
    return turned.point([value for _ in range(3) for value in chance.choice(TINTS)])
