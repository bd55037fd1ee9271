"""The index of a benchmark: keyed hashes of its texts and pictures, which can be shared without sharing the test."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from data_gen.benchmark_files import BenchmarkImage, BenchmarkRecord, content_sha256, read_benchmark
from data_gen.fingerprints import COLOUR_LEVELS, NUM_VIEWS, SKETCH_WORDS, image_print, keyed_hash, normalise, text_print
from mirage.data.row import canonical_json
from mirage.errors import UserError
from mirage.files import sync
from mirage.strict_json import parse_json

FORMAT, VERSION = "mirage-benchmark-index", 1
SUFFIX = ".safetensors"
NONE = 0  # a hash that is not there


@dataclass(frozen=True)
class BenchmarkIndex:
    """Fingerprints of n entries (a record's prompt) and m pictures, all under one salt."""

    name: str
    salt: bytes
    ids: tuple[str, ...]
    files: tuple[str, ...]
    digest: NDArray[np.uint64]
    """(n,) hash of the normalised text."""
    sketch: NDArray[np.uint64]
    """(n, SKETCH_WORDS)."""
    grams: NDArray[np.uint64]
    """Hashes of word 8-grams, entry after entry; entry i has those from gram_starts[i] to gram_starts[i + 1]."""
    gram_starts: NDArray[np.int64]
    concepts: NDArray[np.uint64]
    """(n,) hash of the set of concepts shown, or 0."""
    images: NDArray[np.int64]
    """Picture numbers, entry after entry, divided by `image_starts` as the grams are."""
    image_starts: NDArray[np.int64]
    pixels: NDArray[np.uint64]
    """(m,) hash of the decoded pixels."""
    drawing: NDArray[np.uint64]
    """(m,) hash of a drawn picture's art and layout, or 0."""
    flat: NDArray[np.bool_]
    """(m,) pictures of one tone, which identify nothing."""
    phash: NDArray[np.uint64]
    """(m, NUM_VIEWS)."""
    colour: NDArray[np.uint8]
    """(m, NUM_VIEWS, COLOUR_LEVELS)."""
    texts: tuple[str, ...] | None = None
    """The prompts themselves, for the evidence; never saved."""

    def __len__(self) -> int:
        return len(self.ids)

    def entry_grams(self, entry: int) -> NDArray[np.uint64]:
        """The word 8-grams of an entry, in order."""
        return self.grams[self.gram_starts[entry] : self.gram_starts[entry + 1]]

    def entry_images(self, entry: int) -> NDArray[np.int64]:
        """The pictures of an entry, in order."""
        return self.images[self.image_starts[entry] : self.image_starts[entry + 1]]


_ARRAYS = {
    "digest": (np.uint64, 1),
    "sketch": (np.uint64, 2),
    "grams": (np.uint64, 1),
    "gram_starts": (np.int64, 1),
    "concepts": (np.uint64, 1),
    "images": (np.int64, 1),
    "image_starts": (np.int64, 1),
    "pixels": (np.uint64, 1),
    "drawing": (np.uint64, 1),
    "flat": (np.bool_, 1),
    "phash": (np.uint64, 2),
    "colour": (np.uint8, 3),
}


def concept_hash(concepts: Iterable[str], *, salt: bytes) -> int:
    """Keyed hash of a set of two or more concepts, whatever their order; NONE for fewer."""
    names = sorted({normalise(concept) for concept in concepts})
    return keyed_hash("|".join(names), salt=salt, kind="concepts") if len(names) > 1 else NONE


def build_index(
    path: Path,
    *,
    name: str | None = None,
    image_root: Path | None = None,
    texts_only: bool = False,
    salt: bytes | None = None,
) -> BenchmarkIndex:
    """The index of the benchmark at `path` (see `read_benchmark`), with its texts in memory for the evidence.

    The default salt is a hash of the benchmark's own files, so that the same files give the same index. Raises
    UserError for a benchmark that cannot be read in full.
    """
    salt = salt if salt is not None else content_sha256(path)
    builder = _Builder(salt)
    for record in read_benchmark(path, image_root=image_root, texts_only=texts_only):
        builder.add(record)
    if not builder.ids:
        raise UserError(f"{path}: holds no test records, so that nothing could be found with it")
    return builder.finish(name or path.name)


class _Builder:
    def __init__(self, salt: bytes) -> None:
        self.salt = salt
        self.ids: list[str] = []
        self.files: list[str] = []
        self.texts: list[str] = []
        self.columns: dict[str, list[Any]] = {name: [] for name in _ARRAYS}
        self.columns["gram_starts"], self.columns["image_starts"] = [0], [0]
        self._numbers: dict[tuple[str, str | None], int] = {}

    def add(self, record: BenchmarkRecord) -> None:
        """One entry for each text of the record; they share its pictures."""
        numbers = [self._image(image) for image in record.images]
        for place, text in enumerate(record.texts):
            found = text_print(text, salt=self.salt)
            self.ids.append(record.id if place == 0 else f"{record.id}#{place + 1}")
            self.files.append(record.file)
            self.texts.append(text)
            columns = self.columns
            columns["digest"].append(found.digest)
            columns["sketch"].append(found.sketch)
            columns["grams"] += found.grams
            columns["gram_starts"].append(len(columns["grams"]))
            columns["concepts"].append(concept_hash(record.concepts, salt=self.salt))
            columns["images"] += numbers
            columns["image_starts"].append(len(columns["images"]))

    def _image(self, image: BenchmarkImage) -> int:
        found = image_print(image.open(), crops=True)
        key = (found.pixels, image.drawing)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            columns = self.columns
            columns["pixels"].append(keyed_hash(found.pixels, salt=self.salt, kind="pixels"))
            columns["drawing"].append(drawing_hash(image.drawing, salt=self.salt))
            columns["flat"].append(found.flat)
            columns["phash"].append(found.phash)
            columns["colour"].append(found.colour)
        return self._numbers[key]

    def finish(self, name: str) -> BenchmarkIndex:
        arrays: dict[str, NDArray[Any]] = {
            key: np.array(self.columns[key], dtype=dtype) for key, (dtype, _) in _ARRAYS.items()
        }
        arrays["sketch"] = arrays["sketch"].reshape(-1, SKETCH_WORDS)
        arrays["phash"] = arrays["phash"].reshape(-1, NUM_VIEWS)
        arrays["colour"] = arrays["colour"].reshape(-1, NUM_VIEWS, COLOUR_LEVELS)
        return BenchmarkIndex(
            name=name, salt=self.salt, ids=tuple(self.ids), files=tuple(self.files), texts=tuple(self.texts), **arrays
        )


def drawing_hash(drawing: str | None, *, salt: bytes) -> int:
    """Keyed hash of a picture's art and layout; NONE where they are not known."""
    return keyed_hash(drawing, salt=salt, kind="drawing") if drawing else NONE


def save_index(index: BenchmarkIndex, path: Path) -> None:
    """Write an index without its texts, whole or not at all. The same index always gives the same bytes."""
    # One metadata entry, because the order of several differs from run to run.
    about = {
        "format": FORMAT,
        "version": VERSION,
        "name": index.name,
        "salt": index.salt.hex(),
        "ids": index.ids,
        "files": index.files,
    }
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    content = save_tensors(arrays, metadata={"index": canonical_json(about)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def load_index(path: Path) -> BenchmarkIndex:
    """An index written by `save_index`. Raises UserError for a file that is none, or a damaged one."""
    try:
        with safe_open(path, framework="np") as file:
            about = parse_json((file.metadata() or {}).get("index", "{}"))
            arrays: dict[str, NDArray[Any]] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no benchmark index ({error}); build it again from the benchmark") from error
    about = about if isinstance(about, dict) else {}
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        found = f"format {about.get('format')!r}, version {about.get('version')!r}"
        raise UserError(f"{path} is no benchmark index of version {VERSION} ({found}); build it from the benchmark")
    index_fields = {key: about.get(key) for key in ("name", "salt", "ids", "files")}
    if not _is_whole(arrays, index_fields):
        raise UserError(f"{path} is a damaged benchmark index; build it again from the benchmark")
    return BenchmarkIndex(
        name=about["name"],
        salt=bytes.fromhex(about["salt"]),
        ids=tuple(about["ids"]),
        files=tuple(about["files"]),
        texts=None,
        **arrays,
    )


def _is_described(about: dict[str, Any]) -> bool:
    lists = [about["ids"], about["files"]]
    return (
        isinstance(about["name"], str)
        and isinstance(about["salt"], str)
        and re.fullmatch("(?:[0-9a-f]{2})+", about["salt"]) is not None
        and all(isinstance(items, list) and all(isinstance(item, str) for item in items) for items in lists)
    )


def _is_whole(arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> bool:
    if set(arrays) != set(_ARRAYS) or not all(about.values()) or not _is_described(about):
        return False
    if any(arrays[name].dtype != dtype or arrays[name].ndim != ndim for name, (dtype, ndim) in _ARRAYS.items()):
        return False
    num_entries, num_images = len(about["ids"]), len(arrays["pixels"])
    lengths = {"digest": num_entries, "sketch": num_entries, "concepts": num_entries}
    lengths |= dict.fromkeys(("gram_starts", "image_starts"), num_entries + 1)
    lengths |= dict.fromkeys(("drawing", "flat", "phash", "colour"), num_images)
    return (
        len(about["files"]) == num_entries
        and all(len(arrays[name]) == length for name, length in lengths.items())
        and arrays["sketch"].shape[1:] == (SKETCH_WORDS,)
        and arrays["phash"].shape[1:] == (NUM_VIEWS,)
        and arrays["colour"].shape[1:] == (NUM_VIEWS, COLOUR_LEVELS)
        and _are_starts(arrays["gram_starts"], len(arrays["grams"]))
        and _are_starts(arrays["image_starts"], len(arrays["images"]))
        and bool(((arrays["images"] >= 0) & (arrays["images"] < num_images)).all())
    )


def _are_starts(starts: NDArray[np.int64], total: int) -> bool:
    return starts[0] == 0 and starts[-1] == total and bool((np.diff(starts) >= 0).all())


def read_or_build(path: Path, **options: Any) -> BenchmarkIndex:
    """A saved index (by its suffix), or the index of the benchmark at `path`. `options` are those of `build_index`."""
    return load_index(path) if path.suffix == SUFFIX else build_index(path, **options)


def describe(indexes: Sequence[BenchmarkIndex]) -> str:
    """One line on what rows are compared with."""
    return "; ".join(f"{index.name}: {len(index)} prompts, {len(index.pixels)} pictures" for index in indexes)
