"""Measure training steps on a GPU at the published models' widths: speed, and memory beside what `mirage plan` says.

Each case is a process of its own: the ordinary trainer under DeepSpeed on one rank, a randomly initialised model whose
decoder layers have the widths of InternVL2.5-8B or Qwen2-VL-7B, packs of drawn pictures at full tile size. The
vocabulary is small, since it is learnt from the drawn text: what the head costs is `make gpu-check`'s to say. Speed is
the median of the steps after the first. Measured memory is the most that torch's allocator has given out; planned is
the largest plan of all packs, without its allowance for context and fragments; ratio 1.00 is a perfect plan. No
checkpoint is written. Ends at once where there is no GPU; `--small` runs thin models anywhere, to see that cases run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

INTERNVL = (
    "recipe=tiny_internvl_mis", "model.tiny.hidden_size=4096", "model.tiny.intermediate_size=14336",
    "model.tiny.num_heads=32", "model.tiny.num_kv_heads=8", "model.tiny.vision_hidden_size=1024",
    "model.tiny.vision_layers=24", "preprocessing.image_size=448",
)  # fmt: skip
QWEN2_VL = (
    "recipe=tiny_qwen2vl_mis", "model.tiny.hidden_size=3584", "model.tiny.intermediate_size=18944",
    "model.tiny.num_heads=28", "model.tiny.num_kv_heads=4", "model.tiny.vision_hidden_size=1344",
    "model.tiny.vision_layers=24", "preprocessing.min_pixels=200704", "preprocessing.max_pixels=1003520",
)  # fmt: skip
LORA = ("model.train=[projector]", "model.lora.rank=16", "model.lora.alpha=32", "model.lora.targets=[language]")
CHECKPOINTING = ("train.gradient_checkpointing=true",)
CASES: dict[str, tuple[str, ...]] = {
    "InternVL, 8 layers, full": (*INTERNVL, "model.tiny.num_layers=8"),
    "InternVL, 8 layers, full, SDPA": (*INTERNVL, "model.tiny.num_layers=8", "model.attention=sdpa"),
    "InternVL, 8 layers, full, ZeRO-2": (*INTERNVL, "model.tiny.num_layers=8", "train.zero_stage=2"),
    "InternVL, 8 layers, full, recomputed": (*INTERNVL, "model.tiny.num_layers=8", *CHECKPOINTING),
    "InternVL, 8 layers, full, optimiser offloaded": (
        *INTERNVL, "model.tiny.num_layers=8", *CHECKPOINTING, "train.offload_optimizer=true",
    ),
    "InternVL, 8 layers, LoRA": (*INTERNVL, "model.tiny.num_layers=8", *LORA),
    "InternVL, 8 layers, LoRA, 4 bit": (
        *INTERNVL, "model.tiny.num_layers=8", *LORA, "train.zero_stage=2", "model.quantize=4bit",
    ),
    "Qwen2-VL, 7 layers, full": (*QWEN2_VL, "model.tiny.num_layers=7"),
    "InternVL, 32 layers, LoRA, recomputed": (*INTERNVL, "model.tiny.num_layers=32", *LORA, *CHECKPOINTING),
}  # fmt: skip
RUN = (
    "model.tiny.warmup_steps=0", "model.tiny.vocab_size=400", "model.tiny.init_std=0.02", "train.batch_samples=null",
    "train.lr=1e-5", "data.num_workers=4", "eval.mode=off", "tracking.wandb=off", "tracking.console=plain",
    "train.log_every=1", "checkpoint.every_steps=100000", "train.epochs=1000",
)  # fmt: skip
SMALL = (
    "model.tiny.hidden_size=64", "model.tiny.intermediate_size=128", "model.tiny.num_heads=4",
    "model.tiny.num_kv_heads=4", "model.tiny.vision_hidden_size=32", "model.tiny.vision_layers=1",
    "data.pack_tokens=2048", "train.precision=fp32", "data.num_workers=0",
)  # fmt: skip


def main() -> None:
    """Run the cases and print one table, then each case's parts of the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="run only cases whose name contains this; may be repeated")
    parser.add_argument("--steps", type=int, default=5, help="steps measured; one more is profiled")
    parser.add_argument("--packs", type=int, default=4, help="packs a step")
    parser.add_argument("--pack-tokens", type=int, default=8192)
    parser.add_argument("--small", action="store_true", help="thin models, on a CPU too")
    parser.add_argument("--seconds", type=int, default=240, help="most a case may take")
    parser.add_argument("--out", type=Path, help="also write all figures here, as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    import torch

    if not torch.cuda.is_available() and not arguments.small:
        sys.exit("no NVIDIA GPU on this machine; nothing was measured (--small runs anywhere)")
    from tests.support.dataset import write_dataset

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mirage-gpu-") as scratch:
        write_dataset(Path(scratch) / "data", edge=112 if arguments.small else 448, seed_rows=40)
        for name, settings in CASES.items():
            if arguments.case and not any(word in name for word in arguments.case):
                continue
            size = [f"data.pack_tokens={arguments.pack_tokens}", f"train.batch_packs={arguments.packs}"]
            size += [f"train.max_steps={arguments.steps + 1}", f"data.dir={scratch}/data"]
            given = [
                *settings,
                *RUN,
                *size,
                *(SMALL if arguments.small else ()),
                f"run_dir={scratch}/runs/{len(found)}",
            ]
            # No key may be given twice; what comes later holds.
            given = [f"{key}={value}" for key, value in dict(one.split("=", 1) for one in given).items()]
            found[name] = in_process(given, cache=Path(scratch) / "cache", seconds=arguments.seconds)
            print(name, found[name].get("failed", "measured"), file=sys.stderr, flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    report(found, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")


def in_process(settings: list[str], *, cache: Path, seconds: int) -> dict[str, Any]:
    """`measure` in a fresh process; {"failed": its last words} where it did not end well."""
    environ = os.environ | {"MIRAGE_CACHE": str(cache), "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    try:
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {seconds} s"}
    if ended.returncode:
        return {"failed": " | ".join(ended.stderr.strip().splitlines()[-6:])[-1500:]}
    return json.loads(ended.stdout.splitlines()[-1])


class _Measured(Exception):
    """All is measured: what follows would write gigabytes of checkpoint."""


def operators(profiler: Any, *, cuda: bool) -> dict[str, list[float]]:
    """name -> [ms on the device, ms of the host, calls] of the profiled step, by own time; the largest ones."""
    events = profiler.key_averages()
    times = {
        event.key[:80]: [
            (event.self_device_time_total if cuda else 0.0) / 1e3, event.self_cpu_time_total / 1e3, event.count
        ]
        for event in events
    }  # fmt: skip
    largest = sorted(times.items(), key=lambda item: -max(item[1][:2]))[:30]
    return {name: [round(value, 1) for value in values] for name, values in largest}


def measure(settings: list[str]) -> dict[str, Any]:
    """Train; what the steps took, the memory planned and the memory given out. Runs in a process of its own."""
    import torch

    from benchmarks.plan_memory import largest_plan, planned_sizes
    from mirage.config.loader import load_recipe
    from mirage.training.callbacks import Callback
    from mirage.training.launch import prepare_process
    from mirage.training.trainer import Trainer

    started = time.perf_counter()
    recipe = load_recipe(settings)
    sizes = planned_sizes(recipe)
    prepare_process(recipe)
    steps: list[dict[str, float]] = []
    cuda = torch.cuda.is_available()

    class Meter(Callback):
        """Keeps each step's numbers, profiles one more step if asked to, and ends the run before its checkpoint."""

        def on_start(self, trainer: Any) -> None:
            self.ready_seconds = time.perf_counter() - started
            self.attention = trainer.model.config.text_config._attn_implementation

        def on_step(self, trainer: Any, metrics: dict[str, float]) -> None:
            if len(steps) < trainer.total_steps - 1:
                steps.append({name: value for name, value in metrics.items() if name.startswith("train/")})
                self.allocated_bytes = torch.cuda.max_memory_allocated() if cuda else None
                self.reserved_bytes = torch.cuda.max_memory_reserved() if cuda else None
                if len(steps) == trainer.total_steps - 1:
                    self.profiler = torch.profiler.profile()
                    self.profiler.start()
                return
            if cuda:
                torch.cuda.synchronize()
            self.profiler.stop()
            raise _Measured

    meter = Meter()
    trainer = Trainer(recipe, [meter])
    with contextlib.suppress(_Measured):
        trainer.fit()
    tokens, plan = largest_plan(trainer, sizes)
    later = steps[1:]
    return {
        "parameters": sizes[0].num_total,
        "trained_parameters": trainer.num_trained_parameters,
        "attention": meter.attention,
        "ready_seconds": meter.ready_seconds,
        "largest_pack_tokens": tokens,
        "planned_bytes": plan.tensor_bytes(plan.peak),
        "planned_peak": plan.peak,
        "planned_moments": {name: plan.tensor_bytes(name) for name in plan.moments},
        "planned_parts": dict(plan.device),
        "planned_total_bytes": plan.total,
        "allocated_bytes": meter.allocated_bytes,
        "reserved_bytes": meter.reserved_bytes,
        "operators_ms": operators(meter.profiler, cuda=cuda),
        "losses": [step["train/loss"] for step in steps],
        **{
            name.removeprefix("train/"): statistics.median(step[name] for step in later)
            for name in sorted(later[0])
            if name.endswith(("_seconds", "_per_second", "mfu", "hfu", "pack_fill", "padding_share"))
        },
    }


def report(found: dict[str, Any], *, device: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    gigabytes = 1e9
    table = Table(
        "case", "attention", "parameters, M", "tokens/s", "MFU", "step, s", "optimiser, s", "plan, GB", "measured, GB",
        "ratio", "reserved, GB", title=f"Training on {device}",
    )  # fmt: skip
    for name, case in found.items():
        if "failed" in case:
            table.add_row(name, f"failed: {case['failed'][-200:]}")
            continue
        measured = case["allocated_bytes"]
        table.add_row(
            name,
            case["attention"],
            f"{case['parameters'] / 1e6:,.0f}",
            f"{case['tokens_per_second']:,.0f}",
            f"{case['mfu']:.0%}",
            f"{case['step_seconds']:.2f}",
            f"{case['optimizer_seconds']:.2f}",
            f"{case['planned_bytes'] / gigabytes:.2f}",
            *(
                (
                    f"{measured / gigabytes:.2f}",
                    f"{case['planned_bytes'] / measured:.2f}",
                    f"{case['reserved_bytes'] / gigabytes:.2f}",
                )
                if measured
                else ("", "", "")
            ),
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
