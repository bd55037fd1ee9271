"""The draft: what a row will be, before its pictures are drawn and its text is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mirage.data.row import Split

TEST_SPLITS: tuple[Split, ...] = ("easy", "hard", "real", "twins", "general", "contrast", "multi", "line")
TRAIN_SPLITS: tuple[Split, ...] = ("train", "train_twins", "train_general", "train_contrast", "train_multi")
MULTI_SPLITS: tuple[Split, ...] = ("train_multi", "multi")
CONTRAST_SPLITS: tuple[Split, ...] = ("train_contrast", "contrast")
LINE_SPLIT: Split = "line"
# What about a pair of objects is new in the test: the pair only, one of the objects in a pair, or the two classes.
Holdout = Literal["pair", "object", "class_pair"]
# How objects are drawn: OpenMoji's coloured art, or its outlines alone, which only the split `line` shows.
Style = Literal["colour", "line"]


@dataclass(frozen=True)
class Draft:
    """One planned row. Slugs name objects or photographs of the taxonomy."""

    index: int
    """Position in the plan, which is the order of rows.jsonl."""
    split: Split
    kind: Literal["risky", "benign", "general"]
    things: tuple[str, ...]
    """Slugs, one an image; none for text-only knowledge rows."""
    variants: tuple[int, ...]
    """Which drawing (or crop) of each thing, within the side (train or test) of the split."""
    question: str
    template: str
    """Phrasing family of a question about a pair, or kind of general row."""
    unseen_family: bool = False
    """The phrasing family never occurs in training."""
    overt: bool = False
    """The text itself states a bad intent."""
    holdout: Holdout | None = None
    """What is held out of training about the pair; none in training rows and for photographs."""
    pair_at: tuple[int, int] = (0, 1)
    """Positions, among the pictures or the named objects, of the two that decide."""
    scope: Literal["pair", "all"] = "pair"
    """Whether the text asks about the two that decide or about all pictures together."""
    intent: Literal["use", "protect"] = "use"
    """Whether the text asks to use the things together or to keep them safely apart."""
    named: tuple[str, ...] = ()
    """Slugs of the two objects that the text names itself; the pictures show one of them or none."""
    twin_of: int | None = None
    """Plan index of the risky row that this benign row mirrors: one picture, the order, or the intent differs."""
    twin_kind: str | None = None
    """What differs from the risky row: image_1, image_2, ..., image_order, object_1, object_2 or intent."""
    sibling_of: int | None = None
    """Plan index of the row of another split that a contrast or line row is made from."""
    sibling_kind: str | None = None
    """How it differs from that row: swap_order, all_in_text, protective_intent or line_art."""
    style: Style = "colour"
    """How the pictures are drawn."""
    options: tuple[str, ...] = ()
    """Choices of a multiple-choice question."""
    answer: int = 0
    """Index of the right option."""
    classes: tuple[str, ...] = ()
    """Class ids of a knowledge row, which has no pictures."""

    @property
    def pair(self) -> tuple[str, str]:
        """Slugs of the two objects that decide, in the order of their pictures (or of their names in the text)."""
        objects = self.named or self.things
        return objects[self.pair_at[0]], objects[self.pair_at[1]]

    @property
    def asked(self) -> tuple[str, ...]:
        """Slugs of the objects that the text asks about."""
        return self.things if self.scope == "all" else self.pair

    @property
    def side(self) -> Literal["train", "test"]:
        """Which pool of drawings the row uses; the two never share a drawing."""
        return "train" if self.split in TRAIN_SPLITS else "test"
