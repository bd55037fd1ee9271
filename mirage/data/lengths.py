"""The length index: what every row costs, known before any picture is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mirage.config.schema import DataConfig
from mirage.data.length_cache import LengthCache, chunks, open_length_cache
from mirage.data.render import image_token_counts, render_text
from mirage.data.row_list import DIGEST_BYTES, RowList
from mirage.data.sources import LeftOut, SourcedRow, check_left_out
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
    cache: LengthCache | None = None,
) -> tuple[RowList, LengthIndex, list[LeftOut]]:
    """Rows that fit `pack_tokens`, their lengths, and the rows left out (only with `data.on_too_long=drop`).

    Lengths that `cache` knows are not counted again; without one, the cache folder's is asked for a thousand rows or
    more. Rows that cannot be rendered are added to `unusable` under `data.on_bad_row=skip`; with the `num_bad` bad rows
    that were found before, and those too long, they count against `data.max_left_out`. Raises `UserError` naming the
    row when one is too long or cannot be rendered and leaving out is not allowed, or when no row is left.
    """
    kept: list[int] = []
    counts = np.empty((3, len(rows)), np.int32)
    left_out: list[LeftOut] = []
    bad: list[LeftOut] = []
    for number, found in enumerate(_counts(rows, adapter, cache or open_length_cache(adapter, len(rows)))):
        if isinstance(found, UserError):
            if config.on_bad_row == "error":
                raise found
            bad.append(_left_out(rows, number, str(found)))
            continue
        if found[0] > config.pack_tokens:
            reason = f"row {rows.row_id(number)} has {found[0]} tokens, data.pack_tokens is {config.pack_tokens}"
            if config.on_too_long == "error":
                remedy = "raise data.pack_tokens, lower the image budget, or set data.on_too_long=drop"
                raise UserError(f"{rows.location(number)}: {reason}; {remedy}")
            left_out.append(_left_out(rows, number, reason))
            continue
        counts[:, len(kept)] = found
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
    taken = rows.take(kept)
    tokens, image_tokens, supervised = counts[:, : len(kept)]
    return taken, LengthIndex(tokens, image_tokens, supervised, taken.weights), left_out


def _left_out(rows: RowList, number: int, reason: str) -> LeftOut:
    return LeftOut(rows.part(number)[1], rows.location(number), rows.row_id(number), reason)


# All tokens, image tokens, supervised tokens of a row.
_Counts = Sequence[int]


def _counts(rows: RowList, adapter: ModelAdapter, cache: LengthCache | None) -> Iterator[_Counts | UserError]:
    """The counts of each row, or why it cannot be rendered."""
    if cache is None:
        yield from (_rendered(entry, adapter) for entry in rows)
        return
    for first, digests in chunks(rows):
        key, num_rows = cache.key(digests), len(digests) // DIGEST_BYTES
        held = cache.get(key, num_rows)
        if held is not None:
            # The message of one that cannot be rendered is made anew.
            for place, known in enumerate(held.tolist()):
                yield known if known[0] else _rendered(rows[first + place], adapter)
            continue
        made = np.zeros((num_rows, 3), np.int32)
        for place in range(num_rows):
            found = _rendered(rows[first + place], adapter)
            if not isinstance(found, UserError):
                made[place] = found
            yield found
        cache.put(key, made)


def _rendered(entry: SourcedRow, adapter: ModelAdapter) -> _Counts | UserError:
    try:
        rendered = render_text(entry, adapter)
    except UserError as error:
        return error
    num_image_tokens = sum(image_token_counts(entry.row, adapter))
    return len(rendered.input_ids), num_image_tokens, rendered.num_supervised_tokens
