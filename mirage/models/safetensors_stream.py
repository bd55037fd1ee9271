"""Safetensors folders read one tensor at a time and written one tensor at a time, so that memory stays at one tensor.

The file format is the one of github.com/huggingface/safetensors: eight bytes of header length, a JSON header with each
tensor's type, shape and byte range, then the bytes. The library's own writer takes a whole file's tensors at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mirage.errors import UserError
from mirage.safe_paths import is_file
from mirage.strict_json import read_json_object

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk: its type in safetensors' spelling and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPES[self.dtype].itemsize


class TensorFolder:
    """The tensors of a model folder: one safetensors file, or shards with an index.

    Raises `UserError` for pickles, missing or damaged shards, and an index that does not match its shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_name: str | None = None
        self._open_file: Any = None
        self.files = _weight_files(folder)
        self.file_of: dict[str, str] = {}
        self.info: dict[str, TensorInfo] = {}
        for name in self.files:
            self._scan(name)
        self._compare_with_index()

    def _scan(self, name: str) -> None:
        """Read one file's header into `info`."""
        file = self._handle(name)
        for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            if key in self.file_of:
                raise UserError(f"{self.folder}: tensor {key!r} is in {self.file_of[key]} and in {name}; remove one")
            part = file.get_slice(key)
            dtype = part.get_dtype()
            if dtype not in DTYPES:
                raise UserError(f"{self.folder / name}: tensor {key!r} has type {dtype}, which no model weight has")
            self.file_of[key], self.info[key] = name, TensorInfo(dtype, tuple(part.get_shape()))

    def _compare_with_index(self) -> None:
        index = self.folder / INDEX_FILE
        if not index.exists():
            return
        for key, name in read_json(index)["weight_map"].items():
            if self.file_of.get(key) != name:
                raise UserError(
                    f"{index}: lists tensor {key!r:.200} in {name!r:.200}, which does not hold it; fetch both again"
                )

    def _handle(self, name: str) -> Any:
        # One file is open at a time: mapped pages of closed files do not count as this process's memory.
        if self._open_name != name:
            path = self.folder / name
            try:
                self._open_file = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: is not a whole safetensors file ({error}); fetch it again") from error
            self._open_name = name
        return self._open_file

    def read(self, key: str) -> torch.Tensor:
        """The tensor `key`, as stored."""
        return self._handle(self.file_of[key]).get_tensor(key)

    def close(self) -> None:
        """Let go of the open file."""
        self._open_name = self._open_file = None


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: what it is, and the function that makes it when its turn comes."""

    name: str
    info: TensorInfo
    make: Callable[[], torch.Tensor]


def write_tensors(
    folder: Path,
    tensors: Sequence[OutputTensor],
    *,
    max_shard_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `tensors` in order as `model.safetensors`, or as shards with an index when they exceed `max_shard_bytes`.

    Each tensor is made, written and forgotten; every file is synced. `progress` gets the bytes of each tensor.
    """
    shards = _split(tensors, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, progress)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.info.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_synced(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _split(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.info.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.info.num_bytes
    return shards


def _write_shard(path: Path, tensors: Sequence[OutputTensor], progress: Callable[[int], None] | None) -> None:
    # Wider types first: a reader that maps the file needs each tensor aligned to its own type.
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor.info.dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.info.num_bytes
        header[tensor.name] = {
            "dtype": tensor.info.dtype,
            "shape": list(tensor.info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            value = tensor.make()
            if tuple(value.shape) != tensor.info.shape or value.dtype != DTYPES[tensor.info.dtype]:
                raise RuntimeError(f"{tensor.name}: made {tuple(value.shape)} {value.dtype}, planned {tensor.info}")
            file.write(as_bytes(value).numpy().data)
            if progress is not None:
                progress(tensor.info.num_bytes)
        file.flush()
        os.fsync(file.fileno())


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, uint8 [num_bytes]; compares NaN and signed zeros as they lie in memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _weight_files(folder: Path) -> list[str]:
    """Names of the folder's safetensors files, sorted; refuses everything else."""
    index = folder / INDEX_FILE
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise UserError(f"{index}: has no weight_map; fetch the file again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index}: names {name!r:.200}; shards must be .safetensors files beside the index")
            if not is_file(folder / name):
                raise UserError(f"{folder}: shard {name:.200} is missing, though {INDEX_FILE} lists it; fetch it again")
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(names) > 1:
        raise UserError(f"{folder}: holds {len(names)} safetensors files and no {INDEX_FILE}; fetch the index as well")
    if not names:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise UserError(
                f"{folder}: holds a pickle checkpoint ({pickles[0]}), which can run code when it is opened; "
                "save the model as safetensors first"
            )
        raise UserError(f"{folder}: holds no .safetensors weights")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` when it is missing, damaged or no object."""
    return read_json_object(path, remedy="fetch it again", any_number=True)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's own entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
