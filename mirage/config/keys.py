"""The keys of the recipe tree: walking a dotted key to its field, and the nearest valid key to a mistyped one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rapidfuzz.distance import OSA

from mirage.config.schema import Recipe
from mirage.config.values import is_section, item_type, strip_optional

KeyPath = tuple[str | int, ...]
ANY_INDEX = "N"
_MAX_DISTANCE_SHARE = 0.34

# Names that other trainers use (transformers, LLaMA-Factory, ms-swift, InternVL) for what a key here says.
SYNONYMS = {
    "adapter": "model.lora",
    "attn_implementation": "model.attention",
    "base_model": "model.path",
    "batch_size": "train.batch_samples",
    "bf16": "train.precision",
    "checkpoint_dir": "run_dir",
    "clip": "train.clip_norm",
    "cutoff_len": "data.pack_tokens",
    "data_path": "data.dir",
    "dataset": "data.dir",
    "dataset_dir": "data.dir",
    "deepspeed": "train.zero_stage",
    "dtype": "train.precision",
    "effective_batch_size": "train.batch_samples",
    "epochs": "train.epochs",
    "eval_batch_size": "eval.batch_size",
    "fp16": "train.precision",
    "fp32": "train.precision",
    "freeze_vision_tower": "model.train",
    "freeze_backbone": "model.train",
    "freeze_llm": "model.train",
    "freeze_mlp": "model.train",
    "freeze_multi_modal_projector": "model.train",
    "global_batch_size": "train.batch_samples",
    "grad_accumulation": "train.batch_samples",
    "gradient_accumulation_steps": "train.batch_samples",
    "learning_rate": "train.lr",
    "logging_steps": "train.log_every",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_target": "model.lora.targets",
    "lr_scheduler_type": "train.schedule",
    "max_dynamic_patch": "preprocessing.max_tiles",
    "max_grad_norm": "train.clip_norm",
    "max_length": "data.pack_tokens",
    "max_patches": "preprocessing.max_tiles",
    "max_seq_length": "data.pack_tokens",
    "mixed_precision": "train.precision",
    "model_name_or_path": "model.path",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "optimizer_offload": "train.offload_optimizer",
    "output_dir": "run_dir",
    "per_device_train_batch_size": "data.pack_tokens",
    "project_name": "tracking.project",
    "r": "model.lora.rank",
    "report_to": "tracking.wandb",
    "run_name": "name",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "scheduler": "train.schedule",
    "target_modules": "model.lora.targets",
    "torch_dtype": "train.precision",
    "train_batch_size": "train.batch_samples",
    "trainable": "model.train",
    "wandb_project": "tracking.project",
    "warmup": "train.warmup_ratio",
    "warmup_steps": "train.warmup_steps",
    "wd": "train.weight_decay",
    "zero": "train.zero_stage",
}


class UnknownKey(Exception):
    """A key leaves the tree; `valid` is how far it was right."""

    def __init__(self, valid: KeyPath) -> None:
        super().__init__(join(valid))
        self.valid = valid


@dataclass(frozen=True)
class Target:
    """Where a key leads: its type, and the schema field that holds it (a list's field for an item of the list)."""

    annotation: Any
    field: FieldInfo | None


def join(path: Sequence[str | int]) -> str:
    """A path as a dotted key."""
    return ".".join(str(part) for part in path)


def split(key: str) -> KeyPath:
    """A dotted key as a path; parts of digits are list positions."""
    return tuple(int(part) if part.isascii() and part.isdigit() else part for part in key.split("."))


def resolve(path: Sequence[str | int], root: type[BaseModel] = Recipe) -> Target:
    """Follow `path` through the schema; raises `UnknownKey` where it leaves it."""
    target = Target(root, None)
    for depth, part in enumerate(path):
        kind, _ = strip_optional(target.annotation)
        if is_section(kind) and isinstance(part, str) and part in kind.model_fields:
            field = kind.model_fields[part]
            target = Target(field.annotation, field)
        elif isinstance(part, int) and item_type(kind, part) is not None:
            target = Target(item_type(kind, part), target.field)
        else:
            raise UnknownKey(tuple(path[:depth]))
    return target


def all_keys(root: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the tree in the schema's order, sections before their keys; list positions are written N."""
    for name, field in root.model_fields.items():
        key = prefix + name
        yield key, field
        kind, _ = strip_optional(field.annotation)
        if is_section(kind):
            yield from all_keys(kind, key + ".")
        elif (item := item_type(kind)) is not None and is_section(item):
            yield from all_keys(item, f"{key}.{ANY_INDEX}.")


# Nothing longer is a key with a letter wrong, and the search takes time by its length.
MAX_WORD_CHARS = 100


def nearest_key(path: Sequence[str | int]) -> str | None:
    """The valid key that was most likely meant, or None.

    A name that other trainers use for it wins; then the smallest edit distance, on the whole key or on its last part.
    """
    indices = [str(part) for part in path if isinstance(part, int)]
    if sum(len(str(part)) + 1 for part in path) > MAX_WORD_CHARS:
        return None
    key = ".".join(ANY_INDEX if isinstance(part, int) else str(part) for part in path).replace("-", "_").lower()
    parent, _, last = key.rpartition(".")
    synonym = SYNONYMS.get(last)
    candidates = [candidate for candidate, _ in all_keys()]
    if synonym and not any(candidate == f"{parent}.{last}" for candidate in candidates):
        exact = [c for c in candidates if c == f"{parent}.{synonym.rpartition('.')[2]}"]
        return _with_indices((exact or [synonym])[0], indices)

    def cost(candidate: str) -> tuple[float, int]:
        candidate_parent, _, candidate_last = candidate.rpartition(".")
        whole = OSA.distance(key, candidate.lower())
        # A right last part under a wrong section is nearer than a whole key with as many wrong letters.
        moved = OSA.distance(last, candidate_last) + (0.0 if candidate_parent == parent else 0.5)
        # A bare word tells nothing of its section: the first key of the schema that fits it is meant.
        return min(whole, moved), whole if parent else 0

    best = min(candidates, key=cost)
    limit = max(1.5, _MAX_DISTANCE_SHARE * len(last))
    return _with_indices(best, indices) if cost(best)[0] <= limit else None


def _with_indices(key: str, indices: list[str]) -> str:
    given = iter(indices)
    return ".".join(next(given, "0") if part == ANY_INDEX else part for part in key.split("."))


def nearest_word(word: str, words: Sequence[str]) -> str | None:
    """The word nearest to `word` by edit distance, else the first that contains it; None when none is near."""
    if len(word) > MAX_WORD_CHARS:
        return None
    best = min(words, key=lambda other: (OSA.distance(word.lower(), other.lower()), other), default=None)
    if best is None or OSA.distance(word.lower(), best.lower()) > max(2, 0.4 * len(word)):
        return next((other for other in words if word.lower() in other.lower()), None) if word else None
    return best
