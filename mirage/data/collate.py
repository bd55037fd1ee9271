"""From samples to one packed row's tensors, and the loader that prepares each rank's rows ahead of the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mirage.data.lengths import LengthIndex
from mirage.data.pack import PackPlan
from mirage.data.pictures import PictureLoader
from mirage.data.render import Sample, dummy_sample, render_sample
from mirage.data.sources import SourcedRow
from mirage.errors import UserError
from mirage.models.adapter import ModelAdapter


@dataclass(frozen=True)
class PackedBatch:
    """One packed row, [1, L].

    `inputs` are the model's keyword arguments (input_ids, position_ids, cu_seq_lens_*, max_length_*, pictures);
    `labels` [L] and `token_weights` [L] are the loss's. `num_loss_chunks` is the same on all ranks of a micro-step.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    token_weights: torch.Tensor
    row_ids: tuple[str, ...]
    num_loss_chunks: int = 1

    def to(self, device: torch.device, dtype: torch.dtype) -> PackedBatch:
        """The batch on a device, pixels in the model's type."""
        inputs = {
            key: (value.to(device, dtype) if value.is_floating_point() else value.to(device))
            if isinstance(value, torch.Tensor)
            else value
            for key, value in self.inputs.items()
        }
        return PackedBatch(
            inputs, self.labels.to(device), self.token_weights.to(device), self.row_ids, self.num_loss_chunks
        )


def reduction_weight(num_supervised_tokens: np.ndarray | float, reduction: str) -> Any:
    """Weight of each token of a sample: 1 (token), 1/n (sample), 1/sqrt(n) (square; InternVL's `loss_reduction`)."""
    return {
        "token": lambda n: n * 0 + 1.0,
        "sample": lambda n: 1.0 / n,
        "square": lambda n: 1.0 / np.sqrt(n),
    }[reduction](num_supervised_tokens)


def step_weight(index: LengthIndex, samples: Sequence[int], reduction: str) -> float:
    """Sum of token weights over a step's samples: what the summed loss is divided by, known without communication."""
    counts = index.num_supervised_tokens[list(samples)].astype(np.float64)
    return float((counts * reduction_weight(counts, reduction) * index.weights[list(samples)]).sum())


def collate(
    samples: Sequence[Sample], adapter: ModelAdapter, *, reduction: str = "token", num_loss_chunks: int = 1
) -> PackedBatch:
    """Pack samples into one row. A row without pictures gets an isolated dummy, so every rank runs the vision tower."""
    samples = list(samples)
    if not any(sample.pictures for sample in samples):
        samples.append(dummy_sample(adapter))
    lengths = torch.tensor([sample.num_tokens for sample in samples])
    cu_seq_lens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    input_ids = torch.cat([sample.input_ids for sample in samples]).unsqueeze(0)
    positions = torch.cat([sample.position_ids for sample in samples], dim=1)
    inputs = {
        "input_ids": input_ids,
        "position_ids": positions if len(positions) == 1 else positions.unsqueeze(1),
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        **adapter.token_inputs(input_ids),
        **adapter.picture_inputs([picture for sample in samples for picture in sample.pictures]),
    }
    weights = [
        sample.weight * float(reduction_weight(float(max(1, sample.num_supervised_tokens)), reduction))
        for sample in samples
    ]
    return PackedBatch(
        inputs=inputs,
        labels=torch.cat([sample.labels for sample in samples]),
        token_weights=torch.cat([torch.full((sample.num_tokens,), weight) for sample, weight in zip(samples, weights)]),
        row_ids=tuple(sample.row_id for sample in samples),
        num_loss_chunks=num_loss_chunks,
    )


class PackDataset(Dataset):
    """Item (step, micro-step) of one rank: a packed batch, or the `UserError` that making it raised."""

    def __init__(
        self,
        rows: Sequence[SourcedRow],
        index: LengthIndex,
        plan: PackPlan,
        adapter: ModelAdapter,
        *,
        rank: int,
        reduction: str,
        loss_chunk_tokens: int,
        picture_cache_bytes: int,
    ) -> None:
        self._rows, self._index, self._plan, self._adapter = rows, index, plan, adapter
        self._rank, self._reduction, self._loss_chunk_tokens = rank, reduction, loss_chunk_tokens
        self._loader = PictureLoader(adapter, cache_bytes=picture_cache_bytes)

    def __len__(self) -> int:
        return self._plan.num_steps

    def __getitem__(self, step: int) -> list[PackedBatch] | UserError:
        """All micro-batches of optimiser step `step` for this rank."""
        try:
            return [self._pack(micro_step) for micro_step in self._plan.step(step).rows]
        except UserError as error:
            return error

    def _pack(self, micro_step: tuple[tuple[int, ...], ...]) -> PackedBatch:
        supervised = [int(self._index.num_supervised_tokens[list(row)].sum()) for row in micro_step]
        # Under ZeRO-3 every call of the head is a collective: all ranks cut into equally many chunks.
        num_loss_chunks = max(1, -(-max(supervised) // self._loss_chunk_tokens))
        samples = [render_sample(self._rows[number], self._adapter, self._loader) for number in micro_step[self._rank]]
        return collate(samples, self._adapter, reduction=self._reduction, num_loss_chunks=num_loss_chunks)


def iterate_steps(dataset: PackDataset, *, first_step: int, num_workers: int) -> Iterator[list[PackedBatch]]:
    """This rank's micro-batches, step by step from `first_step`, prepared ahead in worker processes.

    Raises the `UserError` of a row that cannot be read at the step that needs it.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first_step, len(dataset)),
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        persistent_workers=False,
    )
    for item in loader:
        if isinstance(item, UserError):
            item.one_rank_only = True
            raise item
        yield item
