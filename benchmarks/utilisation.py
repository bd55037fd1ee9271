"""Measure how much of the device's matrix arithmetic training uses: the ordinary trainer on a model of 100 M or more.

Each process trains a randomly initialised model of the real architecture on packs of drawn pictures with DeepSpeed, as
`mirage/train.py` does. Between the steps, in the same process and with the same threads, it measures matrix products:
large square ones, and those of the model's own linear layers (forward, and both of the backward pass, weighted by their
work). Other programs on the machine slow both down, so each step is compared with the products right before and after
it, on two clocks: the wall's, and the processor time of the process, in which waiting for a core is not counted (nor is
it with several threads, which may spin while they wait). Means, not best times, on both sides. One more step runs under
torch's profiler and says which operators take the time. Utilisation counts the model's own work only (`train/mfu`).

With `--processes 2` each rank measures at the same time as the other, and rates are added up.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A language model of 107 M parameters (Qwen2-VL) and a tower a tenth of it; answers are learnt over a small vocabulary.
MODEL = (
    "model.tiny.hidden_size=1024", "model.tiny.intermediate_size=2816", "model.tiny.num_heads=16",
    "model.tiny.num_kv_heads=16", "model.tiny.vision_hidden_size=384", "model.tiny.vision_layers=6",
    "model.tiny.warmup_steps=0", "model.tiny.init_std=0.02", "model.tiny.vision_init_std=0.02",
)  # fmt: skip
RUN = (
    "train.batch_samples=null", "train.lr=1e-4", "train.gradient_checkpointing=false", "data.num_workers=1",
    "eval.mode=off", "tracking.wandb=off", "tracking.console=plain", "checkpoint.every_steps=100000",
    "train.epochs=100",
)  # fmt: skip
# The first steps allocate memory and wait for the first pictures.
SKIPPED_STEPS = 1
# Seconds that each kind of product is measured for, between two steps.
PRODUCT_SECONDS = 1.0


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny_internvl_mis")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--layers", type=int, default=9, help="decoder layers of 12.8 M parameters")
    parser.add_argument("--pack-tokens", type=int, default=2048)
    parser.add_argument("--packs", type=int, default=4, help="packs a step and process")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="a recipe setting")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        train(arguments, Path(arguments.folder))
        return
    from tests.support.dataset import write_dataset

    with tempfile.TemporaryDirectory(prefix="mirage-utilisation-") as scratch:
        write_dataset(Path(scratch) / "data", edge=224, seed_rows=40)
        start(arguments, Path(scratch))


def start(arguments: argparse.Namespace, scratch: Path) -> None:
    """One child a rank; the first one's output is this program's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = os.environ | {"MIRAGE_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": str(arguments.threads)}
    environ |= {"WORLD_SIZE": str(arguments.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # Its own notes of starting and stopping the profiler.
    environ["KINETO_LOG_LEVEL"] = "99"
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(scratch)]
    ranks = [
        subprocess.Popen(
            command, env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(arguments.processes)
    ]  # fmt: skip
    try:
        failed = [process.wait() for process in ranks]
        if any(failed):
            sys.exit("a rank failed")
    finally:
        for process in ranks:
            process.kill()


def train(arguments: argparse.Namespace, scratch: Path) -> None:
    """One rank: train, measure between the steps, print the tables."""
    import torch

    from mirage.config.loader import load_recipe
    from mirage.tracking.run_console import ConsoleCallback
    from mirage.training.launch import prepare_process
    from mirage.training.trainer import Trainer

    torch.set_num_threads(arguments.threads)
    num_steps = SKIPPED_STEPS + arguments.steps + 1
    recipe = load_recipe([
        f"recipe={arguments.recipe}", f"data.dir={scratch / 'data'}", f"run_dir={scratch / 'run'}", *MODEL, *RUN,
        f"model.tiny.num_layers={arguments.layers}", f"data.pack_tokens={arguments.pack_tokens}",
        f"train.batch_packs={arguments.packs * arguments.processes}", f"train.max_steps={num_steps}",
        f"train.precision={arguments.precision}", f"train.zero_stage={arguments.zero_stage}", *arguments.set,
    ])  # fmt: skip
    prepare_process(recipe)
    meter = make_meter(num_steps)
    Trainer(recipe, [ConsoleCallback(), meter]).fit()
    if meter.is_main:
        report(meter, arguments)


def make_meter(num_steps: int) -> Any:
    """A callback that measures products between the steps and profiles the last one."""
    import torch

    from mirage.training.callbacks import Callback
    from mirage.training.distributed import gather_numbers

    class Meter(Callback):
        def on_start(self, trainer: Any) -> None:
            self.trainer, self.is_main = trainer, trainer.is_main
            self.steps: list[dict[str, float]] = []
            self.operators: Counter[str] = Counter()
            self.rates = [self.measure()]
            self.before = time.process_time()

        def measure(self) -> list[float]:
            """FLOP/s of square products by wall and processor, and of the model's own; the sums over ranks."""
            self.trainer.barrier()
            dtype = next(self.trainer.model.parameters()).dtype
            found = gather_numbers([*square_rates(dtype), *own_rates(self.trainer)], torch.device("cpu"))
            return [sum(column) for column in zip(*found)]

        def on_step(self, trainer: Any, metrics: dict[str, float]) -> None:
            busy = gather_numbers([time.process_time() - self.before], torch.device("cpu"))
            if trainer.step == num_steps:
                self.profiler.stop()
                for event in self.profiler.key_averages():
                    self.operators[event.key] += event.self_cpu_time_total
                return
            work = metrics["train/model_flops_per_second"] * metrics["train/step_seconds"]
            # What each rank does in a second of its own processor time, added up like the products' rates.
            rate = sum(work / len(busy) / seconds for (seconds,) in busy)
            self.steps.append(metrics | {"flops_per_busy_second": rate})
            self.rates.append(self.measure())
            if trainer.step == num_steps - 1:
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
                self.profiler.start()
            self.before = time.process_time()

    return Meter()


# Products


def rates_of(products: list[tuple[float, Any]]) -> tuple[float, float]:
    """FLOP/s of (FLOP, product) pairs done one after the other again and again, by wall and by processor time."""
    for _, product in products:
        product()
    work, wall, processor = 0.0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < PRODUCT_SECONDS:
        for flops, product in products:
            product()
            work += flops
    return work / (time.perf_counter() - wall), work / (time.process_time() - processor)


def square_rates(dtype: Any, *, edge: int = 2048) -> tuple[float, float]:
    """Of the product of two square matrices."""
    import torch

    left, right, out = (torch.randn(edge, edge).to(dtype) for _ in range(3))
    return rates_of([(2.0 * edge**3, lambda: torch.mm(left, right, out=out))])


def own_rates(trainer: Any) -> tuple[float, float]:
    """Of the products of one decoder layer's linear layers for a full pack: forward, and both of the backward pass."""
    import torch

    tokens = trainer.recipe.data.pack_tokens
    layer = trainer.model.model.language_model.layers[0]
    dtype = next(trainer.model.parameters()).dtype
    products: list[tuple[float, Any]] = []
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            num_in, num_out = module.in_features, module.out_features
            inputs, weight = torch.randn(tokens, num_in).to(dtype), torch.randn(num_out, num_in).to(dtype)
            gradient = torch.randn(tokens, num_out).to(dtype)
            pairs = ((inputs, weight.t()), (gradient, weight), (gradient.t(), inputs))
            products += [(2.0 * tokens * num_in * num_out, partial(torch.mm, *pair)) for pair in pairs]
    return rates_of(products)


# Tables


def report(meter: Any, arguments: argparse.Namespace) -> None:
    """Print medians over the timed steps."""
    from rich.console import Console
    from rich.table import Table

    console, trainer = Console(width=120), meter.trainer
    steps, rates = meter.steps[SKIPPED_STEPS:], meter.rates[SKIPPED_STEPS:]
    around = [[(a + b) / 2 for a, b in zip(*pair)] for pair in itertools.pairwise(rates)]
    by_wall = [step["train/model_flops_per_second"] for step in steps]
    by_processor = [step["flops_per_busy_second"] for step in steps]
    trained, total = trainer.num_trained_parameters / 1e6, trainer.num_parameters / 1e6
    console.print(
        f"{arguments.recipe}: {total:.0f} M parameters ({trained:.0f} M trained), {arguments.precision}, "
        f"packs of {arguments.pack_tokens} tokens, {arguments.packs} a step and process, ZeRO-{arguments.zero_stage}; "
        f"processes: {arguments.processes}, threads of each: {arguments.threads}; load of the machine "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    table = Table("", "median", *(f"step {SKIPPED_STEPS + number + 1}" for number in range(len(steps))))
    rows: list[tuple[str, list[float], str]] = [
        ("by the wall's clock", [], ""),
        ("  square products, GFLOP/s", [found[0] / 1e9 for found in around], "{:.1f}"),
        ("  products of the model's shapes, GFLOP/s", [found[2] / 1e9 for found in around], "{:.1f}"),
        ("  training, GFLOP/s", [value / 1e9 for value in by_wall], "{:.1f}"),
        ("  utilisation (of the faster products)", [a / max(f[0], f[2]) for a, f in zip(by_wall, around)], "{:.0%}"),
        ("by processor time", [], ""),
        ("  square products, GFLOP/s", [found[1] / 1e9 for found in around], "{:.1f}"),
        ("  products of the model's shapes, GFLOP/s", [found[3] / 1e9 for found in around], "{:.1f}"),
        ("  training, GFLOP/s", [value / 1e9 for value in by_processor], "{:.1f}"),
        (
            "  utilisation (of the faster products)",
            [a / max(f[1], f[3]) for a, f in zip(by_processor, around)],
            "{:.0%}",
        ),
        ("step, s", [step["train/step_seconds"] for step in steps], "{:.2f}"),
        *(
            (f"  {name}", [step[f"train/{name}_seconds"] / step["train/step_seconds"] for step in steps], "{:.1%}")
            for name in ("data", "forward", "backward", "optimizer", "other")
        ),
        ("pack fill", [step["train/pack_fill"] for step in steps], "{:.0%}"),
        ("padding in attention", [step["train/attention_padding_share"] for step in steps], "{:.0%}"),
        ("peak memory, GB", [step["train/peak_memory_bytes"] / 1e9 for step in steps], "{:.1f}"),
    ]
    for name, values, form in rows:
        median = form.format(statistics.median(values)) if values else ""
        table.add_row(name, median, *(form.format(value) for value in values))
    console.print(table)
    console.print(operators_table(meter.operators))


def operators_table(operators: Counter[str]) -> Any:
    """Shares of one step's operators, by their own time; scopes of the trainer hold what is in no operator."""
    from rich.table import Table

    table, total = Table("operator of one step", "share of its time"), sum(operators.values())
    products = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::mkldnn_convolution")
    found: Counter[str] = Counter()
    for name, microseconds in operators.items():
        kind = "matrix products" if name in products else "attention" if "scaled_dot_product" in name else name
        found[kind] += microseconds
    for name, microseconds in found.most_common(16):
        table.add_row(name, f"{microseconds / total:.1%}")
    return table


if __name__ == "__main__":
    main()
