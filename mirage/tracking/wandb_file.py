"""What wandb's own files of a run hold already, so that a restart sends what a kill took from them."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A LevelDB log (leveldb/doc/log_format.md) with wandb's own header: ":W&B", a magic number and version 0.
_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_BLOCK_BYTES = 32768
_RECORD_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class Sent:
    """What is in the files of one run id: numbers by axis and step, tables, artifacts, alerts, the last order."""

    points: set[bytes] = field(default_factory=set)
    tables: set[tuple[str, int]] = field(default_factory=set)
    artifacts: set[tuple[str, str, str]] = field(default_factory=set)
    alerts: set[tuple[str, str]] = field(default_factory=set)
    last_order: int = -1
    is_gone: bool = False
    """The run's files were removed, after `wandb sync` as a rule: nothing is taken for missing."""
    empty: list[Path] = field(default_factory=list)
    """Folders whose file a kill left without the record that names the run: `wandb sync` refuses them."""
    cut_short: list[Path] = field(default_factory=list)
    """Files of online runs that end without wandb's closing record: what they hold may not have been uploaded."""

    def holds(self, axis: str, step: int, values: Mapping[str, Any]) -> bool:
        """Whether these very numbers are there, under this step of the axis."""
        return self.is_gone or _point(axis, step, values) in self.points

    def holds_table(self, name: str, step: int) -> bool:
        """Whether the table is there, under this step of the eval axis."""
        return self.is_gone or (name, step) in self.tables


def read_sent(run_dir: Path, identity: str) -> Sent:
    """Read every file of the run `identity` in the run folder; damaged ends are passed over."""
    sent = Sent()
    found = (run_dir / "wandb").glob(f"*run-*-{identity}/run-{identity}.wandb")
    for path in sorted(path for path in found if path.parent.name.startswith(("run-", "offline-run-"))):
        kinds = set()
        for record in read_records(path):
            kinds.add(record.WhichOneof("record_type"))
            _note(sent, record)
        is_online, is_synced = path.parent.name.startswith("run-"), path.with_name(f"{path.name}.synced").exists()
        if "run" not in kinds:
            sent.empty.append(path.parent)
        elif "exit" not in kinds and is_online and not is_synced:
            sent.cut_short.append(path.parent)
    return sent


def read_records(path: Path) -> Iterator[Any]:
    """The records (`wandb_internal_pb2.Record`) of a .wandb file up to its end or to where a kill cut it."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    make: Any = vars(wandb_internal_pb2)["Record"]
    for content in _messages(path.read_bytes()):
        record = make()
        try:
            record.ParseFromString(content)
        except DecodeError:
            return
        yield record


def _messages(content: bytes) -> Iterator[bytes]:
    if not content.startswith(_HEADER):
        return
    position = len(_HEADER)
    pieces: list[bytes] = []
    while position + _RECORD_HEADER.size <= len(content):
        room = _BLOCK_BYTES - position % _BLOCK_BYTES
        if room < _RECORD_HEADER.size:
            position += room
            continue
        checksum, size, kind = _RECORD_HEADER.unpack_from(content, position)
        data = content[position + _RECORD_HEADER.size : position + _RECORD_HEADER.size + size]
        position += _RECORD_HEADER.size + size
        if len(data) < size or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            return
        pieces = [data] if kind in (_FULL, _FIRST) else [*pieces, data]
        if kind in (_FULL, _LAST):
            yield b"".join(pieces)


def history_row(record: Any) -> dict[str, Any]:
    """The names and values of a history record."""
    row = {}
    for item in record.history.item:
        row[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return row


def _note(sent: Sent, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "history":
        _note_row(sent, history_row(record))
    elif kind == "artifact":
        artifact = record.artifact
        sent.artifacts.add((artifact.type, artifact.name, artifact.digest))
    elif kind == "alert":
        sent.alerts.add((record.alert.title, record.alert.text))


def _note_row(sent: Sent, row: dict[str, Any]) -> None:
    sent.last_order = max(sent.last_order, int(row.pop("_step", -1)))
    row = {name: value for name, value in row.items() if not name.startswith("_")}
    # Media come as one item a field: samples/mis_hard._type, samples/mis_hard.path, ...
    tables = [name.removesuffix("._type") for name in row if name.endswith("._type")]
    steps = {name.removesuffix("/step"): int(row[name]) for name in row if name in ("train/step", "eval/step")}
    for axis, step in steps.items():
        sent.tables |= {(name, step) for name in tables}
        if not tables:
            numbers = {name: value for name, value in row.items() if name != f"{axis}/step"}
            sent.points.add(_point(axis, step, numbers))


def _point(axis: str, step: int, values: Mapping[str, Any]) -> bytes:
    """A short name of these numbers at this step; NaN is equal to NaN here."""
    content = sorted((name, repr(_number(value))) for name, value in values.items())
    return hashlib.blake2b(repr((axis, step, content)).encode(), digest_size=8).digest()


def _number(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return float(value)
    # wandb writes a number that JSON cannot hold as a text in some places and as a bare word in others.
    text = str(value).lower().removeprefix("+")
    return float(text) if text in ("nan", "inf", "-inf", "infinity", "-infinity") else value
