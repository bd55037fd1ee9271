"""Resized pictures on disk: decoded and cut once, read by every epoch, worker and run that shows them the same way."""

from __future__ import annotations

import hashlib
import inspect
import sys
from functools import lru_cache
from pathlib import Path

import PIL
import torch
from PIL import features

from mirage.data import picture_files, pictures
from mirage.data.tensor_store import TensorStore, content_key
from mirage.errors import UserError
from mirage.files import cache_dir
from mirage.models.adapter import ModelAdapter
from mirage.safe_paths import open_regular

_DECODERS = ("jpg", "libjpeg_turbo", "zlib", "zlib_ng", "webp", "jpg_2000", "libtiff", "avif")


def open_tile_cache(setting: str, *, limit_bytes: int) -> TileCache | None:
    """The cache that `data.tile_cache` names: None for `off`, `tiles/` in the cache ($MIRAGE_CACHE) for `auto`."""
    if setting == "off":
        return None
    folder = cache_dir() / "tiles" if setting == "auto" else Path(setting)
    return TileCache(folder, limit_bytes=limit_bytes)


class TileCache:
    """What `ModelAdapter.resize` made of pictures, uint8, by the picture's content and all that the result depends on.

    Pixels are kept as they are before normalisation: a quarter of the size of what the model takes, and normalising is
    arithmetic that gives the same bits. The key holds the sha256 of the picture's file, the adapter's settings for it,
    the source of the code that decodes and resizes, and the versions of Pillow and its decoders.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self.store = TensorStore(folder, limit_bytes=limit_bytes, setting="data.tile_cache")

    def pixels(self, path: Path, adapter: ModelAdapter, *, num_images: int) -> torch.Tensor:
        """Resized pixels of the picture at `path`, uint8 [N, height, width, 3]. Raises `UserError` for no picture."""
        content = read_picture(path)
        key = pixels_key(content, adapter, num_images=num_images)
        held = self.store.get(key)
        if held is not None and "pixels" in held:
            return held["pixels"]
        pixels = adapter.resize(pictures.open_picture(path, content=content), num_images=num_images)
        self.store.put(key, {"pixels": pixels})
        return pixels


def read_picture(path: Path) -> bytes:
    """A picture file's bytes. Raises `UserError` where there are none."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}") from error


def pixels_key(content: bytes, adapter: ModelAdapter, *, num_images: int) -> str:
    """Name of what `adapter` makes of a picture file's bytes in a sample of `num_images`."""
    settings = adapter.resize_settings(num_images=num_images)
    return content_key(hashlib.sha256(content).hexdigest(), adapter.family, settings, code_version(type(adapter)))


@lru_cache(maxsize=8)
def code_version(adapter_class: type[ModelAdapter]) -> str:
    """Changes with the code that opens and resizes pictures and with the libraries under it."""
    names = (adapter_class.__module__, pictures.__name__, picture_files.__name__)
    sources = [inspect.getsource(sys.modules[name]) for name in names]
    return content_key(sources, PIL.__version__, {name: features.version(name) for name in _known(_DECODERS)})


def _known(names: tuple[str, ...]) -> list[str]:
    """The decoders that this Pillow has heard of."""
    return [name for name in names if name in {*features.modules, *features.codecs, *features.features}]
