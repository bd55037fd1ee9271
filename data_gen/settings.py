"""Settings of a build: seed, and the counts and picture sizes behind `small`, `mini` and `paper`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_gen.stages.draft import Holdout
from data_gen.taxonomy.facts import Taxonomy

SizeName = Literal["small", "mini", "paper"]
PAIRS_ONLY: dict[Holdout, int] = {"pair": 100}


class Size(BaseModel):
    """How much is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: dict[str, int] = Field(description="rows of each split; a split that is not named has none")
    image_pixels: int = Field(description="edge of a picture")
    train_variants: int = Field(description="drawings of one concept that training rows share")
    test_variants: int = Field(description="drawings of one concept that test rows share; none is a training drawing")
    facts: Literal["core", "all"] = Field(default="core", description="the taxonomy's core classes, or all of them")
    balance_passes: int = Field(default=0, ge=0, description="times that the choice of twins is gone over again")
    holdout_shares: dict[Holdout, int] = Field(
        default=PAIRS_ONLY, description="percent of risky test rows whose pair, object or class pair is new"
    )
    min_class_objects: int = Field(
        default=6, ge=2, description="where `holdout_shares` names objects, a class this large has one held out"
    )

    @field_validator("holdout_shares")
    @classmethod
    def _shares_are_percents(cls, value: dict[Holdout, int]) -> dict[Holdout, int]:
        if sum(value.values()) != 100 or min(value.values()) <= 0:
            raise ValueError(f"must be positive percents that sum to 100, found {value}")
        return value


SIZES: dict[str, Size] = {
    "small": Size(
        rows={"train": 1500, "train_twins": 1500, "train_general": 1500}
        | {"easy": 120, "hard": 120, "real": 24, "twins": 240, "general": 200}
        | {"train_contrast": 300, "train_multi": 400, "contrast": 120, "multi": 120},
        image_pixels=112,
        train_variants=24,
        test_variants=8,
    ),
    # For `make experiment`: what a tiny model learns in minutes, and a test of every kind of newness.
    "mini": Size(
        rows={"train": 3000, "train_twins": 3000, "train_general": 16000}
        | {"easy": 240, "hard": 240, "real": 24, "twins": 480, "general": 400}
        | {"train_contrast": 300, "train_multi": 400, "contrast": 240, "multi": 240, "line": 480},
        image_pixels=112,
        train_variants=40,
        test_variants=12,
        balance_passes=4,
        holdout_shares={"pair": 60, "object": 20, "class_pair": 20},
        min_class_objects=5,
    ),
    # Counts of the paper (table 19 and section 3.2): 3,927 training rows; 1,675 easy, 510 hard, 100 real.
    "paper": Size(
        rows={"train": 3927, "train_twins": 3927, "train_general": 3927}
        | {"easy": 1675, "hard": 510, "real": 100, "twins": 2185, "general": 500}
        | {"train_contrast": 1200, "train_multi": 2000, "contrast": 600, "multi": 400, "line": 300},
        image_pixels=224,
        train_variants=24,
        test_variants=12,
        facts="all",
        balance_passes=4,
        holdout_shares={"pair": 60, "object": 20, "class_pair": 20},
    ),
}


class Settings(BaseModel):
    """What a dataset folder is made from, apart from the code and the taxonomy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(ge=0)
    size_name: SizeName
    size: Size

    def select(self, taxonomy: Taxonomy) -> Taxonomy:
        """The part of the taxonomy that the size uses."""
        return taxonomy.core if self.size.facts == "core" else taxonomy


def settings_for(*, seed: int, size: SizeName) -> Settings:
    """The settings behind the command line's `--seed` and `--size`."""
    return Settings(seed=seed, size_name=size, size=SIZES[size])
