"""When a step cannot be trusted: stop, name step, rank and rows, and keep the batch for `mirage replay`.

run_dir/failures/step-000042-rank1/
  failure.json           what happened, the packs with their samples, which weights to replay it with
  recipe.json            the resolved recipe
  pack-1.safetensors     the tensors of a packed batch, as the loader made it
run_dir/failures/step-000042-model/   the weights before the failed step (checkpoint.save_failed_weights)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from mirage.config.loader import recipe_hash, resolved_json
from mirage.data.collate import PackedBatch
from mirage.errors import UserError
from mirage.files import sync
from mirage.models.adapter import IGNORE_INDEX
from mirage.strict_json import read_json_object
from mirage.training import checkpoint as checkpoints

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer

FAILURES = "failures"
FAILURE_FILE, RECIPE_FILE = "failure.json", "recipe.json"
Kind = Literal["loss", "gradient norm", "out of memory"]
# What torch says when memory runs out: CUDA's allocator, the CPU's, cuBLAS. The first has a class of its own as well.
_MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "ALLOC_FAILED")
# What a rank hears when another has gone.
_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "ProcessGroup", "gloo")
_NAMED_ROWS = 32


class TrainingStopped(UserError):
    """Training cannot go on: the loss or a gradient is not a number, or memory ran out. Names step, rank and rows."""


@dataclass(frozen=True)
class PackedSample:
    """One sample of a packed batch and its sizes in tokens; `source` and `location` say where the row was read."""

    row_id: str
    source: str
    location: str
    start: int
    num_tokens: int
    num_image_tokens: int
    num_supervised_tokens: int


def spans(batch: PackedBatch) -> list[tuple[int, int]]:
    """[start, end) of each sample of a packed row."""
    borders = batch.inputs["cu_seq_lens_q"].tolist()
    return list(itertools.pairwise(borders))


def packed_samples(
    batch: PackedBatch, *, image_token_id: int, places: dict[str, tuple[str, str]]
) -> list[PackedSample]:
    """The samples of a batch; `places` gives (source, location) by row id."""
    ids = batch.inputs["input_ids"].flatten()
    found = []
    for row_id, (start, end) in zip(batch.row_ids, spans(batch)):
        source, location = places.get(row_id, ("", ""))
        num_image_tokens = int((ids[start:end] == image_token_id).sum())
        num_supervised_tokens = int((batch.labels[start:end] != IGNORE_INDEX).sum())
        found.append(
            PackedSample(row_id, source, location, start, end - start, num_image_tokens, num_supervised_tokens)
        )
    return found


# Not a number


def stop_unless_finite(trainer: Trainer, value: float, kind: Kind, batches: Sequence[PackedBatch]) -> None:
    """Raise `TrainingStopped` on every rank, with one text, when `value` (the same on all ranks) is not finite.

    For the loss, the ranks whose own packs gave it are named and save these packs; a gradient is a sum over all ranks,
    so all of them save theirs. A collective. DeepSpeed takes no step on such a gradient: the weights are those before.
    """
    if math.isfinite(value):
        return
    # A checkpoint under way is of a sound step.
    trainer.saver.finish()
    packs = list(range(len(batches)))
    if kind == "loss":
        packs = [number for number in packs if not math.isfinite(trainer.micro_losses[number])]
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, [_rows_text(batches[number]) for number in packs])
    problem = ""
    if packs:
        problem = _try_saving(trainer, kind, batches, packs=packs, value=value)
    if trainer.recipe.checkpoint.save_failed_weights:
        _save_weights(trainer)
    trainer.barrier()
    guilty = [rank for rank, texts in enumerate(everyone) if texts]
    named = [f"rank {rank}: {'; '.join(everyone[rank])}" for rank in guilty[:4]]
    if len(guilty) > 4:
        named.append(f"and {len(guilty) - 4} ranks more")
    folder = failure_folder(trainer.run_dir, step=trainer.step + 1, rank=guilty[0] if guilty else trainer.rank)
    remedy = "lower train.lr or look at these rows"
    raise TrainingStopped(
        f"the {kind} of step {trainer.step + 1} is {value}; {', '.join(named)}. "
        f"{_last_checkpoint_text(trainer)}; {remedy}: mirage replay {folder}{problem}"
    )


# Out of memory


@contextlib.contextmanager
def stop_on_failure(trainer: Trainer, batches: Sequence[PackedBatch]) -> Iterator[None]:
    """Around a step: turns memory that ran out into `TrainingStopped` with the pack named and kept.

    Only this rank knows; the others wait for it in a collective until the launcher ends them, or hear that it has gone
    and then point to its message.
    """
    started = time.time()
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise _out_of_memory(trainer, batches, error) from error
        stop_without_kernel(error)
        peer = _failed_peer(trainer, since=started) if any(word in str(error) for word in _PEER_WORDS) else None
        if peer is None:
            raise
        raise TrainingStopped(f"rank {peer[0]} stopped at step {trainer.step + 1}: {peer[1]}") from error


def stop_without_kernel(error: BaseException) -> None:
    """Raise `UserError` where torch says that an operation has no deterministic kernel (`train.deterministic`)."""
    found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    if found:
        raise UserError(
            f"train.deterministic=true: torch has no deterministic kernel for {found[1]} on this device; set "
            "train.deterministic=false, or change what uses it (model.attention, train.loss_kernel)"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)


def _out_of_memory(trainer: Trainer, batches: Sequence[PackedBatch], error: BaseException) -> TrainingStopped:
    number = len(trainer.micro_losses)
    in_pack = number < len(batches)
    packs = [number] if in_pack else list(range(len(batches)))
    where = f"in {_pack_text(trainer, batches, number)}" if in_pack else f"after its {len(batches)} packs"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    # Other ranks cannot be asked: the first one marks a checkpoint READY by itself.
    trainer.saver.wait(until_ready=True)
    problem = _try_saving(trainer, "out of memory", batches, packs=packs, value=None, message=reason)
    folder = failure_folder(trainer.run_dir, step=trainer.step + 1, rank=trainer.rank)
    stopped = TrainingStopped(
        f"rank {trainer.rank} ran out of memory at step {trainer.step + 1} {where} ({reason}). "
        f"{_last_checkpoint_text(trainer)}; lower data.pack_tokens (now {trainer.recipe.data.pack_tokens}), and see "
        f"what the pack needs: mirage replay {folder}{problem}"
    )
    stopped.one_rank_only = True
    return stopped


def _failed_peer(trainer: Trainer, *, since: float) -> tuple[int, str] | None:
    """(rank, message) of another rank that saved its failure in this step; its file is whole before it ends."""
    for file in sorted((trainer.run_dir / FAILURES).glob(f"step-{trainer.step + 1:06d}-rank*/{FAILURE_FILE}")):
        record = read_failure(file.parent)
        # A minute of grace for the clocks of two machines.
        if record["rank"] != trainer.rank and file.stat().st_mtime > since - 60:
            return record["rank"], f"{record['kind']}; {file.parent}"
    return None


# The folder


def failure_folder(run_dir: Path, *, step: int, rank: int) -> Path:
    """Where `rank` keeps the batch of failed optimiser step `step` (counted from 1)."""
    return run_dir / FAILURES / f"step-{step:06d}-rank{rank}"


def failed_weights_folder(run_dir: Path, *, step: int) -> Path:
    """Where the weights before failed step `step` are, when the recipe asks for them."""
    return run_dir / FAILURES / f"step-{step:06d}-model"


def _try_saving(
    trainer: Trainer,
    kind: Kind,
    batches: Sequence[PackedBatch],
    *,
    packs: Sequence[int],
    value: float | None,
    message: str = "",
) -> str:
    """Save; the failure to save must not hide the failure itself. Returns what to add to the message."""
    try:
        record = describe_failure(trainer, kind, batches, packs=packs, value=value, message=message)
        folder = failure_folder(trainer.run_dir, step=trainer.step + 1, rank=trainer.rank)
        write_failure(folder, record, batches, packs=packs, recipe_json=resolved_json(trainer.recipe))
    except (OSError, MemoryError, RuntimeError) as error:
        return f" (rank {trainer.rank} could not save it: {str(error).splitlines()[0][:200]})"
    return ""


def describe_failure(
    trainer: Trainer,
    kind: Kind,
    batches: Sequence[PackedBatch],
    *,
    packs: Sequence[int],
    value: float | None,
    message: str,
) -> dict[str, Any]:
    """What `failure.json` holds. Numbers JSON has no word for are written as text."""
    wanted = {row_id for number in packs for row_id in batches[number].row_ids}
    rows = trainer.rows
    found = ((rows.row_id(number), number) for number in range(len(rows)))
    places = {row: (rows.part(number)[1], rows.location(number)) for row, number in found if row in wanted}
    last = checkpoints.last_resumable(trainer.run_dir)
    losses = {number: str(loss) for number, loss in enumerate(trainer.micro_losses)}
    return {
        "kind": kind,
        "value": None if value is None else str(value),
        "message": message,
        "step": trainer.step + 1,
        "rank": trainer.rank,
        "world_size": trainer.world_size,
        "num_packs": len(batches),
        "packs": [
            {
                "number": number + 1,
                "file": f"pack-{number + 1}.safetensors",
                "loss_sum": losses.get(number),
                "samples": [
                    vars(sample)
                    for sample in packed_samples(
                        batches[number], image_token_id=trainer.adapter.image_token_id, places=places
                    )
                ],
            }
            for number in packs
        ],
        "checkpoint": None if last is None else last.name,
        "checkpoint_step": 0 if last is None else checkpoints.checkpoint_step(last),
        "base": str(trainer.base),
        "memory_bytes": memory_bytes(trainer.device),
        "recipe_hash": recipe_hash(trainer.recipe),
    }


def write_failure(
    folder: Path, record: dict[str, Any], batches: Sequence[PackedBatch], *, packs: Sequence[int], recipe_json: str
) -> None:
    """Write the folder aside and rename it: it is there whole or not at all. An earlier one is replaced."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for number in packs:
        save_batch(batches[number], aside / f"pack-{number + 1}.safetensors")
    (aside / FAILURE_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (aside / RECIPE_FILE).write_text(recipe_json + "\n", encoding="utf-8")
    for path in aside.iterdir():
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.replace(folder)
    sync(folder.parent)


class _Sample(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    row_id: str
    location: str
    num_tokens: int
    num_image_tokens: int
    num_supervised_tokens: int


class _Pack(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    number: int
    file: str = Field(pattern=r"^pack-[0-9]+\.safetensors$")
    samples: list[_Sample]


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    kind: str
    message: str
    step: int = Field(ge=1)
    rank: int = Field(ge=0)
    packs: list[_Pack]
    checkpoint: str | None
    checkpoint_step: int = Field(ge=0)
    base: str


def read_failure(folder: Path) -> dict[str, Any]:
    """What `write_failure` wrote down. Raises `UserError` where it is damaged."""
    file = folder / FAILURE_FILE
    record = read_json_object(file, remedy="the failure's folder is damaged")
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file}: {where}: {first['msg']}; the failure's folder is damaged") from None
    return record


def save_batch(batch: PackedBatch, path: Path) -> None:
    """A packed batch as safetensors: tensors by name, all else as JSON in the header."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        parts = {f"{field.name}/{key}": item for key, item in value.items()} if isinstance(value, dict) else None
        for name, item in (parts or {field.name: value}).items():
            if isinstance(item, torch.Tensor):
                # Cloned: cu_seq_lens_q and cu_seq_lens_k are one tensor, which the format does not take twice.
                tensors[name] = item.detach().cpu().contiguous().clone()
            else:
                values[name] = item
    save_file(tensors, path, metadata={"values": json.dumps(values)})


def load_batch(path: Path) -> PackedBatch:
    """A batch that `save_batch` wrote. Raises `UserError` for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            items: dict[str, Any] = json.loads((file.metadata() or {}).get("values", "{}"))
            items |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings: dict[str, Any] = {}
        for name, item in items.items():
            field, _, key = name.partition("/")
            if key:
                settings.setdefault(field, {})[key] = item
            else:
                settings[field] = tuple(item) if isinstance(item, list) else item
        return PackedBatch(**settings)
    except Exception as error:  # safetensors raises kinds of its own, a wrong header gives a TypeError
        raise UserError(f"{path} holds no packed batch of this version ({error}); let the run fail again") from error


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Memory of this process and of its device now."""
    found = {"process_resident": psutil.Process().memory_info().rss, "host_free": psutil.virtual_memory().available}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "device_allocated": torch.cuda.memory_allocated(device),
            "device_peak": torch.cuda.max_memory_allocated(device),
            "device_reserved": torch.cuda.memory_reserved(device),
            "device_free": free,
            "device_total": total,
        }
    return found


def _save_weights(trainer: Trainer) -> None:
    """The weights before the failed step, whole or not at all. A collective."""
    final = failed_weights_folder(trainer.run_dir, step=trainer.step + 1)
    aside = final.with_name(f".{final.name}.partial")
    if trainer.is_main:
        shutil.rmtree(aside, ignore_errors=True)
    trainer.collect_weights()(aside)
    if trainer.is_main:
        for path in aside.iterdir():
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.replace(final)


# Words


def _rows_text(batch: PackedBatch) -> str:
    rows = [row for row in batch.row_ids if row != "dummy"]
    more = f" and {len(rows) - _NAMED_ROWS} more" if len(rows) > _NAMED_ROWS else ""
    return f"rows {', '.join(rows[:_NAMED_ROWS])}{more}" if rows else "a pack without rows"


def _pack_text(trainer: Trainer, batches: Sequence[PackedBatch], number: int) -> str:
    batch = batches[number]
    num_image_tokens = int((batch.inputs["input_ids"] == trainer.adapter.image_token_id).sum())
    return (
        f"pack {number + 1} of {len(batches)} ({len(batch.labels):,} tokens, {num_image_tokens:,} of pictures), "
        f"{_rows_text(batch)}"
    )


def _last_checkpoint_text(trainer: Trainer) -> str:
    last = checkpoints.last_resumable(trainer.run_dir)
    return f"{last.name} is whole" if last is not None else "There is no checkpoint yet"
