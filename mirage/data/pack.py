"""The pack plan: which samples go into which row of which rank at which step, as arithmetic.

A step is `batch_samples` samples, whatever the number of ranks. Its samples are dealt into rows of at most
`pack_tokens` tokens so that the rows of one micro-step cost about the same on every rank. The plan is a pure function
of (lengths, seed, step, world size, budget): resuming at step k computes step k and nothing before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mirage.data.lengths import LengthIndex


@dataclass(frozen=True)
class CostModel:
    """Relative cost of a sample: linear in its tokens, dearer for image tokens, and quadratic through attention.

    `vision_share` is the vision tower's cost of an image token relative to a language token's linear layers (about
    0.09 for Qwen2-VL-7B and 0.04 for InternVL2.5-8B with a frozen tower); `attention_tokens` is the sample length at
    which attention costs as much as the linear layers (about six times the hidden size).
    """

    vision_share: float = 0.1
    attention_tokens: float = 24_576.0

    def costs(self, index: LengthIndex) -> np.ndarray:
        """Cost of each sample, in language tokens."""
        tokens = index.num_tokens.astype(np.float64)
        return tokens + self.vision_share * index.num_image_tokens + tokens**2 / self.attention_tokens


@dataclass(frozen=True)
class StepPlan:
    """One optimiser step: `rows[micro_step][rank]` is a tuple of sample numbers (empty where there are too few)."""

    step: int
    rows: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def samples(self) -> list[int]:
        """All samples of the step, sorted; a sample can appear twice where two epochs meet."""
        return sorted(sample for micro_step in self.rows for row in micro_step for sample in row)


class PackPlan:
    """Plans of all steps of a run."""

    def __init__(
        self,
        index: LengthIndex,
        *,
        batch_samples: int,
        pack_tokens: int,
        world_size: int,
        epochs: float,
        seed: int,
        max_steps: int | None = None,
        cost_model: CostModel | None = None,
    ) -> None:
        self._index = index
        self._batch_samples = batch_samples
        self._pack_tokens = pack_tokens
        self._world_size = world_size
        self._seed = seed
        self._costs = (cost_model or CostModel()).costs(index)
        self._stream_samples = math.ceil(epochs * len(index))
        num_steps = math.ceil(self._stream_samples / batch_samples)
        self.num_steps = min(num_steps, max_steps) if max_steps is not None else num_steps
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps in one pass over the mixture."""
        return len(self._index) / self._batch_samples

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._index))

    def step_samples(self, step: int) -> np.ndarray:
        """Sample numbers of optimiser step `step` (from 0): the same for every world size and budget."""
        start = step * self._batch_samples
        stop = min(start + self._batch_samples, self._stream_samples)
        positions = np.arange(start, stop)
        epochs, offsets = np.divmod(positions, len(self._index))
        return np.concatenate([self._order(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def step(self, step: int) -> StepPlan:
        """Rows of optimiser step `step`, balanced over ranks."""
        samples = self.step_samples(step)
        tokens = int(self._index.num_tokens[samples].sum())
        num_micro_steps = max(1, math.ceil(tokens / (self._world_size * self._pack_tokens)))
        while True:
            rows = self._deal(samples, num_micro_steps * self._world_size)
            if rows is not None:
                break
            num_micro_steps += 1
        # Rows of like cost meet in one micro-step, where ranks wait for each other at every layer.
        rows.sort(key=lambda row: (-self._costs[list(row)].sum(), row))
        return StepPlan(
            step,
            tuple(
                tuple(rows[micro * self._world_size : (micro + 1) * self._world_size])
                for micro in range(num_micro_steps)
            ),
        )

    def _deal(self, samples: np.ndarray, num_rows: int) -> list[tuple[int, ...]] | None:
        """Longest first into the cheapest row with room (ties by row number); None when some sample finds no room."""
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        row_costs, row_tokens = np.zeros(num_rows), np.zeros(num_rows, dtype=np.int64)
        order = samples[np.lexsort((samples, -self._costs[samples]))]
        for sample in order.tolist():
            length = int(self._index.num_tokens[sample])
            fits = row_tokens + length <= self._pack_tokens
            if not fits.any():
                return None
            row = int(np.argmin(np.where(fits, row_costs, np.inf)))
            rows[row].append(sample)
            row_costs[row] += self._costs[sample]
            row_tokens[row] += length
        return [tuple(row) for row in rows]

    def imbalance(self, step: int) -> float:
        """Time that ranks wait for the dearest row of each micro-step: max cost / mean cost, over the step."""
        plan = self.step(step)
        costs = np.array([[self._costs[list(row)].sum() for row in micro] for micro in plan.rows])
        return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())
