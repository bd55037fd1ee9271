"""Settings of a build: seed, and the counts and picture sizes behind `small` and `paper`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SizeName = Literal["small", "paper"]


class Size(BaseModel):
    """How much is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: dict[str, int] = Field(description="rows of each split")
    image_pixels: int = Field(description="edge of a picture")
    train_variants: int = Field(description="drawings of one concept that training rows share")
    test_variants: int = Field(description="drawings of one concept that test rows share; none is a training drawing")


SIZES: dict[str, Size] = {
    "small": Size(
        rows={"train": 1500, "train_twins": 1500, "train_general": 1500}
        | {"easy": 120, "hard": 120, "real": 24, "twins": 240, "general": 200},
        image_pixels=112,
        train_variants=24,
        test_variants=8,
    ),
    # Counts of the paper (table 19 and section 3.2): 3,927 training rows; 1,675 easy, 510 hard, 100 real.
    "paper": Size(
        rows={"train": 3927, "train_twins": 3927, "train_general": 3927}
        | {"easy": 1675, "hard": 510, "real": 100, "twins": 2185, "general": 500},
        image_pixels=224,
        train_variants=24,
        test_variants=12,
    ),
}


class Settings(BaseModel):
    """What a dataset folder is made from, apart from the code and the taxonomy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(ge=0)
    size_name: SizeName
    size: Size


def settings_for(*, seed: int, size: SizeName) -> Settings:
    """The settings behind the command line's `--seed` and `--size`."""
    return Settings(seed=seed, size_name=size, size=SIZES[size])
