"""`mirage replay`: a failed step's batch once more: which sample, module or weight is no number, what takes memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mirage.config.loader import read_resolved
from mirage.data.collate import PackedBatch
from mirage.errors import UserError
from mirage.models.adapter import IGNORE_INDEX, ModelAdapter
from mirage.models.registry import load_adapter
from mirage.training import checkpoint as checkpoints
from mirage.training.failures import (
    FAILURE_FILE,
    FAILURES,
    RECIPE_FILE,
    failed_weights_folder,
    is_out_of_memory,
    load_batch,
    read_failure,
    spans,
)
from mirage.training.loss import PackedLossModel
from mirage.training.weights import DTYPES, find_base, load_for_training


@dataclass
class ReplayedSample:
    """One sample of the pack. `loss` is its mean token loss; `gradient_norm` only where the pack's is not finite."""

    row_id: str
    location: str
    num_tokens: int
    num_image_tokens: int
    num_supervised_tokens: int
    loss: float = math.nan
    finite_pictures: bool = True
    gradient_norm: float | None = None
    kept_bytes: int = 0


@dataclass
class ReplayedPack:
    """One packed batch after forward and backward.

    `first_module` is the first whose output is not finite, `cause` says what it was given; `first_gradient` is the
    first weight, in the order of the backward pass, whose gradient is not finite. `kept_bytes` are the activations kept
    for the backward pass.
    """

    number: int
    samples: list[ReplayedSample]
    loss: float = math.nan
    gradient_norm: float = math.nan
    first_module: str | None = None
    cause: str = ""
    first_gradient: str | None = None
    kept_bytes: int = 0
    peak_bytes: int | None = None
    out_of_memory: str | None = None


@dataclass
class Replay:
    """A failure and what became of it here."""

    record: dict[str, Any]
    weights: str
    bad_weights: list[str]
    packs: list[ReplayedPack] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """In words: what is wrong, or that it did not happen again."""
        for pack in self.packs:
            if pack.out_of_memory:
                return f"memory runs out here too, in pack {pack.number}: {pack.out_of_memory}"
            if pack.first_module:
                rows = ", ".join(sample.row_id for sample in pack.samples if not math.isfinite(sample.loss)) or "none"
                return (
                    f"pack {pack.number}: not a number first in the output of {pack.first_module} ({pack.cause}); "
                    f"samples whose loss is no number: {rows}"
                )
            if pack.first_gradient:
                bad = [s.row_id for s in pack.samples if s.gradient_norm is not None and not _finite(s.gradient_norm)]
                return (
                    f"pack {pack.number}: the loss is {pack.loss:.4f} and the gradient not a number, first at "
                    f"{pack.first_gradient}; samples: {', '.join(bad) or 'only all together'}"
                )
        if self.bad_weights:
            return f"weights that are not finite and were not met: {', '.join(self.bad_weights[:5])}"
        if self.record["kind"] == "out of memory":
            return "the packs fit into memory here; the table says what they keep for the backward pass"
        return f"it does not happen again with {self.weights}; see docs/training.md on keeping the weights of a failure"


