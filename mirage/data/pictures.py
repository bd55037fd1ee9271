"""Pictures from disk to tensors: decoded, preprocessed by the adapter, kept while in use."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from mirage.data.picture_files import open_picture as open_picture
from mirage.data.picture_files import picture_size as picture_size
from mirage.models.adapter import ModelAdapter, Picture

if TYPE_CHECKING:
    from mirage.data.tile_cache import TileCache


class PictureSource(Protocol):
    """Where rendering gets the tensors of a row's pictures."""

    # What stands for the picture of a packed row that has none; None for the adapter's own.
    dummy: Picture | None

    def load(self, path: Path, *, key: str, num_images: int) -> Picture:
        """The picture at `path`, whose content hash is `key`, in a sample of `num_images`. Raises `UserError`."""
        ...


class PictureLoader:
    """Preprocessed pictures by path, with the most recently used ones kept in memory up to `cache_bytes`.

    `tiles` keeps resized pictures on disk.
    """

    dummy: Picture | None = None

    def __init__(self, adapter: ModelAdapter, *, cache_bytes: int, tiles: TileCache | None = None) -> None:
        self._adapter = adapter
        self._tiles = tiles
        self._cache_bytes = cache_bytes
        self._held_bytes = 0
        self._cache: OrderedDict[tuple[str, str, int], Picture] = OrderedDict()

    def load(self, path: Path, *, key: str, num_images: int) -> Picture:
        """The picture at `path`, whose content hash is `key`, in a sample of `num_images`."""
        entry = (key, str(path) if not key else "", num_images)
        if entry in self._cache:
            self._cache.move_to_end(entry)
            return self._cache[entry]
        picture = self._adapter.normalize(self._pixels(path, num_images))
        self._cache[entry] = picture
        self._held_bytes += picture.nbytes
        while self._held_bytes > self._cache_bytes and self._cache:
            _, oldest = self._cache.popitem(last=False)
            self._held_bytes -= oldest.nbytes
        return picture

    def _pixels(self, path: Path, num_images: int) -> torch.Tensor:
        if self._tiles is not None:
            return self._tiles.pixels(path, self._adapter, num_images=num_images)
        return self._adapter.resize(open_picture(path), num_images=num_images)
