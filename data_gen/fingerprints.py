"""Fingerprints of texts and pictures: what stays the same when a prompt is retyped or a picture is saved anew."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from mirage.data.picture_files import open_picture
from mirage.data.row import ImageRef

GRAM_WORDS = 8  # n of the word n-grams
SHINGLE_CHARS = 4  # length of the character shingles that near texts are compared by
SKETCH_WORDS = 8  # 64-bit words of a text sketch
SKETCH_BITS = 64 * SKETCH_WORDS
SHINGLE_BLOCK = 2048  # shingles sketched at a time, which bounds the memory of a long text

CANVAS_PIXELS = 192  # pictures are compared at this width and height, whatever their aspect
HASH_PIXELS = 32  # input of the DCT, as in the usual pHash
HASH_EDGE = 8  # low frequencies kept on each axis: 64 bits
COLOUR_EDGE = 4  # the colour layout is a mosaic of 4 x 4 tones
COLOUR_LEVELS = COLOUR_EDGE * COLOUR_EDGE * 3
FLAT_LEVELS = 2.0  # a picture whose grey levels deviate less than this (of 256) shows nothing that could leak
# Crops that a benchmark picture is also known by: two sizes, each at nine places. A crop that keeps 87% or more of each
# edge lies within 10 bits and 7 colour levels of one of them in most cases (benchmarks/decontamination_recall.py).
CROP_SCALES = (0.94, 0.87)
CROP_PLACES = (0.0, 0.5, 1.0)
NUM_VIEWS = 1 + len(CROP_SCALES) * len(CROP_PLACES) ** 2

# A word is a run of letters and digits, or one character of a script that is written without spaces.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
IMAGE_PLACEHOLDER = re.compile(r"<\s*/?\s*image[\s_-]*\d*\s*>", re.IGNORECASE)

Bits = NDArray[np.uint64]
Levels = NDArray[np.uint8]


def words(text: str) -> tuple[str, ...]:
    """The words of a text: Unicode-compatible forms, small letters, no accents, marks, or `<image>` placeholders."""
    plain = unicodedata.normalize("NFKD", IMAGE_PLACEHOLDER.sub(" ", text)).casefold()
    return tuple(WORD.findall("".join(char for char in plain if not unicodedata.combining(char))))


def normalise(text: str) -> str:
    """The words, joined by single spaces."""
    return " ".join(words(text))


def keyed_hash(text: str, *, salt: bytes, kind: str) -> int:
    """64 bits of BLAKE2b keyed with `salt` (at most 64 bytes). `kind` (at most 16 bytes) parts the uses of one salt."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=salt, person=kind.encode()).digest()
    return int.from_bytes(digest, "big")


