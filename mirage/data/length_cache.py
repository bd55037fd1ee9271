"""Lengths of rows on disk: rendered and tokenised once, read by every later start that renders the same rows alike."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mirage.data import render, row, views
from mirage.data.row_list import RowList
from mirage.data.tensor_store import TensorStore, content_key
from mirage.errors import UserError
from mirage.files import cache_dir
from mirage.models.adapter import ModelAdapter

LOGGER = logging.getLogger(__name__)
# 12 bytes a row: twenty million rows.
LIMIT_BYTES = 256 * 1024**2
# Fewer are rendered in about a second.
MIN_ROWS = 1000
# A chunk ends after a row whose digest has these low bits at zero, 2,048 rows on average, and at this length.
_CHUNK_MASK, _MAX_CHUNK_ROWS = 0x7FF, 8192
_COUNTS = "counts"


class LengthCache:
    """Counts of rows (all tokens, image tokens, supervised tokens) by what they depend on, a file a chunk of rows.

    A file's key holds the content and view of each row of its chunk, and all that rendering depends on: the tokenizer,
    the adapter's settings and config, the code that renders, the versions of the libraries under it. Where a chunk ends
    is told by the rows themselves, so that a row that is put in, changed or removed leaves the other chunks as they
    are. A file that is damaged or has another key counts as absent, and a kill loses the chunk being rendered.
    """

    def __init__(self, folder: Path, adapter: ModelAdapter) -> None:
        self.store = TensorStore(folder, limit_bytes=LIMIT_BYTES, setting="MIRAGE_CACHE")
        self._context = rendering_key(adapter)

    def key(self, digests: bytes) -> str:
        """Name of the counts of the rows with these digests, in order."""
        return content_key(self._context, hashlib.sha256(digests).hexdigest())

    def get(self, key: str, num_rows: int) -> np.ndarray | None:
        """[rows, 3] int32, or None. A row of zeros stands for one that cannot be rendered."""
        held = (self.store.get(key) or {}).get(_COUNTS)
        if held is None or held.dtype != torch.int32 or tuple(held.shape) != (num_rows, 3):
            return None
        return held.numpy()

    def put(self, key: str, counts: np.ndarray) -> None:
        """Keep the counts of a chunk, [rows, 3] int32; where that is not possible the run goes on without."""
        self.store.put(key, {_COUNTS: torch.from_numpy(counts)})


def open_length_cache(adapter: ModelAdapter, num_rows: int) -> LengthCache | None:
    """The cache `lengths/` in the cache folder ($MIRAGE_CACHE); None for few rows, or where it cannot be written."""
    if num_rows < MIN_ROWS or getattr(adapter.tokenizer, "backend_tokenizer", None) is None:
        return None
    try:
        return LengthCache(cache_dir() / "lengths", adapter)
    except UserError as error:
        LOGGER.warning("lengths of rows are not kept: %s", error)
        return None


def chunks(rows: RowList) -> Iterator[tuple[int, bytes]]:
    """(first row, digests of its rows, 16 bytes each) of each chunk, in order."""
    first, digests = 0, bytearray()
    for number in range(len(rows)):
        digest = rows.digest(number)
        digests += digest
        is_end = int.from_bytes(digest[-2:], "big") & _CHUNK_MASK == 0
        if is_end or number + 1 - first == _MAX_CHUNK_ROWS or number + 1 == len(rows):
            yield first, bytes(digests)
            first, digests = number + 1, bytearray()


def rendering_key(adapter: ModelAdapter) -> str:
    """Changes with everything that a row's counts depend on besides the row."""
    tokenizer = adapter.tokenizer
    classes = [item.__module__ for item in type(adapter).__mro__ if item.__module__.startswith("mirage.")]
    modules = [*dict.fromkeys(classes), render.__name__, row.__name__, views.__name__]
    config = {name: value for name, value in adapter.config.to_dict().items() if name != "_name_or_path"}
    flags = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool)}
    return content_key(
        [inspect.getsource(sys.modules[name]) for name in modules],
        [adapter.family, adapter.default_system_prompt, list(adapter.prefix_ids), adapter.image_token_id],
        adapter.spec.model_dump(mode="json"),
        json.dumps(config, sort_keys=True, default=str),
        [type(tokenizer).__name__, flags, hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()],
        {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
    )
