"""Measure the memory formulas of `mirage plan`: predicted against measured peak of real training steps on the CPU.

Each case is a process of its own with one thread: the trainer itself (DeepSpeed, one rank) takes two steps on drawn
shapes. Measured twice: the bytes of all live tensors, from every allocation and release that torch's profiler records
(exact, and known for the forward pass, the backward pass and the optimiser's update apart); and the peak resident
memory of the process (Linux, /proc), which has Python, libraries and the profiler in it. Predicted is the largest plan
of all packs: tensors against tensors, and the plan's sum against the process. Ratio 1.00 is a perfect plan.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
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
          "data.num_workers=0", "train.max_steps=2", "train.log_every=1", "data.pack_tokens=2048",
          # As many tokens as the drawn text can fill, so that the plan's vocabulary is the model's.
          "model.tiny.vocab_size=400")  # fmt: skip
# Where the trainer's calls show up in a profile, and the plan's moments that they are.
PHASES = {"forward": ("loss",), "backward": ("loss", "backward"), "step": ("optimiser step",)}


def main() -> None:
    """Print one table; `--case` words choose cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="run only cases whose name contains this; may be repeated")
    parser.add_argument("--set", action="append", default=[], help="a recipe setting for all cases")
    parser.add_argument("--processes", type=int, default=1, help="ranks of a run; the first one is measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    from rich.console import Console
    from rich.table import Table

    from tests.support.dataset import write_dataset

    table = Table(
        "case", "parameters, M", "tokens", "plan, MB", "tensors, MB", "ratio", "peak at", "process, MB", "ratio",
        title="Memory of training",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mirage-memory-") as scratch:
        data = write_dataset(Path(scratch) / "data", edge=112, seed_rows=24)
        for name, settings in CASES.items():
            if arguments.case and not any(word in name for word in arguments.case):
                continue
            given = [*settings, *COMMON, f"data.dir={data}", f"run_dir={scratch}/{len(list(Path(scratch).iterdir()))}"]
            found = in_process(
                [*given, *arguments.set], cache=Path(scratch) / "cache", num_processes=arguments.processes
            )
            tensors = max(found["measured"].values())
            table.add_row(
                name,
                f"{found['parameters'] / 1e6:,.1f}",
                f"{found['tokens']:,}",
                f"{found['predicted'] / 1e6:,.0f}",
                f"{tensors / 1e6:,.0f}",
                f"{found['predicted'] / tensors:.2f}",
                max(found["measured"], key=found["measured"].get),
                f"{found['process'] / 1e6:,.0f}",
                f"{found['predicted_process'] / found['process']:.2f}",
            )
            print(f"{name}:", _moments(found), file=sys.stderr, flush=True)
    Console(width=120).print(table)


def _moments(found: dict[str, Any]) -> str:
    """Each phase's measured peak beside the plan's, and the parts of the plan, MB."""
    phases = [
        f"{phase} {max(found['moments'][moment] for moment in moments) / 1e6:,.0f} of {measured / 1e6:,.0f}"
        for phase, moments in PHASES.items()
        if (measured := found["measured"].get(phase))
    ]
    parts = [f"{key} {value / 1e6:,.0f}" for key, value in found["parts"].items()]
    return f"{', '.join(phases)}; before the first step {found['before'] / 1e6:,.0f}; plan: {', '.join(parts)}"


def in_process(settings: list[str], *, cache: Path, num_processes: int = 1) -> dict[str, Any]:
    """`measure` in fresh processes of one thread, one a rank; what the first rank found."""
    environ = os.environ | {"MIRAGE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    # Freed blocks go back to the system, as they do to PyTorch's allocator on a GPU.
    environ |= {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    environ |= {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    ranks = [
        subprocess.Popen(
            command,
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        output, errors = ranks[0].communicate()
        if ranks[0].returncode:
            raise SystemExit(errors[-3000:])
        return json.loads(output.splitlines()[-1])
    finally:
        for process in ranks:
            process.kill() if ranks[0].returncode else process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(settings: list[str]) -> dict[str, Any]:
    """Train two steps; bytes predicted and measured on this rank. Runs in a process of its own."""
    # All libraries are in before the first reading: they are the plan's allowance for context.
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch

    from mirage.config.loader import load_recipe
    from mirage.training.launch import prepare_process
    from mirage.training.trainer import Trainer

    torch.set_num_threads(1)
    recipe = load_recipe(settings)
    sizes = planned_sizes(recipe)
    prepare_process(recipe)
    tracker = _tracker()
    trainer = Trainer(recipe, [tracker])
    trainer.fit()
    tokens, plan = largest_plan(trainer, sizes)
    return {
        "parameters": sizes[0].num_total,
        "tokens": tokens,
        "predicted": plan.tensor_bytes(plan.peak),
        "predicted_process": plan.total,
        "moments": {name: plan.tensor_bytes(name) for name in plan.moments},
        "parts": {name: size for name, size in plan.device.items() if not name.startswith("context")},
        "measured": tracker.peaks,
        "before": tracker.before,
        "process": tracker.process,
    }


def planned_sizes(recipe: Any) -> tuple[Any, Any]:
    """Parameter counts and model shape as the plan takes them, the base found (or built) first.

    To be called before DeepSpeed starts: within its ZeRO-3 process no model is built without memory.
    """
    from mirage.training.plan import model_config, model_shape, parameter_counts, plan_adapter
    from mirage.training.weights import find_base

    find_base(recipe)
    config, _ = model_config(recipe)
    adapter = plan_adapter(recipe, config)
    return parameter_counts(config, adapter, recipe.model), model_shape(config, adapter)


def largest_plan(trainer: Any, sizes: tuple[Any, Any]) -> tuple[int, Any]:
    """(tokens, memory plan) of the pack of this rank whose plan is the largest, over all steps of the run."""
    from mirage.models.attention import padded_positions
    from mirage.training.plan_memory import PackShape, memory_plan

    index, plans, (counts, shape) = trainer.index, [], sizes
    for row in (micro[trainer.rank] for step in range(trainer.total_steps) for micro in trainer.plan.step(step).rows):
        if not row:
            continue
        lengths = index.num_tokens[list(row)]
        tokens = int(lengths.sum())
        pack = PackShape(
            tokens,
            image_share=float(index.num_image_tokens[list(row)].sum() / tokens),
            supervised_share=float(index.num_supervised_tokens[list(row)].sum() / tokens),
            attention_padding=padded_positions(lengths.tolist()) / tokens,
        )
        plan = memory_plan(counts, shape, trainer.recipe, world_size=trainer.world_size, pack=pack)
        plans.append((tokens, plan))
    return max(plans, key=lambda pair: pair[1].total)


def _tracker() -> Any:
    """The callback that measures: from the moment when all is loaded until the last step, before its checkpoint."""
    import torch

    from benchmarks.memory import event_tree, live_tensor_bytes, memory_bytes, peaks_by_phase
    from mirage.training.callbacks import Callback

    class Tracker(Callback):
        """`peaks` of live tensor bytes in each phase, `before` the first step, and of the `process`."""

        def on_start(self, trainer: Any) -> None:
            for phase in PHASES:
                setattr(trainer.engine, phase, _recorded(phase, getattr(trainer.engine, phase)))
            self.before, self.process = live_tensor_bytes(), 0
            Path("/proc/self/clear_refs").write_text("5")
            cpu = torch.profiler.ProfilerActivity.CPU
            self._profile = torch.profiler.profile(activities=[cpu], profile_memory=True)
            self._profile.__enter__()

        def on_step(self, trainer: Any, metrics: dict[str, float]) -> None:
            self.process = max(self.process, memory_bytes("VmHWM"))
            if trainer.step == trainer.total_steps:
                self._profile.__exit__(None, None, None)
                self.peaks = peaks_by_phase(event_tree(self._profile), phases=PHASES, before=self.before)

    return Tracker()


def _recorded(name: str, call: Any) -> Any:
    import torch

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return call(*args, **kwargs)

    return recorded


if __name__ == "__main__":
    main()
