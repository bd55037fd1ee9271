"""`mirage export CHECKPOINT DST [--merge] [--layout native|published]`: a checkpoint as a folder to give away."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mirage.errors import UserError
from mirage.model_card.render import Form
from mirage.model_card.write import write_export_card
from mirage.models.adapter import ModelAdapter
from mirage.models.export_gate import ADAPTER_FILE, ExportError, check_export
from mirage.models.internvl_checkpoint import Layout, convert, copy_published_files
from mirage.models.registry import base_folder, find_weights, load_model
from mirage.training.checkpoint import ready_checkpoints
from mirage.training.export_prompt import TOLERANCES, export_prompt, logits_of


def export(checkpoint: Path, dst: Path, *, layout: Layout = "native", merge: bool = False) -> float:
    """Write the model of `checkpoint` (or of a run's newest one, or a weights folder) to the new folder `dst`.

    `merge` adds a LoRA adapter's update to its base model's weights, in the base's own type. What is written is
    reloaded in plain transformers (and peft); returns the largest difference of its logits over the largest logit.
    `dst` appears whole or not at all. Raises `UserError` for what the user can mend and `ExportError` when the written
    folder is not the model. Its model card, `README.md`, has the results that are there by now.
    """
    ready = ready_checkpoints(checkpoint) if checkpoint.is_dir() else []
    source = find_weights(ready[-1] if ready else checkpoint)
    is_adapter = (source / ADAPTER_FILE).exists()
    _check_request(source, dst, is_adapter=is_adapter, layout=layout, merge=merge)
    dtype = (
        AutoConfig.from_pretrained(base_folder(source), local_files_only=True, trust_remote_code=False).dtype
        or torch.float32
    )
    model, adapter = load_model(source, dtype=dtype)
    inputs = export_prompt(adapter, dtype=dtype)
    reference = logits_of(model, inputs)
    dst.parent.mkdir(parents=True, exist_ok=True)
    partial = dst.with_name(f"{dst.name}.partial")
    merged = dst.with_name(f"{dst.name}.merged")
    for leftover in (partial, merged):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        if merge:
            _save_merged(model, adapter, merged, base=base_folder(source))
        weights = merged if merge else source
        del model
        if layout == "published":
            convert(weights, partial, layout="published", check=True)
        elif merge:
            merged.rename(partial)
        else:
            shutil.copytree(weights, partial)
        base = base_folder(source) if is_adapter and not merge else None
        difference = check_export(
            partial, inputs=inputs, reference_logits=reference, base=base, tolerance=TOLERANCES[dtype], dtype=dtype
        )
        form: Form = "published" if layout == "published" else "merged" if merge else "native"
        write_export_card(partial, source, form=form, difference=difference)
        partial.rename(dst)
    except OSError as error:
        raise UserError(f"{dst}: cannot be written ({error.strerror or error})") from error
    finally:
        for leftover in (partial, merged):
            shutil.rmtree(leftover, ignore_errors=True)
    return difference


def _check_request(source: Path, dst: Path, *, is_adapter: bool, layout: Layout, merge: bool) -> None:
    if dst.exists() or dst.is_symlink():
        raise UserError(f"{dst}: exists already; name a new folder or remove this one")
    if merge and not is_adapter:
        raise UserError(f"{source}: holds full weights and no adapter; leave out --merge")
    if is_adapter and layout == "published" and not merge:
        raise UserError(f"{source}: holds an adapter, which has no published layout; add --merge")


def _save_merged(model: Any, adapter: ModelAdapter, folder: Path, *, base: Path) -> None:
    whole = model.merge_and_unload(safe_merge=True)
    whole.save_pretrained(folder)
    adapter.save_files(folder)
    copy_published_files(base, folder)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `mirage export`."""
    parser = argparse.ArgumentParser(
        prog="mirage export",
        description="Write a checkpoint's model as a folder that plain transformers or peft loads.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint, run folder (its newest checkpoint) or weights")
    parser.add_argument("dst", type=Path, help="folder to make; must not exist")
    parser.add_argument("--merge", action="store_true", help="add a LoRA adapter to its base model's weights")
    parser.add_argument(
        "--layout",
        choices=("native", "published"),
        default="native",
        help="published is InternVL's own (default native)",
    )
    return parser


def export_command(argv: list[str]) -> int:
    """Run `mirage export`. Returns the exit status; raises `UserError` for what the user can mend."""
    arguments = build_parser().parse_args(argv)
    try:
        difference = export(arguments.checkpoint, arguments.dst, layout=arguments.layout, merge=arguments.merge)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    merged = ", adapter merged" if arguments.merge else ""
    print(f"wrote {arguments.dst} in the {arguments.layout} layout{merged}; reloaded logits within {difference:.1e}")
    return 0