def find_failure(path: Path) -> Path:
    """The failure's folder: `path`, or the only one of a run. Raises `UserError` that lists several."""
    if (path / FAILURE_FILE).is_file():
        return path
    root = path / FAILURES if (path / FAILURES).is_dir() else path
    found = sorted(file.parent for file in root.glob(f"step-*-rank*/{FAILURE_FILE}"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{path} holds no failure ({FAILURE_FILE}); give RUN_DIR/{FAILURES}/step-NNNNNN-rankR")
    raise UserError(f"{path} holds {len(found)} failures; choose one: {', '.join(str(folder) for folder in found)}")


def replay(path: Path, *, weights: Path | None = None, precision: str | None = None) -> Replay:
    """Forward and backward of the failed packs with the weights before the step, or the nearest there are.

    `weights` (a checkpoint or its `model` folder) and `precision` replace the run's. Raises `UserError` for a folder
    that is no failure, or weights that are gone.
    """
    folder = find_failure(path)
    record, recipe = read_failure(folder), read_resolved(folder / RECIPE_FILE)
    # Recomputed layers run twice, the second time inside the backward pass: what comes first would be hard to say.
    is_memory = record["kind"] == "out of memory"
    changes: dict[str, Any] = {} if is_memory else {"gradient_checkpointing": False}
    if precision is not None:
        changes["precision"] = precision
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
    base = Path(record["base"]) if Path(record["base"]).is_dir() else find_base(recipe)
    adapter = load_adapter(base, preprocessing=recipe.preprocessing, trust_remote_code=recipe.model.trust_remote_code)
    trained, words = _weights(folder, record, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_for_training(recipe, adapter, base=base, trained=trained)
    model = PackedLossModel(model.to(device)).train()
    bad = [name for name, tensor in model.hf.named_parameters() if not _finite(tensor)]
    result = Replay(record, words, bad)
    for pack in record["packs"]:
        batch = load_batch(folder / pack["file"]).to(device, DTYPES[recipe.train.precision])
        samples = [ReplayedSample(*(sample[key] for key in _SAMPLE_KEYS)) for sample in pack["samples"]]
        replayed = ReplayedPack(pack["number"], samples)
        result.packs.append(replayed)
        try:
            _run_pack(model, batch, replayed, adapter)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            replayed.out_of_memory = str(error).strip().splitlines()[0][:300]
            break
    return result


_SAMPLE_KEYS = ("row_id", "location", "num_tokens", "num_image_tokens", "num_supervised_tokens")


def _weights(folder: Path, record: dict[str, Any], given: Path | None) -> tuple[Path | None, str]:
    """(model folder or None for the base, what it is in words)."""
    if given is not None:
        inner = given / "model"
        return (inner if inner.is_dir() else given), str(given)
    run_dir, step = folder.parent.parent, record["step"]
    failed = failed_weights_folder(run_dir, step=step)
    if failed.is_dir():
        return failed, f"the weights before step {step}"
    if record["checkpoint"] is None:
        return None, f"the base model, {step - 1} steps before the failed one"
    checkpoint = run_dir / Path(record["checkpoint"]).name
    if checkpoints.read_ready(checkpoint) is None:
        raise UserError(f"{checkpoint} is gone; give other weights: mirage replay {folder} weights=CHECKPOINT")
    behind = step - 1 - record["checkpoint_step"]
    return checkpoint / "model", f"{checkpoint.name}, {behind} steps before the failed one"


# One pack


def _run_pack(model: PackedLossModel, batch: PackedBatch, pack: ReplayedPack, adapter: ModelAdapter) -> None:
    """Fill `pack` from one forward and backward pass, and one more a sample where the gradient is not finite."""
    if batch.labels.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _find_bad_pictures(batch, pack, adapter)
    with _first_bad_output(model.hf, batch, pack), _kept_bytes(model, pack):
        loss = model(batch)[0]
    pack.loss = loss.item()
    with torch.no_grad():
        _sample_losses(model, batch, pack)
    with _first_bad_gradient(model.hf, pack):
        loss.backward()
    pack.gradient_norm = _gradient_norm(model)
    if batch.labels.device.type == "cuda":
        pack.peak_bytes = torch.cuda.max_memory_allocated()
    for sample in pack.samples:
        sample.kept_bytes = round(pack.kept_bytes * sample.num_tokens / len(batch.labels))
    if math.isfinite(pack.loss) and not math.isfinite(pack.gradient_norm):
        for sample, (start, end) in zip(pack.samples, spans(batch)):
            labels = torch.full_like(batch.labels, IGNORE_INDEX)
            labels[start:end] = batch.labels[start:end]
            model.zero_grad(set_to_none=True)
            model(replace(batch, labels=labels))[0].backward()
            sample.gradient_norm = _gradient_norm(model)
    model.zero_grad(set_to_none=True)


def _finite(value: torch.Tensor | float) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())
    return math.isfinite(value)


def _gradient_norm(model: torch.nn.Module) -> float:
    squares = [float((p.grad.float() ** 2).sum()) for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.nan


def _find_bad_pictures(batch: PackedBatch, pack: ReplayedPack, adapter: ModelAdapter) -> None:
    """Mark the samples whose picture tensors are not finite.

    Rows of a picture tensor (tiles, patches) and placeholders keep one order and one ratio in a batch.
    """
    places = (batch.inputs["input_ids"][0] == adapter.image_token_id).nonzero().flatten()
    for value in batch.inputs.values():
        if not isinstance(value, torch.Tensor) or _finite(value):
            continue
        rows = (~torch.isfinite(value).flatten(1).all(dim=1)).nonzero().flatten()
        tokens = places[(rows * len(places) // len(value)).clamp(max=len(places) - 1)].tolist()
        for sample, (start, end) in zip(pack.samples, spans(batch)):
            if any(start <= token < end for token in tokens):
                sample.finite_pictures = False


def _sample_losses(model: PackedLossModel, batch: PackedBatch, pack: ReplayedPack) -> None:
    hidden = model.hf.model(**batch.inputs, use_cache=False).last_hidden_state[0]
    for sample, (start, end) in zip(pack.samples, spans(batch)):
        labels = batch.labels[start + 1 : end]
        learnt = labels != IGNORE_INDEX
        if not learnt.any():
            sample.loss = 0.0
            continue
        logits = model.hf.lm_head(hidden[start : end - 1][learnt]).float()
        sample.loss = float(F.cross_entropy(logits, labels[learnt]))


@contextlib.contextmanager
def _first_bad_output(model: torch.nn.Module, batch: PackedBatch, pack: ReplayedPack) -> Iterator[None]:
    """Name the first module to finish with an output that is not finite: inner modules finish before outer ones."""

    def look(name: str, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if pack.first_module is not None or all(map(_finite, _tensors(output))):
            return
        given = all(map(_finite, _tensors((args, kwargs))))
        own = [key for key, tensor in module.named_parameters(recurse=False) if not _finite(tensor)]
        pack.first_module = name or type(module).__name__
        pack.cause = f"its own {' and '.join(own)} not finite" if own else _input_words(given)
        rows = _rows_of(output, batch, pack)
        if rows:
            pack.cause += f"; in row {', '.join(rows)}"

    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output, name=name: look(name, module, args, kwargs, output), with_kwargs=True
        )
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_words(finite: bool) -> str:
    return (
        "inputs and weights finite: the numbers grow too large in it" if finite else "given inputs that are not finite"
    )


def _rows_of(output: Any, batch: PackedBatch, pack: ReplayedPack) -> list[str]:
    """Rows whose positions in a [1, L, ...] output are not finite; none for other shapes (the vision tower's)."""
    for tensor in _tensors(output):
        if tensor.dim() < 2 or tuple(tensor.shape[:2]) != (1, len(batch.labels)) or _finite(tensor):
            continue
        bad = ~torch.isfinite(tensor[0]).flatten(1).all(dim=1)
        return [s.row_id for s, (start, end) in zip(pack.samples, spans(batch)) if bad[start:end].any()]
    return []


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@contextlib.contextmanager
def _first_bad_gradient(model: torch.nn.Module, pack: ReplayedPack) -> Iterator[None]:
    def look(name: str, parameter: torch.Tensor) -> None:
        if pack.first_gradient is None and parameter.grad is not None and not _finite(parameter.grad):
            pack.first_gradient = name

    handles = [
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: look(name, parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _kept_bytes(model: torch.nn.Module, pack: ReplayedPack) -> Iterator[None]:
    """Count what autograd keeps for the backward pass, each memory once, weights not."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
    finally:
        pack.kept_bytes = sum(seen.values())
