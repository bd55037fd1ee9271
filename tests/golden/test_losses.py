"""Each tiny recipe's first losses, to full precision: a refactor that changes them has changed the training.

`python -m tests.golden.test_losses` writes the files anew; do that only for a change that is meant to change losses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.dataset import write_dataset

HERE = Path(__file__).parent
RECIPES = ("tiny_internvl_mis", "tiny_internvl_mis_lora", "tiny_qwen2vl_mis", "tiny_qwen2vl_mis_lora")
# fp32, no vision warm-up and one process: what is left to differ between machines is the order of floating-point sums.
SETTINGS = (
    "train.precision=fp32",
    "model.tiny.warmup_steps=0",
    "train.max_steps=3",
    "train.batch_samples=8",
    "eval.mode=off",
    "tracking.wandb=off",
    "tracking.console=quiet",
)
TOLERANCE = 2e-4


def step_losses(recipe: str, data_dir: Path, work: Path) -> list[float]:
    """The losses of the real command's first steps."""
    root = HERE.parent.parent
    run_dir = work / recipe
    command = [sys.executable, "mirage/train.py", f"recipe={recipe}", f"data.dir={data_dir}", f"run_dir={run_dir}"]
    environment = {**os.environ, "MIRAGE_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *SETTINGS], cwd=root, env=environment, check=True, timeout=200, capture_output=True)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if line["axis"] == "train"]


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("_lora")) for name in RECIPES]
)
def test_losses_are_the_committed_ones(recipe, shapes, tmp_path):
    expected = json.loads((HERE / f"{recipe}.json").read_text())
    assert step_losses(recipe, shapes, tmp_path) == pytest.approx(expected, rel=TOLERANCE)


def main() -> None:
    """Write the golden files."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = write_dataset(Path(folder) / "data")
        for recipe in RECIPES:
            losses = step_losses(recipe, data_dir, Path(folder))
            (HERE / f"{recipe}.json").write_text(json.dumps(losses, indent=2) + "\n")
            print(recipe, losses)


if __name__ == "__main__":
    main()
