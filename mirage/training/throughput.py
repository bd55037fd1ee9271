"""What a step costs: where its seconds go, its speed, and how much of the device's arithmetic the model's work uses."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mirage.config.schema import Recipe
from mirage.data.lengths import LengthIndex
from mirage.data.row_list import RowList
from mirage.models.adapter import ModelAdapter
from mirage.models.attention import PACKED_SDPA, padded_positions
from mirage.training.distributed import gather_numbers, outside_training
from mirage.training.plan import model_shape, parameter_counts, sample_work
from mirage.training.weights import DTYPES

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer

# Forward and backward hold the copy to the device and the loss; what is in none of the parts is `other`.
PARTS = ("forward", "backward", "optimizer")
# Edges of the square matrices that the peak is measured with: the largest that takes at most so long.
_CPU_EDGES, _CPU_PRODUCT_SECONDS, _PEAK_SECONDS, _GPU_EDGE = (512, 1024, 2048, 4096), 0.05, 0.3, 8192


class Clock:
    """Marks in time on one device.

    On a GPU a mark is a CUDA event: recording one takes microseconds of the host and waits for nothing, and the times
    between marks are read after the step's last one. Elsewhere kernels run in the caller, and a mark is the wall clock
    with the process's own processor time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        # Parts whose busy time tells uneven ranks: on a GPU waiting for others is in it, which ZeRO-1 and 2 do not do
        # in the forward pass.
        self.unshared = ("forward",) if self._on_gpu else ("forward", "backward")

    def mark(self) -> Any:
        """Now, in the order of the device's work."""
        if not self._on_gpu:
            return time.perf_counter(), time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: Any) -> None:
        """Until the device has reached `mark`."""
        if self._on_gpu:
            mark.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks that the device has reached."""
        return float(start.elapsed_time(end)) / 1000 if self._on_gpu else float(end[0] - start[0])

    def busy_seconds(self, start: Any, end: Any) -> float:
        """Without waiting: processor time of all threads. A GPU has no such clock: all of the time."""
        return self.seconds(start, end) if self._on_gpu else float(end[1] - start[1])


@lru_cache(maxsize=8)
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product, the best of 0.3 s of them.

    Measured once a process with the settings that training runs with (threads, TF32). Takes no random numbers from
    torch's own generators. On a GPU 0.4 GB are held meanwhile.
    """
    clock = Clock(device)
    random = torch.Generator(device).manual_seed(0)

    def best(edge: int, limit_seconds: float) -> float:
        left, right = (torch.randn(edge, edge, generator=random, device=device).to(dtype) for _ in range(2))
        found: list[float] = []
        until = time.perf_counter() + limit_seconds
        # The first products wake threads up and choose kernels.
        while len(found) < 3 or time.perf_counter() < until:
            start = clock.mark()
            torch.mm(left, right)
            end = clock.mark()
            clock.wait(end)
            found.append(clock.seconds(start, end))
        return min(found)

    edge = _GPU_EDGE
    if device.type != "cuda":
        small = best(_CPU_EDGES[0], 0.01)
        fitting = [size for size in _CPU_EDGES if small * (size / _CPU_EDGES[0]) ** 3 <= _CPU_PRODUCT_SECONDS]
        edge = max(fitting, default=_CPU_EDGES[0])
    return 2.0 * edge**3 / best(edge, _PEAK_SECONDS)


class RunWork:
    """FLOP of each sample of a mixture, by the plan's formula (`plan.sample_work`).

    `model_flops` [N] is what the model's arithmetic needs: forward and backward of what is trained, forward alone of
    what is frozen before it, attention within samples, causal where it is causal. `hardware_flops` [N] adds what
    gradient checkpointing computes again. Both float64.
    """

    def __init__(self, recipe: Recipe, adapter: ModelAdapter, rows: RowList, index: LengthIndex) -> None:
        # The parameters are counted on a model without data, which ZeRO-3 must not take for the one that it shards.
        with outside_training():
            counts = parameter_counts(adapter.config, adapter, recipe.model)
        shape = model_shape(adapter.config, adapter)
        lengths: dict[str, Any] = {
            "num_tokens": index.num_tokens.astype(np.float64),
            "num_image_tokens": index.num_image_tokens.astype(np.float64),
            "num_images": rows.num_images.astype(np.float64),
            "num_supervised_tokens": index.num_supervised_tokens.astype(np.float64),
        }
        self.model_flops: np.ndarray = sample_work(counts, shape, recipe, **lengths, recompute=False).total
        self.hardware_flops: np.ndarray = sample_work(counts, shape, recipe, **lengths).total


