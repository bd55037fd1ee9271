"""A rank's packed rows, prepared ahead of the loop in worker processes, and the time the loop waits for them."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_int64
from functools import partial
from multiprocessing.sharedctypes import RawArray
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mirage.data.collate import PackedBatch, collate
from mirage.data.lengths import LengthIndex
from mirage.data.pack import PackPlan
from mirage.data.parts import Parts
from mirage.data.pictures import PictureSource
from mirage.data.render import Sample, render_sample
from mirage.data.sources import SourcedRow
from mirage.errors import UserError
from mirage.models.adapter import ModelAdapter
from mirage.orphans import die_with_parent

MAX_WORKERS = 8
_IDLE = -1
_WORKER_GRACE_SECONDS = 3

Item = tuple[int, PackedBatch | UserError]


def worker_count(setting: int | None, environ: Mapping[str, str], *, num_cores: int | None = None) -> int:
    """Worker processes of a rank: as the recipe says, or one for each core that the rank has beside its own, 1 to 8."""
    if setting is not None:
        return setting
    cores = num_cores or len(os.sched_getaffinity(0))
    ranks = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("WORLD_SIZE") or 1)
    return min(MAX_WORKERS, max(1, cores // ranks - 1))


class PackDataset(Dataset):
    """Item (step, micro-step) of one rank: the step's number of micro-steps, and the batch or why there is none.

    Pixels are in `dtype`, the model's own, so that half as many bytes travel for a bf16 model. With `parts`, batches
    say which part of the data a position belongs to.
    """

    def __init__(
        self,
        rows: Sequence[SourcedRow],
        index: LengthIndex,
        plan: PackPlan,
        adapter: ModelAdapter,
        pictures: PictureSource,
        *,
        rank: int,
        reduction: str,
        loss_chunk_tokens: int,
        dtype: torch.dtype,
        parts: Parts | None = None,
    ) -> None:
        self._rows, self._index, self._plan, self._adapter, self._pictures = rows, index, plan, adapter, pictures
        self._rank, self._reduction, self._loss_chunk_tokens, self._dtype = rank, reduction, loss_chunk_tokens, dtype
        self._parts = parts
        self._planned: tuple[int, Any] = (-1, None)
        # Which row each worker is at, in memory that outlives a worker which dies.
        self.at_row: Any = None

    def __len__(self) -> int:
        return self._plan.num_steps

    def num_micro_steps(self, step: int) -> int:
        """Packed rows of this rank in optimiser step `step`."""
        return len(self._micro_steps(step))

    def location(self, row: int) -> str:
        """Where row `row` was read, for messages."""
        return f"{self._rows[row].location}: row {self._rows[row].row.id}"

    def __getitem__(self, place: tuple[int, int]) -> Item:
        step, micro_step = place
        try:
            batch: PackedBatch | UserError = self._pack(self._micro_steps(step)[micro_step])
        except UserError as error:
            batch = error
        return self.num_micro_steps(step), batch

    def _micro_steps(self, step: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        if self._planned[0] != step:
            self._planned = (step, self._plan.step(step).rows)
        return self._planned[1]

    def _pack(self, micro_step: tuple[tuple[int, ...], ...]) -> PackedBatch:
        supervised = [int(self._index.num_supervised_tokens[list(row)].sum()) for row in micro_step]
        # Under ZeRO-3 every call of the head is a collective: all ranks cut into equally many chunks.
        num_loss_chunks = max(1, -(-max(supervised) // self._loss_chunk_tokens))
        samples = [self._sample(number) for number in micro_step[self._rank]]
        batch = collate(
            samples,
            self._adapter,
            reduction=self._reduction,
            num_loss_chunks=num_loss_chunks,
            dummy=self._pictures.dummy,
        )
        if self._parts is not None:
            batch = self._parts.label(batch, [self._rows[number] for number in micro_step[self._rank]], self._adapter)
        return batch.to(torch.device("cpu"), self._dtype)

    def _sample(self, number: int) -> Sample:
        self._note(number)
        try:
            return render_sample(self._rows[number], self._adapter, self._pictures)
        except UserError:
            raise
        except Exception as error:
            error.add_note(f"while preparing {self.location(number)}")
            raise
        finally:
            self._note(_IDLE)

    def _note(self, number: int) -> None:
        worker = get_worker_info()
        if worker is not None and self.at_row is not None:
            self.at_row[worker.id] = number


class StepLoader:
    """This rank's micro-batches, step by step from `first_step`; iterate once.

    Workers are forked: they share the rows' memory, and touch neither the process group nor a GPU. Together they hold
    packs of about one step ahead (at least two packs each), so memory is bounded by two steps of packs.
    `wait_seconds` is how long the last step was waited for.
    Raises the `UserError` of a row that cannot be read at the step that needs it, and one that names the row when a
    worker dies.
    """

    def __init__(self, dataset: PackDataset, *, first_step: int, num_workers: int) -> None:
        self._dataset, self._first_step, self._num_workers = dataset, first_step, num_workers
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        items = self._items()
        for _ in range(self._first_step, len(self._dataset)):
            started = time.perf_counter()
            num_micro_steps, batch = self._next(items)
            batches = [batch]
            while len(batches) < num_micro_steps:
                batches.append(self._next(items)[1])
            self.wait_seconds = time.perf_counter() - started
            yield batches

    def _places(self) -> Iterator[tuple[int, int]]:
        for step in range(self._first_step, len(self._dataset)):
            yield from ((step, micro_step) for micro_step in range(self._dataset.num_micro_steps(step)))

    def _items(self) -> Iterator[Item]:
        workers = self._num_workers
        if not workers:
            yield from (self._dataset[place] for place in self._places())
            return
        if self._first_step >= len(self._dataset):
            return
        ahead = self._dataset.num_micro_steps(self._first_step)
        self._dataset.at_row = RawArray(c_int64, [_IDLE] * workers)
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=_Places(self),
            num_workers=workers,
            prefetch_factor=max(2, math.ceil(ahead / workers)),
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork",
            # Its workers' seed would else come from the state that dropout draws from, once more at each restart.
            generator=torch.Generator(),
            worker_init_fn=partial(_serve_the_rank, os.getpid()),
        )
        with _sigchld_as_it_was(), _new_children() as children:
            iterator = iter(loader)
        try:
            yield from iterator
        except RuntimeError as error:
            death = self._death(children)
            if death is None:
                raise
            raise death from error

    def _next(self, items: Iterator[Item]) -> tuple[int, PackedBatch]:
        num_micro_steps, batch = next(items)
        if isinstance(batch, UserError):
            batch.one_rank_only = True
            raise batch
        return num_micro_steps, batch

    def _death(self, children: Sequence[multiprocessing.process.BaseProcess]) -> UserError | None:
        """The message for a worker that ended by itself, if one did."""
        dead = [(number, child.exitcode) for number, child in enumerate(children) if child.exitcode is not None]
        if not dead:
            return None
        worker, code = dead[0]
        row = self._dataset.at_row[worker]
        where = f"while it prepared {self._dataset.location(row)}" if row != _IDLE else "between two rows"
        death = UserError(
            f"data worker {worker} {_ending(code or 0)} {where}. {_REMEDIES.get(-(code or 0), _REMEDY)}; "
            "data.num_workers=0 prepares pictures in the training process and shows more"
        )
        death.one_rank_only = True
        return death


_REMEDY = "Look at the pictures of that row"
_REMEDIES: dict[int, str] = {
    signal.SIGKILL: "The machine is probably out of memory: lower data.num_workers or data.picture_cache_bytes",
    signal.SIGBUS: "Shared memory (/dev/shm) is probably full: give the container more (docker run --shm-size=16g)",
}


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by {signal.Signals(-code).name}"


class _Places:
    """The sampler: (step, micro-step) in the order of training."""

    def __init__(self, loader: StepLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self._loader._places()


def _serve_the_rank(rank_pid: int, _worker: int) -> None:
    """Signals that reach every process of a terminal, a group or a job are the rank's; it ends its workers itself.

    SIGTERM ends a worker after some seconds, in which the rank gets the packs of its last step.
    """
    die_with_parent(rank_pid)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKER_GRACE_SECONDS))


@contextlib.contextmanager
def _sigchld_as_it_was() -> Iterator[None]:
    """torch raises from a signal handler when a worker dies, amid whatever runs; here it is met at `next`."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def _new_children() -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """The processes started inside the block, in the order of their start."""
    before = set(multiprocessing.active_children())
    found: list[multiprocessing.process.BaseProcess] = []
    yield found
    started = [child for child in multiprocessing.active_children() if child not in before]
    found += sorted(started, key=lambda child: int(child.name.rsplit("-", 1)[-1]))
