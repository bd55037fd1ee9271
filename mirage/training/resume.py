"""Whether a run folder may be continued with a recipe: same settings, same preprocessing as its last checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mirage.config.loader import resolved_json, with_newer_options
from mirage.config.schema import Recipe
from mirage.errors import UserError
from mirage.models.adapter import PreprocessingSpec
from mirage.strict_json import read_json_object
from mirage.training.checkpoint import last_resumable
from mirage.training.distributed import sum_over_ranks

# Network file systems show another machine's new file after some seconds (NFS keeps what it knows for up to 30).
VISIBLE_SECONDS = 60.0
# What may differ when a run is continued: it changes no weight.
FREE_SECTIONS = ("tracking", "eval", "checkpoint", "run_dir")
FREE_KEYS = ("train.profile",)


def check_same_run(run_dir: Path, recipe: Recipe) -> None:
    """Raise `UserError` naming every setting, with both values, that the run in `run_dir` has otherwise.

    A folder without a checkpoint to continue from takes any recipe.
    """
    last = last_resumable(run_dir)
    if last is None:
        return
    file = run_dir / "recipe.json"
    if file.exists():
        before = with_newer_options(read_json_object(file, remedy="the run folder is damaged"))
        now = json.loads(resolved_json(recipe))
        changed = list(_changes(before, now))
        if changed:
            raise UserError(
                f"{run_dir} holds a run with other settings: {'; '.join(changed)}. "
                "Continue it with the same ones, or set run_dir to a new folder"
            )
    spec = PreprocessingSpec.load(last / "model")
    if spec is not None:
        spec.check(recipe.preprocessing.model_dump(), folder=last / "model", source="the recipe")


def check_shared(run_dir: Path, recipe: Recipe, *, device: torch.device) -> None:
    """Raise `UserError` on every rank unless all of them read the recipe that rank 0 wrote into `run_dir`.

    Checkpoints and evaluations are one folder that all machines write to and read from. A collective.
    """
    file, expected = run_dir / "recipe.json", resolved_json(recipe) + "\n"
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (sees := file.is_file() and file.read_text(encoding="utf-8") == expected):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    num_blind = int(sum_over_ranks([float(not sees)], device)[0])
    if num_blind:
        raise UserError(
            f"{num_blind} of the processes do not see the {file.name} that the first one wrote into {run_dir}: run_dir "
            "must be on a file system that all machines mount under the same path"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for section, value in now.items():
        if section in FREE_SECTIONS:
            continue
        old = before.get(section)
        if not isinstance(value, dict):
            if value != old:
                yield f"{section} was {_shown(old)}, is {_shown(value)}"
            continue
        for key, item in value.items():
            was = old.get(key) if isinstance(old, dict) else None
            if item != was and f"{section}.{key}" not in FREE_KEYS:
                yield f"{section}.{key} was {_shown(was)}, is {_shown(item)}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
