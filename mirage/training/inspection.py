"""The truth before a run: what the first samples become, how steps are packed, what is trained and what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mirage.config.schema import Recipe
from mirage.data.lengths import LengthIndex, index_rows
from mirage.data.pack import PackPlan
from mirage.data.pictures import PictureLoader
from mirage.data.render import Sample, render_sample
from mirage.data.sources import SourcedRow, load_mixture
from mirage.models.adapter import IGNORE_INDEX, ModelAdapter
from mirage.models.lora import linear_layers
from mirage.models.registry import FAMILIES, load_adapter
from mirage.training.plan import PARTS, ParameterCounts, default_world_size, parameter_counts
from mirage.training.weights import find_base

Kind = Literal["prompt", "supervised", "image"]


@dataclass(frozen=True)
class Token:
    """A token as it is shown, or a run of `count` image placeholders."""

    text: str
    kind: Kind
    count: int = 1


@dataclass(frozen=True)
class InspectedSample:
    """One training sample as the model meets it."""

    row_id: str
    location: str
    source: str
    num_tokens: int
    num_image_tokens: int
    num_supervised_tokens: int
    weight: float
    tokens: tuple[Token, ...]
    # For each picture, its tiles (or the one resized picture) as RGB images.
    pictures: tuple[tuple[Image.Image, ...], ...]


@dataclass(frozen=True)
class InspectedStep:
    """Packs of one optimiser step: tokens of [micro-step][rank], and how long ranks wait (1 is never)."""

    number: int
    num_samples: int
    row_tokens: tuple[tuple[int, ...], ...]
    fill: float
    imbalance: float


@dataclass(frozen=True)
class PartSummary:
    """Parameters of one part of the model."""

    part: str
    total: int
    trained: int
    adapters: int
    saved: int


@dataclass(frozen=True)
class Inspection:
    """Everything that the page shows, as values."""

    recipe: Recipe
    base: Path
    world_size: int
    world_note: str
    num_steps: int
    lengths: LengthIndex
    left_out: tuple[str, ...]
    samples: tuple[InspectedSample, ...]
    steps: tuple[InspectedStep, ...]
    counts: ParameterCounts
    parts: tuple[PartSummary, ...]
    lora_modules: tuple[str, ...]
    saved_as: str
    preprocessing: dict[str, Any]


def inspect_recipe(
    recipe: Recipe, *, num_samples: int = 8, num_steps: int = 3, world_size: int | None = None
) -> Inspection:
    """Read the data and the base model's files (no weights) and work out what a run of `recipe` would do.

    Samples are the first of step 1. Raises `UserError` for data or a base model that the run could not use either.
    """
    base = find_base(recipe)
    adapter = load_adapter(base, preprocessing=recipe.preprocessing, trust_remote_code=recipe.model.trust_remote_code)
    mixture = load_mixture(recipe.data, seed=recipe.train.seed)
    rows, lengths, too_long = index_rows(mixture.rows, adapter, recipe.data)
    world_note = "as asked"
    if world_size is None:
        world_size, world_note = default_world_size(recipe)
    plan = PackPlan.from_recipe(lengths, recipe, world_size=world_size)
    loader = PictureLoader(adapter, cache_bytes=recipe.data.picture_cache_bytes)
    chosen = [rows[number] for number in plan.step_samples(0)[:num_samples].tolist()]
    counts = parameter_counts(adapter.config, adapter, recipe.model)
    return Inspection(
        recipe=recipe,
        base=base,
        world_size=world_size,
        world_note=world_note,
        num_steps=plan.num_steps,
        lengths=lengths,
        left_out=tuple(f"{entry.row_id} {entry.reason}".strip() for entry in [*mixture.left_out, *too_long]),
        samples=tuple(_sample(row, adapter, loader) for row in chosen),
        steps=tuple(_step(plan, lengths, recipe, step) for step in range(min(num_steps, plan.num_steps))),
        counts=counts,
        parts=tuple(_parts(counts, lora=recipe.model.lora is not None)),
        lora_modules=tuple(_lora_modules(adapter, recipe)),
        saved_as="adapters and the parts trained beside them (peft)" if recipe.model.lora else "the whole model",
        preprocessing=adapter.spec.model_dump(),
    )


def _sample(entry: SourcedRow, adapter: ModelAdapter, loader: PictureLoader) -> InspectedSample:
    sample = render_sample(entry, adapter, loader)
    tokens = shown_tokens(sample, adapter)
    return InspectedSample(
        row_id=entry.row.id,
        location=entry.location,
        source=entry.source,
        num_tokens=sample.num_tokens,
        num_image_tokens=sum(token.count for token in tokens if token.kind == "image"),
        num_supervised_tokens=sample.num_supervised_tokens,
        weight=entry.weight,
        tokens=tokens,
        pictures=tuple(tuple(adapter.picture_images(picture)) for picture in sample.pictures),
    )


def shown_tokens(sample: Sample, adapter: ModelAdapter) -> tuple[Token, ...]:
    """The sample's tokens with their mask; placeholders in a row become one, bytes of one character are joined."""
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    tokens: list[Token] = []
    start = 0
    while start < len(ids):
        end = start + 1
        if ids[start] == adapter.image_token_id:
            while end < len(ids) and ids[end] == ids[start]:
                end += 1
            tokens.append(Token(adapter.tokenizer.decode([ids[start]]), "image", end - start))
            start = end
            continue
        learnt = labels[start] != IGNORE_INDEX
        text = adapter.tokenizer.decode(ids[start:end])
        while "\ufffd" in text and end < min(len(ids), start + 8) and (labels[end] != IGNORE_INDEX) == learnt:
            end += 1
            text = adapter.tokenizer.decode(ids[start:end])
        tokens.append(Token(text, "supervised" if learnt else "prompt", end - start))
        start = end
    return tuple(tokens)


def _step(plan: PackPlan, lengths: LengthIndex, recipe: Recipe, step: int) -> InspectedStep:
    packed = plan.step(step)
    tokens = tuple(
        tuple(int(lengths.num_tokens[list(row)].sum()) if row else 0 for row in micro_step)
        for micro_step in packed.rows
    )
    fill = float(np.mean([count for micro_step in tokens for count in micro_step]) / recipe.data.pack_tokens)
    return InspectedStep(step + 1, len(packed.samples), tokens, fill, plan.imbalance(step))


def _parts(counts: ParameterCounts, *, lora: bool) -> list[PartSummary]:
    parts = []
    for part in PARTS:
        adapters = counts.adapters.get(part, 0)
        saved = counts.trained[part] + adapters if lora else counts.total[part]
        parts.append(PartSummary(part, counts.total[part], counts.trained[part], adapters, saved))
    return parts


def _lora_modules(adapter: ModelAdapter, recipe: Recipe) -> Sequence[str]:
    import torch

    if recipe.model.lora is None:
        return []
    _, model_class = FAMILIES[recipe.model.family]
    with torch.device("meta"):
        network = model_class(adapter.config)
    return adapter.lora_target_names(linear_layers(network), recipe.model.lora.targets)
