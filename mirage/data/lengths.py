"""The length index: what every row costs, known before any picture is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mirage.config.schema import DataConfig
from mirage.data.render import image_token_counts, render_text
from mirage.data.row_list import RowList
from mirage.data.sources import LeftOut, check_left_out
from mirage.errors import UserError
from mirage.models.adapter import ModelAdapter


@dataclass(frozen=True)
class LengthIndex:
    """Arrays over the rows of a mixture: all tokens, image tokens, supervised tokens, loss weight of the source.

    Counts are int32 and weights float64, so a million rows are 20 MB.
    """

    num_tokens: np.ndarray
    num_image_tokens: np.ndarray
    num_supervised_tokens: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)


def index_rows(
    rows: RowList,
    adapter: ModelAdapter,
    config: DataConfig,
    *,
    unusable: list[LeftOut] | None = None,
    num_bad: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[RowList, LengthIndex, list[LeftOut]]:
    """Rows that fit `pack_tokens`, their lengths, and the rows left out (only with `data.on_too_long=drop`).

    Rows that cannot be rendered are added to `unusable` under `data.on_bad_row=skip`; with the `num_bad` bad rows that
    were found before, and those too long, they count against `data.max_left_out`. Raises `UserError` naming the row
    when one is too long or cannot be rendered and leaving out is not allowed, or when no row is left.
    """
    kept: list[int] = []
    counts, weights = np.empty((3, len(rows)), np.int32), np.empty(len(rows))
    left_out: list[LeftOut] = []
    bad: list[LeftOut] = []
    for number, entry in enumerate(rows):
        try:
            rendered = render_text(entry, adapter)
        except UserError as error:
            if config.on_bad_row == "error":
                raise
            bad.append(LeftOut(entry.source, entry.location, entry.row.id, str(error)))
            continue
        num_tokens = len(rendered.input_ids)
        if num_tokens > config.pack_tokens:
            reason = f"row {entry.row.id} has {num_tokens} tokens, data.pack_tokens is {config.pack_tokens}"
            if config.on_too_long == "error":
                remedy = "raise data.pack_tokens, lower the image budget, or set data.on_too_long=drop"
                raise UserError(f"{entry.location}: {reason}; {remedy}")
            left_out.append(LeftOut(entry.source, entry.location, entry.row.id, reason))
            continue
        num_image_tokens = sum(image_token_counts(entry.row, adapter))
        counts[:, len(kept)] = num_tokens, num_image_tokens, rendered.num_supervised_tokens
        weights[len(kept)] = entry.weight
        kept.append(number)
        if on_progress is not None:
            on_progress(number + 1)
    check_left_out([*bad, *left_out], config.max_left_out, before=num_bad)
    if unusable is not None:
        unusable += bad
    if not kept:
        raise UserError(
            f"no row is left to train on: {len(left_out)} of {len(rows)} are longer than data.pack_tokens="
            f"{config.pack_tokens} (raise it, or lower the image budget), {len(bad)} cannot be rendered"
        )
    tokens, image_tokens, supervised = counts[:, : len(kept)]
    return rows.take(kept), LengthIndex(tokens, image_tokens, supervised, weights[: len(kept)]), left_out
