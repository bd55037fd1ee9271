"""Settings of a dataset that is made in about a second, for tests of the generator."""

from __future__ import annotations

from data_gen.settings import Settings, Size


def tiny_settings(*, seed: int = 0) -> Settings:
    """Every split, few rows, small pictures."""
    rows = {"train": 60, "train_twins": 60, "train_general": 320, "easy": 8, "hard": 8, "real": 4, "twins": 16}
    rows |= {"general": 12, "train_contrast": 20, "train_multi": 24, "contrast": 20, "multi": 16, "line": 12}
    size = Size(rows=rows, image_pixels=32, train_variants=2, test_variants=1)
    return Settings(seed=seed, size_name="small", size=size)
