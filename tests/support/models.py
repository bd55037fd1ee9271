"""Tiny models and rendered samples for numeric tests, built once a session from the shapes dataset."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mirage.config.schema import DataConfig, Family, PreprocessingConfig, SourceConfig, TinyConfig
from mirage.data.lengths import LengthIndex, index_rows
from mirage.data.pictures import PictureLoader
from mirage.data.render import Sample, render_sample
from mirage.data.row_list import RowList
from mirage.data.sources import load_mixture
from mirage.models import ModelAdapter, load_model
from mirage.models.tiny import build_tiny

PREPROCESSING = PreprocessingConfig(
    image_size=56, max_tiles=4, min_pixels=28 * 28, max_pixels=112 * 112, system_prompt=""
)
SMALL = TinyConfig(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128, vision_hidden_size=32,
    vision_layers=1, vocab_size=400, warmup_steps=0,
)  # fmt: skip


def build(folder: Path, family: Family, data_dir: Path) -> Path:
    """A small untrained model of `family` in `folder`."""
    folder.mkdir(parents=True)
    build_tiny(folder, family, SMALL, PREPROCESSING, data_dir=data_dir, seed=0)
    return folder


def fresh(folder: Path, **options: Any) -> tuple[Any, ModelAdapter]:
    """(model in training mode, adapter); two calls give equal weights."""
    torch.manual_seed(0)
    model, adapter = load_model(folder, **options)
    return model.train(), adapter


@lru_cache(maxsize=8)
def mixture(data_dir: Path, folder: Path, pack_tokens: int = 4096) -> tuple[RowList, LengthIndex]:
    """Rows of the training splits and their lengths under the model in `folder`."""
    _, adapter = load_model(folder)
    sources = tuple(SourceConfig(split=split) for split in ("train", "train_twins", "train_general"))
    config = DataConfig(dir=data_dir, sources=sources, pack_tokens=pack_tokens)
    rows, index, _ = index_rows(load_mixture(config, seed=0).rows, adapter, config)
    return rows, index


def samples(data_dir: Path, folder: Path, adapter: ModelAdapter, numbers: list[int]) -> list[Sample]:
    """Rendered training samples by number."""
    rows, _ = mixture(data_dir, folder)
    loader = PictureLoader(adapter, cache_bytes=1 << 24)
    return [render_sample(rows[number], adapter, loader) for number in numbers]


def flat_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name; zeros where there is none."""
    return {
        name: (torch.zeros_like(p) if p.grad is None else p.grad.detach().clone())
        for name, p in model.named_parameters()
    }


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all tensors over the norm of the right ones."""
    difference = sum(((left[name] - right[name]).double() ** 2).sum() for name in right)
    scale = sum((right[name].double() ** 2).sum() for name in right)
    return float((difference / scale) ** 0.5)
