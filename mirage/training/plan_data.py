"""Lengths of the mixture for the plan: from the data set where it is there, else from the paper's counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirage.config.schema import Recipe
from mirage.data.lengths import LengthIndex, index_rows
from mirage.data.mixing import repeated
from mirage.data.render import image_token_counts
from mirage.data.row_list import RowList
from mirage.data.sources import load_mixture, read_rows
from mirage.models.adapter import ModelAdapter
from mirage.strict_json import read_json_object
from mirage.training.plan import plan_adapter

# The paper's mixture (section 3.2 and table 7): 3,927 MIS rows and 500 general ones, two pictures a row.
PAPER_ROWS = {"train": 3927, "train_general": 500}
PAPER_IMAGES = 2
# Its generated pictures are squares of about a megapixel (10.6 GB of PNG for 7,854 files).
PAPER_IMAGE_PIXELS = (1024, 1024)
# Its label file has about 1,400 characters of text a row.
PAPER_TEXT_TOKENS, PAPER_SUPERVISED_TOKENS = 400, 300
# English text in the vocabularies of both families.
_CHARACTERS_PER_TOKEN = 4.0
# Role markers and line breaks of a question and an answer.
_TEMPLATE_TOKENS = 16


@dataclass(frozen=True)
class PlannedMixture:
    """Lengths of every row, images of every row, and how they are known."""

    lengths: LengthIndex
    num_images: np.ndarray
    source: str
    exact: bool


def planned_mixture(recipe: Recipe, config: Any) -> PlannedMixture:
    """The mixture's lengths: exact with data and tokenizer, estimated from the text with data alone, else the paper's.

    Raises `UserError` for data that is there and cannot be trained on.
    """
    paths = [source.path or recipe.data.dir for source in recipe.data.sources]
    missing = [path for path in paths if not path.exists()]
    if missing:
        return _paper_mixture(recipe, plan_adapter(recipe, config), missing[0])
    rows = load_mixture(recipe.data, seed=recipe.train.seed).rows
    where = ", ".join(sorted({str(path) for path in paths}))
    adapter = _adapter_with_tokenizer(recipe, config)
    if adapter is not None:
        kept, lengths, left_out = index_rows(rows, adapter, recipe.data)
        note = f", {len(left_out)} left out" if left_out else ""
        return PlannedMixture(lengths, kept.num_images, f"{where}{note}", True)
    lengths = _estimated_lengths(rows, plan_adapter(recipe, config))
    source = f"{where}; text estimated at {_CHARACTERS_PER_TOKEN:g} characters a token, there is no tokenizer yet"
    return PlannedMixture(lengths, rows.num_images, source, False)


def _adapter_with_tokenizer(recipe: Recipe, config: Any) -> ModelAdapter | None:
    if recipe.model.tiny is not None:
        from mirage.models.tiny import TRAIN_SPLITS, train_tokenizer

        # The vocabulary that building the tiny model would train, from the same text.
        rows = read_rows(recipe.data.dir, splits=TRAIN_SPLITS)
        texts = [message.text for row in rows for message in row.messages]
        tokenizer = train_tokenizer(texts, family=recipe.model.family, vocab_size=recipe.model.tiny.vocab_size)
        return plan_adapter(recipe, config, tokenizer)
    folder = Path(recipe.model.path).expanduser() if recipe.model.path else None
    if folder is None or not (folder / "tokenizer.json").is_file() or _is_published(folder):
        return None
    from transformers import AutoTokenizer

    return plan_adapter(recipe, config, AutoTokenizer.from_pretrained(folder))


def _is_published(folder: Path) -> bool:
    config = read_json_object(folder / "config.json", remedy="fetch it again", any_number=True)
    return config.get("model_type") == "internvl_chat"


def _estimated_lengths(rows: RowList, adapter: ModelAdapter) -> LengthIndex:
    columns, weights = np.empty((3, len(rows)), np.int32), np.empty(len(rows))
    for number, entry in enumerate(rows):
        supervised = sum(len(m.text) for m in entry.row.messages if m.role == "assistant") / _CHARACTERS_PER_TOKEN
        asked = sum(len(m.text) for m in entry.row.messages if m.role != "assistant") / _CHARACTERS_PER_TOKEN
        images = sum(image_token_counts(entry.row, adapter))
        tokens = round(asked + supervised) + images + _TEMPLATE_TOKENS
        columns[:, number], weights[number] = (tokens, images, max(1, round(supervised))), entry.weight
    return LengthIndex(columns[0], columns[1], columns[2], weights)


def _paper_mixture(recipe: Recipe, adapter: ModelAdapter, missing: Path) -> PlannedMixture:
    width, height = PAPER_IMAGE_PIXELS
    image_tokens = PAPER_IMAGES * adapter.num_image_tokens(width, height, num_images=PAPER_IMAGES)
    columns = []
    for source in recipe.data.sources:
        rows = PAPER_ROWS.get(source.split, 0)
        rows = min(rows, source.max_samples) if source.max_samples is not None else rows
        rows = repeated(rows, source.epochs)
        row = (PAPER_TEXT_TOKENS + image_tokens, image_tokens, PAPER_SUPERVISED_TOKENS, source.weight)
        columns += [row] * rows
    columns = columns or [(PAPER_TEXT_TOKENS + image_tokens, image_tokens, PAPER_SUPERVISED_TOKENS, 1.0)]
    splits = ", ".join(source.split for source in recipe.data.sources if source.split not in PAPER_ROWS)
    unknown = f"; it has no {splits}" if splits else ""
    note = (
        f"{missing} is not there (`make datagen` writes it): the paper's counts instead, {PAPER_IMAGES} pictures of "
        f"{width} x {height} and about {PAPER_TEXT_TOKENS} text tokens a row{unknown}"
    )
    return PlannedMixture(_index(columns), np.full(len(columns), PAPER_IMAGES), note, False)


def _index(columns: list[tuple[int, int, int, float]]) -> LengthIndex:
    tokens, images, supervised, weights = (np.array(column) for column in zip(*columns))
    return LengthIndex(tokens, images, supervised, weights.astype(np.float64))
