"""`train.profile`: a trace of a few steps by torch's profiler, for Perfetto, and a table of its operators."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mirage.files import write_atomic
from mirage.tracking.console import ConsoleMode, make_console

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer

FOLDER = "profile"
# Steps of a process that pass before: its first ones allocate memory and choose kernels. Then one in which the profiler
# itself starts, unrecorded. A short run skips fewer.
_SKIPPED_STEPS, _RECORDED_STEPS = 2, 3
_TABLE_ROWS = 40


class StepProfiler:
    """Records steps of one process. `path` is where the trace goes, None where nothing is recorded.

    The steps recorded are slower than others; the profiler changes no number of the training.
    """

    def __init__(
        self, run_dir: Path, *, first_step: int, total_steps: int, rank: int = 0, console: ConsoleMode = "rich"
    ) -> None:
        """`first_step` (from 0) is the first one that this process takes."""
        remaining = total_steps - first_step
        # The profiler's own start needs a step before the first one that it records, where there are two.
        self._recorded = min(_RECORDED_STEPS, max(remaining - 1, min(remaining, 1)))
        passed = min(_SKIPPED_STEPS + 1, remaining - self._recorded)
        first, last = first_step + passed + 1, first_step + passed + self._recorded
        self.path: Path | None = None
        self._console = make_console(console)
        self._profiler: Any = None
        if self._recorded:
            self.path = run_dir / FOLDER / f"steps-{first:06d}-{last:06d}-rank{rank}.trace.json.gz"
            warmup = min(1, passed)
            with warnings.catch_warnings():
                # A run of one step has none to warm up in.
                warnings.simplefilter("ignore", UserWarning)
                self._schedule = torch.profiler.schedule(
                    wait=passed - warmup, warmup=warmup, active=self._recorded, repeat=1
                )

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimiser step."""
        if self.path is None:
            yield
            return
        if self._profiler is None:
            # Its own notes of starting and stopping, on standard error.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self._profiler = torch.profiler.profile(
                activities=_activities(), schedule=self._schedule, on_trace_ready=self._write, record_shapes=True
            )
            self._profiler.start()
        yield
        self._profiler.step()
        if self.path is None:
            self._profiler.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        assert self.path is not None
        path, self.path = self.path, None
        path.parent.mkdir(parents=True, exist_ok=True)
        # The profiler compresses by the name's ending; a trace that a kill has torn never bears the name.
        aside = path.with_name(f"partial-{path.name}")
        profiler.export_chrome_trace(str(aside))
        aside.replace(path)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=_TABLE_ROWS, max_name_column_width=60)
        write_atomic(path.with_name(path.name.replace(".trace.json.gz", ".operators.txt")), table + "\n")
        self._console.say(
            f"profile of {self._recorded} steps: {path} (open in https://ui.perfetto.dev)",
            event="profile", path=str(path), num_steps=self._recorded,
        )  # fmt: skip


def _activities() -> list[torch.profiler.ProfilerActivity]:
    found = [torch.profiler.ProfilerActivity.CPU]
    return [*found, torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else found


def open_profiler(trainer: Trainer) -> StepProfiler:
    """The main rank's, where the recipe asks for it (`train.profile`); any other records nothing."""
    asked = trainer.recipe.train.profile and trainer.is_main
    return StepProfiler(
        trainer.run_dir,
        first_step=trainer.step,
        total_steps=trainer.total_steps if asked else trainer.step,
        rank=trainer.rank,
        console=trainer.recipe.tracking.console,
    )
