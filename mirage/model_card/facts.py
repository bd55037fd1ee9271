"""What a model card states besides results: data, base model, recipe, training; kept beside the export as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mirage.files import write_atomic

FACTS_FILE = "card.json"
FACTS_VERSION = 1


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetFacts(_Facts):
    """A folder or file that was trained on. No path: its own name only."""

    name: str
    title: str | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()
    num_rows: int | None = None
    sha256: str | None = None
    """Of its manifest's content, or of its index files where it has no manifest."""
    hash_of: str = ""
    attributions: tuple[str, ...] = ()
    limitations: tuple[str, ...] = ()


class SourceFacts(_Facts):
    """One part of the mixture; `categories` are the rows of the whole split by category, where they are known."""

    name: str
    dataset: str
    split: str
    format: str
    settings: dict[str, Any] = {}
    num_rows: int | None = None
    num_tokens: int | None = None
    num_supervised_tokens: int | None = None
    categories: dict[str, int] = {}


class BaseFacts(_Facts):
    """What training started from."""

    kind: Literal["hub", "folder", "shipped", "scratch"]
    name: str
    revision: str | None = None
    licence: str | None = None


class TrainingFacts(_Facts):
    """What was done; None where it was not recorded."""

    step: int | None = None
    num_epochs: float | None = None
    num_tokens: int | None = None
    tokens_are_exact: bool = False
    last_loss: float | None = None
    num_processes: int | None = None
    hardware: str | None = None
    code: str | None = None
    num_left_out: dict[str, int] = {}


class CardFacts(_Facts):
    """All of it. `recipe` holds the settings that differ from the defaults and decide the weights."""

    version: int = FACTS_VERSION
    name: str
    family: str
    checkpoint: str
    fingerprint: str
    num_parameters: int | None = None
    trained: tuple[str, ...] = ()
    num_trained_parameters: int | None = None
    lora: dict[str, Any] | None = None
    quantized: bool = False
    recipe: dict[str, Any] = {}
    recipe_hash: str | None = None
    seed: int | None = None
    base: BaseFacts
    datasets: tuple[DatasetFacts, ...] = ()
    sources: tuple[SourceFacts, ...] = ()
    training: TrainingFacts = TrainingFacts()


def read_facts(folder: Path, *, fingerprint: str) -> CardFacts | None:
    """The facts kept in `folder` if they are of these weights and of this version."""
    try:
        facts = CardFacts.model_validate_json((folder / FACTS_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return facts if (facts.fingerprint, facts.version) == (fingerprint, FACTS_VERSION) else None


def write_facts(folder: Path, facts: CardFacts) -> None:
    """Keep them, so that a card made anew later says the same though data or machine have changed."""
    write_atomic(folder / FACTS_FILE, facts.model_dump_json(indent=2) + "\n")
