"""A run's weights: where the base comes from (the recipe's path, or a small model built here), and its trained form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mirage.config.loader import require_weights
from mirage.config.schema import Recipe
from mirage.models.adapter import ModelAdapter
from mirage.models.lora import load_adapter_weights, select_trainable
from mirage.models.quantize import load_quantized
from mirage.models.registry import find_weights, load_model
from mirage.tracking.console import make_console
from mirage.training.layers import checkpoint_layers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def find_base(recipe: Recipe) -> Path:
    """The folder of the untouched model, built, converted or downloaded first if need be.

    Raises `UserError` that says what is missing and how to get it.
    """
    if recipe.model.tiny is not None:
        from mirage.models.tiny import tiny_folder

        return tiny_folder(
            recipe.model.family,
            recipe.model.tiny,
            recipe.preprocessing,
            data_dir=recipe.data.dir,
            seed=recipe.train.seed,
            on_build=lambda folder: make_console(recipe.tracking.console).say(
                f"building the tiny model, once for this dataset and recipe, on the CPU: {folder}",
                event="tiny_model", folder=str(folder),
            ),
        )  # fmt: skip
    require_weights(recipe)
    assert recipe.model.path is not None
    return find_weights(recipe.model.path, revision=recipe.model.revision)


def load_for_training(
    recipe: Recipe, adapter: ModelAdapter, *, base: Path, trained: Path | None = None
) -> tuple[Any, Any]:
    """(model, peft's wrapper or None) on the CPU: frozen, quantised and given adapters as the recipe says.

    `trained` is a checkpoint's `model` folder to go on from; None takes the base weights.
    """
    attention, dtype = recipe.model.attention, DTYPES[recipe.train.precision]
    if recipe.model.quantize != "none":
        model = load_quantized(base, adapter, attention=attention, dtype=dtype)
    else:
        folder = trained if trained is not None and recipe.model.lora is None else base
        # Loaded on the CPU and moved by whoever trains it, to the GPU where there is one.
        runs_on = "cuda" if torch.cuda.is_available() else "cpu"
        model, _ = load_model(
            folder, preprocessing=recipe.preprocessing, attention=attention, dtype=dtype, runs_on=runs_on
        )
    peft_model = select_trainable(model, adapter, recipe.model, base=str(base), seed=recipe.train.seed)
    if trained is not None and peft_model is not None:
        load_adapter_weights(peft_model, trained)
    checkpoint_layers(model, adapter, recipe.train)
    if recipe.model.cache_vision_features != "off":
        adapter.accept_features(model)
    return model, peft_model
