"""What the parts of the chain read: rows, a tiny model, a published checkpoint, a pipeline, finished runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.faults.chain import Inputs

_ORIGIN = {"source": "hand-written", "licence": "CC0-1.0", "attribution": "the tests"}
_NUM_SEEDS = 60


def write_inputs(inputs: Inputs, *, only: tuple[str, ...] | None = None) -> None:
    """Make everything, or only what is named, but the finished runs; what is there stays."""
    inputs.folder.mkdir(parents=True, exist_ok=True)
    for name, write in (
        ("data", _write_data),
        ("base", _write_base),
        ("published", _write_published),
        ("pipeline", _write_pipeline),
        ("made", _write_made),
    ):
        target = inputs.folder / name
        if target.exists() or (only is not None and name not in only):
            continue
        aside = inputs.folder / f"{name}.aside"
        shutil.rmtree(aside, ignore_errors=True)
        write(aside, inputs)
        aside.rename(target)


def _write_data(folder: Path, _: Inputs) -> None:
    from tests.support.dataset import write_dataset

    write_dataset(folder)


def _write_base(folder: Path, inputs: Inputs) -> None:
    from tests.support.models import build

    build(folder, "internvl", inputs.data)


def _write_published(folder: Path, _: Inputs) -> None:
    import torch

    from tests.support.published import FIXTURES, small_config, write_published

    config = small_config(llm={"vocab_size": 1509, "num_hidden_layers": 2}, vision={"num_hidden_layers": 2})
    write_published(folder, config, num_shards=3, dtype=torch.bfloat16)
    for path in (FIXTURES / "tokenizer").iterdir():
        if path.name != "expected_ids.json":
            shutil.copyfile(path, folder / path.name)


def _write_pipeline(folder: Path, _: Inputs) -> None:
    import yaml

    from tests.support.synthetic_run import STAGES

    folder.mkdir(parents=True)
    seeds = [{"id": f"s{number}", "text": f"text {number}"} for number in range(_NUM_SEEDS)]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    stages: dict[str, Any] = {name: {"use": "synthetic", "seconds": 0.03} for name in STAGES}
    pipeline = {"seeds": [{"path": "seeds.jsonl", **_ORIGIN}], "stages": stages, "concurrency": 8}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))


def _write_made(folder: Path, _: Inputs) -> None:
    from data_gen.build import make_dataset
    from data_gen.taxonomy.facts import load_taxonomy
    from tests.support.datagen import tiny_settings

    make_dataset(folder, taxonomy=load_taxonomy(), settings=tiny_settings(), num_workers=1)
