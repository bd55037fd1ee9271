"""Where a run's base weights come from: the recipe's path, or a small model built here."""

from __future__ import annotations

from pathlib import Path

from mirage.config.loader import require_weights
from mirage.config.schema import Recipe
from mirage.models.registry import find_weights


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
        )
    require_weights(recipe)
    assert recipe.model.path is not None
    return find_weights(recipe.model.path, revision=recipe.model.revision)
