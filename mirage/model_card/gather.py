"""Collects a card's facts from what a run left: recipe, summary, metrics, checkpoint; nothing is trained or loaded."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from mirage.config.schema import Recipe, SourceConfig
from mirage.errors import UserError
from mirage.files import read_object
from mirage.model_card.datasets import dataset_facts, dataset_name, front_matter, locate, source_facts
from mirage.model_card.facts import BaseFacts, CardFacts, DatasetFacts, SourceFacts, TrainingFacts
from mirage.model_card.text import name_of_path, without_paths
from mirage.models.shipped import BASE_FILE, PREFIX, find_shipped
from mirage.tracking.code_version import describe_code
from mirage.tracking.environment import hardware
from mirage.tracking.mirror import MIRROR_NAME, read_metrics
from mirage.tracking.redact import redact
from mirage.training.checkpoint import NAME, READY

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer

# Licences that the models of the paper are published under, by their pages on the hub.
_PUBLISHED_LICENCES = {"OpenGVLab/InternVL2_5-8B": "mit", "Qwen/Qwen2-VL-7B-Instruct": "apache-2.0"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
# Sections of the recipe that decide the weights.
_DECISIVE = ("model", "preprocessing", "data", "train")


def gather_facts(source: Path, *, fingerprint: str) -> CardFacts:
    """The facts of a checkpoint's `model` folder, or of any weights folder, of which less is known."""
    checkpoint = source.parent if NAME.match(source.parent.name) else None
    run_dir = checkpoint.parent if checkpoint is not None else None
    raw = read_object((checkpoint or source) / "recipe.json")
    summary = read_object(run_dir / "summary.json") if run_dir is not None else {}
    model = raw.get("model") or {}
    datasets, sources = _data(raw, summary, run_dir)
    adapter = read_object(source / "adapter_config.json")
    config = read_object(source / "config.json") or adapter
    facts = CardFacts(
        name=str(raw.get("name") or name_of_path((run_dir or source).absolute())),
        family=str(model.get("family") or config.get("model_type") or "unknown"),
        checkpoint=checkpoint.name if checkpoint is not None else name_of_path(source.absolute()),
        fingerprint=fingerprint,
        num_parameters=count_parameters(source),
        trained=tuple(model.get("train") or ()),
        lora=model.get("lora") or _lora(adapter),
        quantized=model.get("quantize", "none") != "none",
        recipe=_decisive_settings(raw),
        recipe_hash=_hash(raw),
        seed=(raw.get("train") or {}).get("seed"),
        base=_base(model, config, source),
        datasets=datasets,
        sources=sources,
        training=_training(checkpoint, run_dir, summary),
    )
    return CardFacts.model_validate(redact(facts.model_dump()))


def facts_of_run(trainer: Trainer, checkpoint: Path) -> CardFacts:
    """The facts at the end of a run, with what only the running program knows: hardware, code, counts."""
    ready = read_object(checkpoint / READY)
    facts = gather_facts(checkpoint / "model", fingerprint=str(ready.get("fingerprint")))
    base = facts.base if facts.base.licence else facts.base.model_copy(update={"licence": _licence_of(trainer.base)})
    training = facts.training.model_copy(
        update={
            "num_processes": trainer.world_size,
            "hardware": hardware(trainer.device, num_processes=trainer.world_size),
            "code": _code(),
        }
    )
    counts = {"num_trained_parameters": trainer.num_trained_parameters}
    return facts.model_copy(update={"base": base, "training": training, **counts})


def count_parameters(folder: Path) -> int | None:
    """Numbers in a folder's safetensors, by their headers; None without any."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
    return total or None


def _lora(adapter: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of an adapter without a recipe; the names of its layers are too many to list."""
    return {"rank": adapter.get("r"), "alpha": adapter.get("lora_alpha"), "targets": []} if adapter else None


def _code() -> str:
    import torch
    import transformers

    return f"mirage {describe_code()}; torch {torch.__version__}, transformers {transformers.__version__}"