class StepMeter:
    """Times each step of one rank; `metrics()` turns the last one into numbers over all ranks.

    Its cost: on a GPU the device is waited for once, at the end of a step that is logged; no step waits otherwise.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._clock = Clock(trainer.device)
        dtype = DTYPES[trainer.recipe.train.precision]
        self.peak_flops = matmul_peak(trainer.device, dtype)
        self.work = RunWork(trainer.recipe, trainer.adapter, trainer.rows, trainer.index)
        self._pads_attention = getattr(trainer.model.config, "_attn_implementation", None) == PACKED_SDPA
        self._wait_seconds = 0.0
        self._checkpoint_seconds = 0.0
        self._marks: list[tuple[str, Any, Any]] = []
        self._start = self._end = self._clock.mark()
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)

    # Measuring

    @contextlib.contextmanager
    def step(self, wait_seconds: float) -> Iterator[None]:
        """Around one optimiser step that was waited for so long."""
        self._wait_seconds, self._marks = wait_seconds, []
        self._start = self._clock.mark()
        yield
        self._end = self._clock.mark()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a piece of `name`, one of PARTS, within a step; traces show it as `mirage/<name>`."""
        start = self._clock.mark()
        with torch.profiler.record_function(f"mirage/{name}"):
            yield
        self._marks.append((name, start, self._clock.mark()))

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Around writing a checkpoint."""
        started = time.perf_counter()
        yield
        self._checkpoint_seconds += time.perf_counter() - started

    # Numbers

    def metrics(self, counted: Mapping[str, float]) -> dict[str, float]:
        """Numbers of the trainer's last step (names and units: docs/dashboard.md). A collective.

        `counted` has the step's `train/tokens` and `train/supervised_tokens`, over all ranks. Times are means over
        ranks, memory is the largest of a rank.
        """
        trainer, step = self._trainer, self._trainer.step - 1
        found = np.array(gather_numbers([*self._own_numbers(), self.peak_flops, self._memory_bytes()], trainer.device))
        parts, busy, peaks, memory = found[:, : len(PARTS) + 2], found[:, -3], found[:, -2], found[:, -1]
        wait, inside, *measured = parts.mean(axis=0).tolist()
        seconds = wait + inside
        samples = trainer.plan.step_samples(step)
        metrics = {
            "train/step_seconds": seconds,
            "train/data_seconds": wait,
            **{f"train/{name}_seconds": value for name, value in zip(PARTS, measured)},
            "train/other_seconds": inside - sum(measured),
            "train/data_wait_share": wait / seconds,
            "train/tokens_per_second": counted["train/tokens"] / seconds,
            "train/supervised_tokens_per_second": counted["train/supervised_tokens"] / seconds,
            "train/samples_per_second": len(samples) / seconds,
            "train/model_flops_per_second": float(self.work.model_flops[samples].sum()) / seconds,
            "train/peak_memory_bytes": float(memory.max()),
            "train/pack_fill": trainer.plan.fill(step),
            "train/attention_padding_share": self._attention_padding(step),
            "train/imbalance_planned": trainer.plan.imbalance(step),
            "train/imbalance_measured": float(busy.max() / busy.mean()) if busy.mean() > 0 else 1.0,
        }
        metrics["train/mfu"] = metrics["train/model_flops_per_second"] / float(peaks.sum())
        metrics["train/hfu"] = float(self.work.hardware_flops[samples].sum()) / seconds / float(peaks.sum())
        if self._checkpoint_seconds:
            metrics["train/checkpoint_seconds"], self._checkpoint_seconds = self._checkpoint_seconds, 0.0
        return metrics

    def _own_numbers(self) -> list[float]:
        """This rank's last step: waiting, all else, its PARTS, busy in those that tell uneven ranks; seconds."""
        clock = self._clock
        clock.wait(self._end)
        parts = dict.fromkeys(PARTS, 0.0)
        busy = 0.0
        for name, start, end in self._marks:
            parts[name] += clock.seconds(start, end)
            busy += clock.busy_seconds(start, end) if name in clock.unshared else 0.0
        return [self._wait_seconds, clock.seconds(self._start, self._end), *parts.values(), busy]

    def _memory_bytes(self) -> float:
        """The most that this rank has held: tensors on its GPU, evaluations' too, else its resident memory ever."""
        if self._trainer.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._trainer.device))
        # Linux counts it in KiB (getrusage(2)).
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    def _attention_padding(self, step: int) -> float:
        """Share of padding in what attention is handed: only `mirage_varlen` lays samples side by side."""
        if not self._pads_attention:
            return 0.0
        tokens = self._trainer.index.num_tokens
        rows = [tokens[list(row)] for micro in self._trainer.plan.step(step).rows for row in micro if row]
        return 1.0 - sum(int(row.sum()) for row in rows) / sum(padded_positions(row.tolist()) for row in rows)


def describe_peak(flops: float, precision: str) -> str:
    """`118 GFLOP/s in fp32, measured`, for the run's first lines."""
    size, unit = (1e12, "TFLOP/s") if flops >= 1e12 else (1e9, "GFLOP/s")
    return f"{flops / size:,.3g} {unit} in {precision} a process, measured; train/mfu is the model's share of it"
