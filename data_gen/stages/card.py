"""Stage 6, card: the dataset card, drawn from the same numbers as the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from statistics import mean
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from data_gen.settings import Settings
from data_gen.stages.diversity import WORD
from data_gen.stages.draft import TRAIN_SPLITS
from data_gen.stages.shortcuts import NOT_APPLICABLE
from data_gen.taxonomy.facts import Taxonomy
from mirage.data.row import Row

VERSION = "2"
TEMPLATE = "card.md.jinja"
SAME_ART = "Test drawings differ from training drawings by place, size, turn, colour and background, not by the art."
LINE_ART = f"{SAME_ART} Only the split line has another art: the outlines of the same drawings."
LIMITATIONS = (
    "Drawn pictures are pictograms. A result on them says nothing about photographs or about harm in the real world.",
    "Questions and answers come from a small grammar; they are far more uniform than people's words.",
    SAME_ART,
    "The real split holds few photographs in many crops; its rows are not independent of each other.",
    "A pair of kinds is called benign if the taxonomy lists no risk for it, which is a convention, not a safety claim.",
    "Benign twins cover drawn pairs; the real split has none.",
)
NEW_PAIRS_ONLY = "Test pairs are new pairs of known objects: no object and no pair of object kinds is new."
NEW_OBJECTS_ARE_NAMED = "Objects held out of training pairs are still named and chosen in general training rows."


def limitations(settings: Settings) -> tuple[str, ...]:
    """What results on a build do not show."""
    has_line_art = settings.size.rows.get("line", 0) > 0
    common = (LINE_ART if text == SAME_ART and has_line_art else text for text in LIMITATIONS)
    structured = len(settings.size.holdout_shares) > 1
    return (*common, NEW_OBJECTS_ARE_NAMED if structured else NEW_PAIRS_ONLY)


def text_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Size of the training language: distinct words (any case), and words of an answer about a pair on average."""
    texts = [message.text for row in rows if row.split in TRAIN_SPLITS for message in row.messages]
    answers = [row.answer or "" for row in rows if row.split in ("train", "train_twins")]
    questions = {row.question for row in rows if row.split == "train"}
    return {
        "distinct_train_words": len({word.lower() for text in texts for word in WORD.findall(text)}),
        "mean_pair_answer_words": round(mean(len(answer.split()) for answer in answers), 1),
        "distinct_train_questions": len(questions),
    }


def taxonomy_figures(taxonomy: Taxonomy) -> dict[str, int]:
    """How many classes, objects, relations and photographs the facts have."""
    num_classes = len(taxonomy.classes)
    return {
        "classes": num_classes,
        "objects": sum(len(group.objects) for group in taxonomy.classes),
        "class_pairs": num_classes * (num_classes - 1) // 2,
        "risky_class_pairs": len(taxonomy.relations),
        "photographs": len(taxonomy.photos),
    }


def shortcut_tables(figures: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Tables of figures that share their views, as lines of Markdown."""
    tables: list[tuple[list[str], list[str]]] = []
    for name, figure in figures.items():
        views = list(figure["accuracies"])
        lines = next((lines for known, lines in tables if known == views), None)
        if lines is None:
            lines = [f"| twin pairs | pairs | margin | {' | '.join(views)} |", "| --- " * (len(views) + 3) + "|"]
            tables.append((views, lines))
        cells = [f"{value:.3f}" for value in figure["accuracies"].values()]
        lines.append(f"| {name} | {figure['pairs']} | {figure['margin']:.3f} | {' | '.join(cells)} |")
    return [lines for _, lines in tables]


def render_card(
    taxonomy: Taxonomy,
    *,
    settings: Settings,
    counts: dict[str, Any],
    text: dict[str, Any],
    shortcuts: dict[str, dict[str, Any]],
    diversity: dict[str, dict[str, Any]],
    generators: dict[str, str],
) -> str:
    """The card as Markdown. A pure function of its arguments: nothing of the machine or the day is in it."""
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    source = (resources.files("data_gen.prompts") / TEMPLATE).read_text("utf-8")
    return environment.from_string(source).render(
        settings=settings,
        counts=counts,
        text=text,
        shortcuts=shortcuts,
        shortcut_tables=shortcut_tables(shortcuts),
        not_applicable=NOT_APPLICABLE,
        diversity=diversity,
        generators=generators,
        facts=taxonomy_figures(taxonomy),
        limitations=limitations(settings),
        photos=taxonomy.photos,
    )
