"""The draft: what a row will be, before its pictures are drawn and its text is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mirage.data.row import Split

TEST_SPLITS: tuple[Split, ...] = ("easy", "hard", "real", "twins", "general")
TRAIN_SPLITS: tuple[Split, ...] = ("train", "train_twins", "train_general")


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
    twin_of: int | None = None
    """Plan index of the risky row whose question and other picture this benign row shares."""
    twin_kind: str | None = None
    """Which picture differs from the risky row: image_1 or image_2."""
    options: tuple[str, ...] = ()
    """Choices of a multiple-choice question."""
    answer: int = 0
    """Index of the right option."""
    classes: tuple[str, ...] = ()
    """Class ids of a knowledge row, which has no pictures."""

    @property
    def side(self) -> Literal["train", "test"]:
        """Which pool of drawings the row uses; the two never share a drawing."""
        return "train" if self.split in TRAIN_SPLITS else "test"
