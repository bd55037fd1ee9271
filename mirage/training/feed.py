"""What the loop is fed with: the pictures a recipe asks for, and a rank's packed rows, prefetched."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from mirage.data.pictures import PictureLoader, PictureSource
from mirage.data.prefetch import PackDataset, StepLoader, worker_count
from mirage.data.tile_cache import open_tile_cache
from mirage.models.feature_homes import open_home
from mirage.models.vision_cache import FeatureMaker
from mirage.tracking.console import make_console
from mirage.training.distributed import gather_objects, sum_over_ranks
from mirage.training.weights import DTYPES

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer


def open_pictures(trainer: Trainer) -> PictureSource:
    """Where the run's pictures come from. Called on all ranks while each still holds the whole model.

    With `model.cache_vision_features`, the pictures' features are computed here and the model then takes those.
    """
    recipe, data = trainer.recipe, trainer.recipe.data
    tiles = open_tile_cache(data.tile_cache, limit_bytes=data.tile_cache_bytes)
    pictures = PictureLoader(trainer.adapter, cache_bytes=data.picture_cache_bytes, tiles=tiles)
    if recipe.model.cache_vision_features == "off":
        return pictures
    started = time.perf_counter()
    maker = FeatureMaker(
        trainer.adapter,
        trainer.model,
        open_home(recipe.model.cache_vision_features),
        device=trainer.device,
        exchange=gather_objects,
        rank=trainer.rank,
        num_workers=worker_count(data.num_workers, os.environ),
    )
    features = maker.make(trainer.rows, pictures)
    num_computed = int(sum_over_ranks([maker.num_computed], trainer.device)[0])
    if trainer.is_main:
        seconds, where = time.perf_counter() - started, recipe.model.cache_vision_features
        make_console(recipe.tracking.console).say(
            f"vision features of {num_computed} pictures computed in {seconds:.0f} s, kept in {where}",
            event="vision_features", num_computed=num_computed, seconds=round(seconds, 1), kept_in=where,
        )  # fmt: skip
    return features


def open_loader(trainer: Trainer) -> StepLoader:
    """This rank's steps from the trainer's own on; worker processes start when it is iterated."""
    recipe = trainer.recipe
    dataset = PackDataset(
        trainer.rows,
        trainer.index,
        trainer.plan,
        trainer.adapter,
        trainer.pictures,
        rank=trainer.rank,
        reduction=recipe.train.loss_reduction,
        loss_chunk_tokens=recipe.train.loss_chunk_tokens,
        dtype=DTYPES[recipe.train.precision],
        parts=trainer.parts,
    )
    workers = worker_count(recipe.data.num_workers, os.environ)
    return StepLoader(dataset, first_step=trainer.step, num_workers=workers)
