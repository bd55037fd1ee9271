"""Measure the memory formulas of `mirage plan`: predicted against measured peak of real training steps on the CPU.

Each case is a process of its own with one thread: the trainer itself (DeepSpeed, one rank) takes two steps on drawn
shapes. Measured is the peak resident memory from the first step on (Linux, /proc), less what the process held before
data and model were there; predicted is the plan without its allowance for context. Ratio 1.00 is a perfect plan.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Sizes of a language model of about 100 M parameters, and its vision tower.
LARGE = (
    "model.tiny.hidden_size=768", "model.tiny.num_layers=12", "model.tiny.num_heads=12", "model.tiny.num_kv_heads=12",
    "model.tiny.intermediate_size=2304", "model.tiny.vision_hidden_size=384", "model.tiny.vision_layers=4",
)  # fmt: skip
CASES = {
    "tiny, full": ("recipe=tiny_internvl_mis",),
    "tiny, checkpointing": ("recipe=tiny_internvl_mis", "train.gradient_checkpointing=true"),
    "100 M, full": ("recipe=tiny_internvl_mis", *LARGE),
    "100 M, checkpointing": ("recipe=tiny_internvl_mis", *LARGE, "train.gradient_checkpointing=true"),
    "100 M, LoRA": ("recipe=tiny_internvl_mis_lora", *LARGE),
    "100 M, Qwen2-VL, full": ("recipe=tiny_qwen2vl_mis", *LARGE),
}
COMMON = ("model.tiny.warmup_steps=0", "eval.mode=off", "tracking.console=quiet", "tracking.wandb=off",
          "data.num_workers=0", "train.max_steps=2", "data.pack_tokens=2048")  # fmt: skip


def main() -> None:
    """Print one table; `--case` words choose cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="run only cases whose name contains this; may be repeated")
    parser.add_argument("--set", action="append", default=[], help="a recipe setting for all cases")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    from rich.console import Console
    from rich.table import Table

    from tests.support.dataset import write_dataset

    table = Table(
        "case", "parameters, M", "tokens", "predicted, MB", "measured, MB", "ratio", title="Memory of training"
    )
    with tempfile.TemporaryDirectory(prefix="mirage-memory-") as scratch:
        data = write_dataset(Path(scratch) / "data", edge=112, seed_rows=24)
        for name, settings in CASES.items():
            if arguments.case and not any(word in name for word in arguments.case):
                continue
            given = [*settings, *COMMON, f"data.dir={data}", f"run_dir={scratch}/{len(list(Path(scratch).iterdir()))}"]
            found = in_process([*given, *arguments.set], cache=Path(scratch) / "cache")
            table.add_row(
                name,
                f"{found['parameters'] / 1e6:,.1f}",
                f"{found['tokens']:,}",
                f"{found['predicted'] / 1e6:,.0f}",
                f"{found['measured'] / 1e6:,.0f}",
                f"{found['predicted'] / found['measured']:.2f}",
            )
            parts = ", ".join(f"{key} {value / 1e6:,.0f}" for key, value in found["parts"].items())
            ratio = found["predicted"] / found["measured"]
            print(f"{name}: {ratio:.2f} of {found['measured'] / 1e6:,.0f} MB; {parts}", file=sys.stderr, flush=True)
    Console(width=120).print(table)


def in_process(settings: list[str], *, cache: Path) -> dict[str, Any]:
    """`measure` in a fresh process of one thread."""
    environ = os.environ | {"MIRAGE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    # Freed blocks go back to the system, as they do to PyTorch's allocator on a GPU.
    environ |= {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(settings: list[str]) -> dict[str, Any]:
    """Train two steps; bytes predicted and measured. Runs in a process of its own."""
    # All libraries are in before the first reading: they are the plan's allowance for context.
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch

    from mirage.config.loader import load_recipe
    from mirage.training.callbacks import Callback
    from mirage.training.launch import prepare_process
    from mirage.training.plan import memory_plan, model_config, model_shape, parameter_counts, plan_adapter
    from mirage.training.trainer import Trainer
    from mirage.training.weights import find_base

    torch.set_num_threads(1)
    recipe = load_recipe(settings)
    find_base(recipe)
    # Before DeepSpeed starts: within its ZeRO-3 process no model is built without memory.
    config, _ = model_config(recipe)
    adapter = plan_adapter(recipe, config)
    counts, shape = parameter_counts(config, adapter, recipe.model), model_shape(config, adapter)
    prepare_process(recipe)

    class Peak(Callback):
        """Resets the peak when all is loaded, reads it before a checkpoint is written."""

        measured = 0

        def on_start(self, trainer: Trainer) -> None:
            Path("/proc/self/clear_refs").write_text("5")

        def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            self.measured = max(self.measured, memory_bytes("VmHWM"))

    peak, before = Peak(), memory_bytes("VmRSS")
    trainer = Trainer(recipe, [peak])
    trainer.fit()
    packed = [row for step in range(trainer.total_steps) for micro in trainer.plan.step(step).rows for row in micro]
    fullest = max(packed, key=lambda row: trainer.index.num_tokens[list(row)].sum())
    tokens = int(trainer.index.num_tokens[list(fullest)].sum())
    share = float(trainer.index.num_image_tokens[list(fullest)].sum() / tokens)
    plan = memory_plan(counts, shape, recipe, world_size=1, pack_tokens=tokens, image_share=share)
    parts = {name: size for name, size in plan.device.items() if not name.startswith("context")}
    return {
        "parameters": counts.num_total,
        "tokens": tokens,
        "predicted": sum(parts.values()),
        "measured": peak.measured - before,
        "parts": parts,
    }


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} in /proc/self/status; this benchmark needs Linux")


if __name__ == "__main__":
    main()
