"""From facts and results to the card: the hub's metadata and one Markdown page, the same for the same facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from mirage.config.schema import SelectConfig
from mirage.model_card import text
from mirage.model_card.evaluations import Evaluation, eval_results, headlines, sections
from mirage.model_card.facts import BaseFacts, CardFacts
from mirage.model_card.limits import limits

TEMPLATE = "model_card.md.jinja"
Form = Literal["run", "native", "published", "merged"]
# Of the hub's licence names; any other is `other` with a name.
# fmt: off
_LICENCES = frozenset((
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bsd", "bsd-2-clause",
    "bsd-3-clause", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-permissive-2.0", "gpl", "gpl-2.0", "gpl-3.0", "lgpl",
    "agpl-3.0", "mpl-2.0", "odbl", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "unknown",
))
# fmt: on
_NAME = str.maketrans(dict.fromkeys(" /\\,;:()[]{}\"'", "-"))


@dataclass(frozen=True)
class Card:
    """Everything that one card is made from. `form` is what lies beside it."""

    facts: CardFacts
    form: Form
    evaluations: Sequence[Evaluation] = ()
    unreadable: Sequence[str] = ()
    select: SelectConfig = field(default_factory=SelectConfig)
    logit_differences: dict[str, float] | None = None


def render_card(card: Card) -> str:
    """The card's text: YAML between `---` lines, then Markdown."""
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"plain": text.plain, "code": text.code, "count": text.count, "licence": _licence_text}
    environment.filters["bare"] = lambda value: text.code(value).strip("`")
    source = (resources.files("mirage.model_card") / TEMPLATE).read_text("utf-8")
    facts = card.facts
    body = environment.from_string(source).render(
        facts=facts,
        form=card.form,
        is_adapter=is_adapter(card),
        base=_base_text(facts.base),
        settings=key_settings(facts),
        recipe_yaml=_recipe_yaml(facts),
        headlines=headlines(card.evaluations, select=card.select),
        sections=sections(card.evaluations, select=card.select),
        limits=[*limits(facts, card.evaluations, select=card.select), *card.unreadable],
        data_licences=sorted({dataset.licence or "not stated" for dataset in facts.datasets}),
        attributions=list(dict.fromkeys(note for dataset in facts.datasets for note in dataset.attributions)),
        logit_differences=card.logit_differences or {},
    )
    return f"---\n{metadata(card)}\n---\n{body}"


def metadata(card: Card) -> str:
    """The hub's YAML. A base model or dataset that only this machine knows is not named there."""
    from huggingface_hub import ModelCardData

    facts = card.facts
    base = facts.base.name if facts.base.kind == "hub" else None
    licence = (facts.base.licence or "unknown").lower()
    is_known = licence in _LICENCES
    found = eval_results(card.evaluations)
    relation: dict[str, Any] = {"base_model_relation": "adapter" if is_adapter(card) else "finetune"} if base else {}
    return ModelCardData(
        license=licence if is_known else "other",
        license_name=None if is_known else licence.translate(_NAME),
        base_model=base,
        datasets=[_slug(dataset.title or dataset.name) for dataset in facts.datasets] or None,
        language=sorted({language for dataset in facts.datasets for language in dataset.languages}) or None,
        library_name="peft" if is_adapter(card) else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["mirage", "multi-image", "safety", _slug(facts.family), *(["lora"] if facts.lora else [])],
        eval_results=found or None,
        model_name=facts.name if found else None,
        **relation,
    ).to_yaml(line_break="\n")


def is_adapter(card: Card) -> bool:
    """Whether what lies beside the card is a peft adapter."""
    return card.facts.lora is not None and card.form in ("run", "native")


def key_settings(facts: CardFacts) -> list[tuple[str, str]]:
    """The settings a reader asks for first."""
    train, data = facts.recipe.get("train") or {}, facts.recipe.get("data") or {}
    if not facts.recipe:
        return []
    from mirage.config.schema import DataConfig, TrainConfig

    whole = TrainConfig().model_dump(mode="json") | train
    rows = [("trained in full", ", ".join(facts.trained) or "nothing")]
    if facts.lora:
        targets = ", ".join(facts.lora.get("targets") or ("its own layers",))
        rows.append(("LoRA", f"rank {facts.lora.get('rank')}, alpha {facts.lora.get('alpha')}, on {targets}"))
    batch = f"{whole['batch_samples']} samples" if whole["batch_samples"] else f"{whole['batch_packs']} packs"
    length = f"{whole['max_steps']} steps" if whole["max_steps"] else f"{whole['epochs']:g} epochs"
    share, steps = whole["warmup_ratio"], whole["warmup_steps"]
    warmup = f"{share:g} of the steps" if share else f"{steps or 0} steps"
    return [
        *rows,
        ("learning rate", f"{whole['lr']:g}, {whole['schedule']}, warm-up {warmup}"),
        ("optimiser step", batch),
        ("length", length),
        ("packed row", f"{data.get('pack_tokens', DataConfig().pack_tokens):,} tokens"),
        ("AdamW", f"betas {', '.join(map(str, whole['betas']))}, weight decay {whole['weight_decay']:g}"),
        ("precision", str(whole["precision"])),
        ("seed", str(whole["seed"])),
    ]


def _recipe_yaml(facts: CardFacts) -> str:
    """The settings as a recipe file; nothing in it can end the fence that it stands in."""
    if not facts.recipe:
        return ""
    dumped = yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True, width=100)
    return dumped.replace("```", "'''").rstrip("\n")


def _base_text(base: BaseFacts) -> str:
    revision = f" at revision {text.code(base.revision)}" if base.revision else ""
    if base.kind == "hub":
        return f"[{text.plain(base.name)}](https://huggingface.co/{base.name}){revision}"
    if base.kind == "shipped":
        return f"{text.code(base.name)}, a small model that comes with MIRage"
    if base.kind == "scratch":
        return text.plain(base.name)
    return f"the local folder {text.code(base.name)}"


def _licence_text(value: Any) -> str:
    return text.plain(value) if value else "not stated"


def _slug(name: str) -> str:
    kept = "".join(character if character.isalnum() and character.isascii() else "-" for character in name.lower())
    return "-".join(part for part in kept.split("-") if part)[:90] or "data"
