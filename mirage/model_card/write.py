"""Writes the cards: at the end of a run, again when results come in, and with what `mirage export` makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mirage.config.schema import SelectConfig
from mirage.errors import UserError
from mirage.evals.request import weights_fingerprint
from mirage.files import read_object, write_atomic
from mirage.model_card.evaluations import evaluation_folders, find_evaluations
from mirage.model_card.facts import CardFacts, read_facts, write_facts
from mirage.model_card.gather import count_parameters, facts_of_run, gather_facts
from mirage.model_card.render import Card, Form, render_card
from mirage.tracking.console import Terminal
from mirage.training.checkpoint import NAME, read_ready

if TYPE_CHECKING:
    from mirage.training.trainer import Trainer

CARD_FILE = "README.md"
EXPORT_DIR, SUMMARY_FILE = "export", "export.json"


def write_run_cards(trainer: Trainer, checkpoint: Path) -> None:
    """The cards of a run's export, whose `export.json` is written; its facts are kept in `export/card.json`."""
    write_facts(trainer.run_dir / EXPORT_DIR, facts_of_run(trainer, checkpoint))
    refresh_cards(trainer.run_dir)


def refresh_cards(run_dir: Path) -> bool:
    """Write the cards of a run's export anew with the results that are there now; False where nothing is exported.

    They are `export/README.md`, and `README.md` in each folder that it holds to give away: the exported checkpoint's
    `model/`, which `export/native` links to, and `export/published`. They are no part of the checkpoint's manifest.
    """
    export = run_dir / EXPORT_DIR
    summary = read_object(export / SUMMARY_FILE)
    checkpoint = run_dir / str(summary.get("checkpoint"))
    ready = read_ready(checkpoint) if summary else None
    if ready is None or ready["fingerprint"] != summary.get("fingerprint"):
        return False
    source, fingerprint = checkpoint / "model", str(ready["fingerprint"])
    facts = read_facts(export, fingerprint=fingerprint) or gather_facts(source, fingerprint=fingerprint)
    differences = {str(name): float(value) for name, value in (summary.get("logit_differences") or {}).items()}
    places: list[tuple[Path, Form]] = [(export, "run"), (source, "native")]
    if (export / "published").is_dir():
        places.append((export / "published", "published"))
    for folder, form in places:
        _write(folder, _card(facts, form, source, differences=differences))
    return True


def refresh_cards_of(run_dir: Path, console: Terminal | None) -> None:
    """As `refresh_cards`; what goes wrong is said, and stops neither a run nor an evaluation."""
    try:
        refresh_cards(run_dir)
    except Exception as error:
        tell_no_card(error, console)


def tell_no_card(error: Exception, console: Terminal | None) -> None:
    """Say why there is no card."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if console is not None:
        console.error(f"no model card: {reason}; the exported weights are whole")


def write_export_card(folder: Path, source: Path, *, form: Form, difference: float) -> None:
    """The card of what `mirage export` has written into `folder` from the weights in `source`."""
    checkpoint = source.parent if NAME.match(source.parent.name) else None
    fingerprint = weights_fingerprint(checkpoint or source)
    facts = None
    if checkpoint is not None:
        facts = read_facts(checkpoint.parent / EXPORT_DIR, fingerprint=fingerprint)
    facts = facts or gather_facts(source, fingerprint=fingerprint)
    if form != "native":
        facts = facts.model_copy(update={"num_parameters": count_parameters(folder)})
    _write(folder, _card(facts, form, source, differences={form: difference}))


def _card(facts: CardFacts, form: Form, source: Path, *, differences: dict[str, float]) -> Card:
    evaluations, unreadable = find_evaluations(evaluation_folders(source), fingerprint=facts.fingerprint)
    select = _select(read_object(source.parent / "recipe.json"))
    return Card(facts, form, evaluations, unreadable, select, differences)


def _select(recipe: dict[str, Any]) -> SelectConfig:
    """Which rates are safety, over-refusal and general ability, as the run's recipe has it."""
    try:
        return SelectConfig.model_validate((recipe.get("eval") or {}).get("select") or {})
    except ValidationError:
        return SelectConfig()


def _write(folder: Path, card: Card) -> None:
    write_atomic(folder / CARD_FILE, render_card(card))
