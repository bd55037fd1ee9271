"""The end of a run: its last checkpoint passes the export gate, and a published model is written in both layouts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mirage.errors import UserError
from mirage.files import write_atomic
from mirage.model_card.write import (
    CARD_FILE,
    EXPORT_DIR,
    SUMMARY_FILE,
    refresh_cards_of,
    tell_no_card,
    write_run_cards,
)
from mirage.models import load_model
from mirage.models.export_gate import ExportError, check_export
from mirage.models.internvl_checkpoint import ORIGINALS, convert
from mirage.strict_json import read_json_object
from mirage.tracking.console import make_console
from mirage.training.callbacks import Callback
from mirage.training.checkpoint import read_ready, ready_checkpoints
from mirage.training.distributed import outside_training, sum_over_ranks
from mirage.training.export_prompt import TOLERANCES, export_prompt, logits_of

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer


class ExportCallback(Callback):
    """Fills `run_dir/export` after the last checkpoint, and stops the run with an error if an export is not the model.

    `native` is a link to the checkpoint's `model/` (full weights or adapter). A run in full on a model that came in
    the published InternVL layout gets `published` beside it. Each is reloaded by plain transformers (and peft) on the
    CPU and compared with the weights in memory on one short prompt; the summary is `export.json`, the model card
    `README.md`. Evaluations that end later write the card anew.
    """

    def on_end(self, trainer: Trainer) -> None:
        """All ranks run the model in memory; rank 0 writes, reloads and compares. An export already checked stays."""
        checkpoint = ready_checkpoints(trainer.run_dir)[-1]
        folder = trainer.run_dir / EXPORT_DIR
        if _is_done(folder, checkpoint):
            if trainer.is_main:
                refresh_cards_of(trainer.run_dir, make_console(trainer.recipe.tracking.console))
            return
        inputs = export_prompt(trainer.adapter, dtype=trainer.model.dtype)
        reference = logits_of(trainer.engine.module.hf, inputs, device=trainer.device)
        error: BaseException | None = None
        if trainer.is_main:
            try:
                with outside_training():
                    _export(trainer, checkpoint, folder, inputs, reference)
                    _write_cards(trainer, checkpoint)
            except Exception as raised:  # the other ranks wait below and must hear of any failure
                error = raised
        # One sum that all ranks take part in, so that none waits for a rank that has failed.
        failed = sum_over_ranks([float(error is not None)], trainer.device)[0] > 0
        if error is not None:
            raise error
        if failed:
            raise ExportError("the first rank could not export the trained model; its message says why")


def _write_cards(trainer: Trainer, checkpoint: Path) -> None:
    """The model card. The run's work is done by now, and a card that cannot be written does not undo it."""
    console = make_console(trainer.recipe.tracking.console)
    try:
        write_run_cards(trainer, checkpoint)
    except Exception as error:
        tell_no_card(error, console)
    else:
        console.say(f"model card: {trainer.run_dir / EXPORT_DIR / CARD_FILE}", event="model_card")


def _is_done(folder: Path, checkpoint: Path) -> bool:
    try:
        summary = read_json_object(folder / SUMMARY_FILE)
    except UserError:  # none, or damaged: it is written again
        return False
    ready = read_ready(checkpoint)
    return ready is not None and summary.get("fingerprint") == ready["fingerprint"]


def _export(
    trainer: Trainer, checkpoint: Path, folder: Path, inputs: dict[str, torch.Tensor], reference: torch.Tensor
) -> None:
    """Write and check every layout, then the summary. Raises `ExportError` or `UserError`."""
    model_dir = checkpoint / "model"
    dtype = trainer.model.dtype
    base = trainer.base if trainer.peft_model is not None else None
    if trainer.recipe.model.quantize != "none":
        # The adapter is given away for the whole base, whose logits are not those of the packed one in memory.
        reference = logits_of(load_model(model_dir, dtype=dtype)[0], inputs)
    gate: dict[str, Any] = {"inputs": inputs, "reference_logits": reference, "dtype": dtype}
    gate["tolerance"] = TOLERANCES[dtype]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    differences = {"native": check_export(model_dir, base=base, **gate)}
    (folder / "native").symlink_to(os.path.relpath(model_dir, folder), target_is_directory=True)
    if trainer.peft_model is None and (model_dir / ORIGINALS / "config.json").exists():
        convert(model_dir, folder / "published", layout="published", check=True)
        differences["published"] = check_export(folder / "published", **gate)
    ready = read_ready(checkpoint)
    summary = {
        "checkpoint": checkpoint.name,
        "fingerprint": ready["fingerprint"] if ready else None,
        # Largest difference of a logit from the model in memory, over the largest logit.
        "logit_differences": differences,
    }
    write_atomic(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    found = ", ".join(f"{layout} (logits within {difference:.0e})" for layout, difference in differences.items())
    make_console(trainer.recipe.tracking.console).say(
        f"exported to {folder}: {found}", event="export", folder=folder, logit_differences=differences
    )