def _data(
    raw: Mapping[str, Any], summary: Mapping[str, Any], run_dir: Path | None
) -> tuple[tuple[DatasetFacts, ...], tuple[SourceFacts, ...]]:
    data = raw.get("data") or {}
    defaults = SourceConfig().model_dump(mode="json")
    datasets: dict[str, DatasetFacts] = {}
    sources = []
    for source in data.get("sources") or ():
        named = str(source.get("path") or data.get("dir") or "")
        path = locate(named, run_dir=run_dir, recorded_run_dir=raw.get("run_dir"))
        name = dataset_name(named, path)
        if named not in datasets:
            datasets[named] = dataset_facts(path, name=name)
        # A single source's counts are those of the whole.
        known = summary if len(data["sources"]) == 1 else _without_totals(summary)
        sources.append(source_facts(source, path=path, dataset=name, defaults=defaults, summary=known))
    return tuple(datasets.values()), tuple(sources)


def _without_totals(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key.count("/") > 1}


def _base(model: Mapping[str, Any], config: Mapping[str, Any], source: Path) -> BaseFacts:
    path, revision = model.get("path"), model.get("revision")
    if model.get("tiny") is not None:
        return BaseFacts(kind="scratch", name=f"a small {model.get('family')} model built from nothing")
    if not path:
        path = config.get("base_model_name_or_path")
    if not path:
        return BaseFacts(kind="folder", name="not recorded")
    if str(path).startswith(PREFIX):
        return BaseFacts(kind="shipped", name=str(path), licence=_shipped_licence(str(path)))
    cached = _HUB_CACHE.search(str(path))
    hub_id = f"{cached[1]}/{cached[2]}" if cached else str(path)
    if cached or (_HUB_ID.fullmatch(hub_id) and not Path(hub_id).exists()):
        return BaseFacts(kind="hub", name=hub_id, revision=revision, licence=_PUBLISHED_LICENCES.get(hub_id))
    folder = Path(str(path)).expanduser()
    return BaseFacts(kind="folder", name=name_of_path(folder), licence=_licence_of(folder))


def _licence_of(folder: Path) -> str | None:
    """What the card in a model folder says, its own or that of the published model it was converted from."""
    for card in (folder / "README.md", folder / "published" / "README.md"):
        licence = front_matter(card).get("license")
        if licence:
            return str(licence)
    return None


def _shipped_licence(path: str) -> str | None:
    try:
        licence = read_object(find_shipped(path) / BASE_FILE).get("licence")
    except UserError:
        return None
    return str(licence).partition(";")[0].strip().lower() if licence else None


def _training(checkpoint: Path | None, run_dir: Path | None, summary: Mapping[str, Any]) -> TrainingFacts:
    if checkpoint is None or run_dir is None:
        return TrainingFacts()
    match = NAME.match(checkpoint.name)
    step = int(match[1]) if match else 0
    state = read_object(checkpoint / "resume" / "state.json")
    left_out = {
        key.removeprefix("data/rows_"): int(value) for key, value in summary.items() if _is_left_out(key, value)
    }
    try:
        records = [record for record in read_metrics(run_dir / MIRROR_NAME) if record["axis"] == "train"]
    except UserError:
        records = []
    records = [record for record in records if record["step"] <= step and "train/loss" in record]
    tokens = [float(record["train/tokens"]) for record in records if "train/tokens" in record]
    last = records[-1] if records else {}
    return TrainingFacts(
        step=step,
        num_epochs=last.get("train/epoch"),
        num_tokens=round(sum(tokens) / len(tokens) * step) if tokens else None,
        tokens_are_exact=len(tokens) == step,
        last_loss=last.get("train/loss"),
        num_processes=state.get("world_size"),
        num_left_out=left_out,
    )


def _is_left_out(key: str, value: Any) -> bool:
    return key.startswith("data/rows_") and key != "data/rows_seen" and isinstance(value, int) and value > 0


def _decisive_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the defaults, without secrets, addresses and absolute paths."""
    try:
        shown = Recipe.model_validate(raw).model_dump(mode="json", exclude_defaults=True)
    except ValidationError:  # of another version: all that it says
        shown = dict(raw)
    return without_paths({name: shown[name] for name in _DECISIVE if shown.get(name)})


def _hash(raw: Mapping[str, Any]) -> str | None:
    """As `recipe_hash`, of the text that was saved: a recipe of another version keeps its name."""
    if not raw:
        return None
    text = json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
