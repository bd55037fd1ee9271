"""Thumbnails for a page: each picture once, by its content, as a data URI, as many as the page has room for."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from mirage.data.picture_files import open_picture, read_picture
from mirage.errors import UserError

# Longest edge in pixels, and WebP's quality: enough to see what is there, about 3 kB a picture.
EDGE, QUALITY = 168, 68
# What may be spent on a page, whatever its size limit: about 10 seconds.
MAX_PICTURES = 4_000


class _NoRoom(Exception):
    """A picture would take more than is left."""


@dataclass
class Thumbnails:
    """Pictures by path, kept once for each content. `uris[number]` is the page's picture of that number."""

    limit_bytes: int
    uris: list[str] = field(default_factory=list)
    num_left_out: int = 0
    """Samples whose pictures found no room."""
    num_missing: int = 0
    """Files that are gone or cannot be decoded."""
    _numbers: dict[str, int | None] = field(default_factory=dict)
    """By path; None: not to be had."""
    _by_content: dict[str, int] = field(default_factory=dict)
    _used_bytes: int = 0
    _is_full: bool = False

    def add(self, paths: Iterable[str]) -> list[int | None] | None:
        """The numbers of a sample's pictures (None for one that cannot be read); None where there is no room for all.

        What a picture holds besides its pixels (place, camera, author) is not kept.
        """
        wanted = list(paths)
        try:
            if self._is_full and any(path not in self._numbers for path in wanted):
                raise _NoRoom
            return [self._number(path) for path in wanted]
        except _NoRoom:
            self._is_full = True
            self.num_left_out += 1
            return None

    @property
    def num_bytes(self) -> int:
        """Of all data URIs."""
        return self._used_bytes

    def _number(self, path: str) -> int | None:
        if path not in self._numbers:
            self._numbers[path] = self._read(Path(path))
        return self._numbers[path]

    def _read(self, path: Path) -> int | None:
        try:
            content = read_picture(path)
            key = hashlib.sha256(content).hexdigest()
            if key not in self._by_content:
                uri = data_uri(open_picture(path, content=content))
                if self._used_bytes + len(uri) > self.limit_bytes or len(self.uris) == MAX_PICTURES:
                    raise _NoRoom
                self._by_content[key] = len(self.uris)
                self.uris.append(uri)
                self._used_bytes += len(uri)
            return self._by_content[key]
        except (OSError, ValueError, UserError):
            self.num_missing += 1
            return None


def data_uri(image: Image.Image) -> str:
    """A small WebP of an RGB image."""
    small = image.copy()
    small.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=QUALITY, method=2)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