def shingles(text: str) -> frozenset[str]:
    """Character shingles of the normalised text, with a space at both ends so that short words count too."""
    padded = f" {normalise(text)} "
    return frozenset(padded[start : start + SHINGLE_CHARS] for start in range(max(1, len(padded) - SHINGLE_CHARS + 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Shared share of two sets; 1 for two empty ones."""
    union = len(first | second)
    return len(first & second) / union if union else 1.0


@dataclass(frozen=True)
class TextPrint:
    """What is kept of a text: nothing that it can be read back from without guessing eight words in a row."""

    digest: int
    """Keyed hash of the normalised text."""
    num_words: int
    grams: tuple[int, ...]
    """Keyed hashes of the word 8-grams, in order, with repeats; none for a shorter text."""
    sketch: Bits
    """(SKETCH_WORDS,) one bit of each of 512 MinHash values over the shingles."""


def text_print(text: str, *, salt: bytes) -> TextPrint:
    """The fingerprint of a text under a salt. Only fingerprints of one salt can be compared."""
    found = words(text)
    grams = tuple(
        keyed_hash(" ".join(found[start : start + GRAM_WORDS]), salt=salt, kind="gram")
        for start in range(len(found) - GRAM_WORDS + 1)
    )
    hashes = [keyed_hash(shingle, salt=salt, kind="shingle") for shingle in sorted(shingles(text))]
    return TextPrint(
        digest=keyed_hash(" ".join(found), salt=salt, kind="text"),
        num_words=len(found),
        grams=grams,
        sketch=_sketch(np.array(hashes, dtype=np.uint64)),
    )


def _mix(values: Bits) -> Bits:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_SEEDS = _mix(np.arange(1, SKETCH_BITS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _sketch(hashes: Bits) -> Bits:
    """(SKETCH_WORDS,) the lowest bit of each MinHash (Li and Koenig 2010, b-bit minwise hashing with b = 1)."""
    least = np.full(SKETCH_BITS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(hashes), SHINGLE_BLOCK):
        block = hashes[start : start + SHINGLE_BLOCK]
        least = np.minimum(least, _mix(block[:, None] ^ _SEEDS[None, :]).min(axis=0))
    return _pack((least & np.uint64(1)).astype(bool).reshape(SKETCH_WORDS, 64))


def _pack(bits: NDArray[np.bool_]) -> Bits:
    """(..., 64) booleans as (...,) 64-bit numbers, first bit highest."""
    weights = np.uint64(1) << np.arange(63, -1, -1, dtype=np.uint64)
    return np.where(bits, weights, np.uint64(0)).sum(axis=-1, dtype=np.uint64)


def sketch_similarity(first: Bits, second: Bits) -> NDArray[np.float64]:
    """(n, m) estimated Jaccard similarity of (n, SKETCH_WORDS) and (m, SKETCH_WORDS) sketches; standard error 0.04.

    Two bits agree with probability (1 + J) / 2, so J is twice the share of equal bits less 1, and 0 where negative.
    """
    different = np.zeros((len(first), len(second)), dtype=np.uint16)
    for word in range(SKETCH_WORDS):
        different += np.bitwise_count(first[:, None, word] ^ second[None, :, word])
    return np.maximum(0.0, 1.0 - 2.0 * different / SKETCH_BITS)


@dataclass(frozen=True)
class ImagePrint:
    """What is kept of a picture. `phash` and `colour` hold one entry a view: the whole picture, then its crops."""

    pixels: str
    """sha256 of width, height and RGB values: equal for every lossless encoding of the same picture."""
    phash: Bits
    """(views,) perceptual hashes of 64 bits."""
    colour: Levels
    """(views, 48) mean RGB levels of a 4 x 4 mosaic, row by row."""
    flat: bool
    """The picture has (almost) one tone, so that it identifies nothing."""


def image_print(image: Image.Image, *, crops: bool = False) -> ImagePrint:
    """The fingerprint of an RGB picture; with `crops` it is also known by its crops (NUM_VIEWS views instead of 1)."""
    canvas = image.resize((CANVAS_PIXELS, CANVAS_PIXELS), Image.Resampling.LANCZOS, reducing_gap=3.0)
    grey = canvas.convert("L")
    boxes = [(0, 0, CANVAS_PIXELS, CANVAS_PIXELS), *(_crop_boxes() if crops else ())]
    header = f"{image.width}x{image.height}:".encode()
    return ImagePrint(
        pixels=hashlib.sha256(header + image.tobytes()).hexdigest(),
        phash=_phashes([grey.resize((HASH_PIXELS, HASH_PIXELS), Image.Resampling.LANCZOS, box) for box in boxes]),
        colour=np.stack([_colour_layout(canvas, box) for box in boxes]),
        flat=bool(np.asarray(grey, dtype=np.float64).std() < FLAT_LEVELS),
    )


def _crop_boxes() -> list[tuple[int, int, int, int]]:
    boxes = []
    for scale in CROP_SCALES:
        edge = round(CANVAS_PIXELS * scale)
        starts = [round((CANVAS_PIXELS - edge) * place) for place in CROP_PLACES]
        boxes += [(left, top, left + edge, top + edge) for top in starts for left in starts]
    return boxes


def _phashes(views: list[Image.Image]) -> Bits:
    """The usual pHash: the 8 x 8 lowest DCT frequencies of a 32 x 32 grey picture, above their median or not."""
    levels = np.stack([np.asarray(view, dtype=np.float64) for view in views])
    lowest = dctn(levels, axes=(1, 2))[:, :HASH_EDGE, :HASH_EDGE].reshape(len(views), 64)
    return _pack(lowest > np.median(lowest, axis=1, keepdims=True))


def _colour_layout(image: Image.Image, box: tuple[int, int, int, int]) -> Levels:
    mosaic = image.resize((COLOUR_EDGE, COLOUR_EDGE), Image.Resampling.BOX, box)
    return np.asarray(mosaic, dtype=np.uint8).reshape(COLOUR_LEVELS)


class PicturePrints:
    """Fingerprints of a folder's pictures, each read once. `deduplicate` and `decontaminate` can share one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prints: dict[tuple[str, bool], ImagePrint] = {}

    def get(self, image: ImageRef, *, crops: bool = False) -> ImagePrint:
        """The fingerprint of a row's picture. Raises UserError for a file that is missing or no picture."""
        key = (image.sha256, crops)
        if key not in self._prints:
            self._prints[key] = image_print(open_picture(self.root / image.path), crops=crops)
        return self._prints[key]


@dataclass(frozen=True)
class ImageDistance:
    """How far two pictures are apart, over the views of the second one."""

    bits: int
    """Differing bits of the perceptual hashes, of 64."""
    colour_levels: float
    """Mean difference of the colour layouts, of 256 levels."""


def near_images(
    phash: Bits, colour: Levels, other_phash: Bits, other_colour: Levels, *, max_bits: int, max_levels: float
) -> dict[tuple[int, int], ImageDistance]:
    """Pairs of pictures that are near by both measures: (n,) hashes against the (m, views) of others.

    Either measure alone errs: a pictogram on another background keeps its hash, and a plain background its colours.
    Returns the nearest view of each pair (row, column), in order.
    """
    pairs: dict[tuple[int, int], ImageDistance] = {}
    views = other_phash.shape[1] if other_phash.ndim == 2 else 0
    flat_hashes, flat_colours = other_phash.reshape(-1), other_colour.reshape(-1, COLOUR_LEVELS).astype(np.int16)
    for row in range(len(phash) if views else 0):
        bits = np.bitwise_count(flat_hashes ^ phash[row])
        for place in np.flatnonzero(bits <= max_bits):
            levels = float(np.abs(flat_colours[place] - colour[row].astype(np.int16)).mean())
            if levels > max_levels:
                continue
            found = ImageDistance(int(bits[place]), round(levels, 2))
            key = (row, int(place) // views)
            if key not in pairs or (found.bits, found.colour_levels) < (pairs[key].bits, pairs[key].colour_levels):
                pairs[key] = found
    return dict(sorted(pairs.items()))
