"""The loss: summed over supervised tokens, in fp32, with logits for those positions only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mirage.data.collate import PackedBatch
from mirage.models.adapter import IGNORE_INDEX


class PackedLossModel(torch.nn.Module):
    """A transformers model with its loss inside one forward, so that DeepSpeed's hooks see every module it uses.

    `forward(batch)` gives (weighted loss sum, number of rightly predicted tokens, number of supervised tokens). The sum
    is over the batch's supervised tokens; the caller divides by the weight of the whole global batch.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # use_cache=False is part of the contract of packed rows: with a cache, transformers attends across samples.
        hidden = self.hf.model(**batch.inputs, use_cache=False).last_hidden_state[0]
        supervised = batch.labels[1:] != IGNORE_INDEX
        target, weights = batch.labels[1:][supervised], batch.token_weights[1:][supervised]
        return self._chunked_loss(hidden[:-1][supervised], target, weights, num_chunks=batch.num_loss_chunks)

    def _chunked_loss(
        self, hidden: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, *, num_chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [N, H], target [N], weights [N]; logits of one chunk exist at a time, forward and backward."""
        if len(target) < num_chunks:
            # Every rank calls the head equally often; positions of weight 0 fill up what is missing.
            missing = num_chunks - len(target)
            hidden = torch.cat([hidden, hidden.new_zeros(missing, hidden.shape[1])])
            target = torch.cat([target, target.new_zeros(missing)])
            weights = torch.cat([weights, weights.new_zeros(missing)])
        total, correct = hidden.new_zeros((), dtype=torch.float32), target.new_zeros(())
        for part in zip(hidden.chunk(num_chunks), target.chunk(num_chunks), weights.chunk(num_chunks)):
            if num_chunks == 1:
                loss, right = self._head_loss(*part)
            else:
                loss, right = checkpoint(self._head_loss, *part, use_reentrant=False)
            total, correct = total + loss, correct + right
        return total, correct, (weights > 0).sum()

    def _head_loss(
        self, hidden: torch.Tensor, target: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.hf.lm_head(hidden).float()
        loss = (F.cross_entropy(logits, target, reduction="none") * weights).sum()
        right = ((logits.detach().argmax(-1) == target) & (weights > 0)).sum()
        return loss, right
