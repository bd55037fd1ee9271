"""The same picture in another style: grey, exchanged colours, few tones or washed out."""

from __future__ import annotations

import random

from PIL import Image, ImageEnhance, ImageOps


def restyle(picture: Image.Image, chance: random.Random) -> Image.Image:
    """An RGB picture in grey, with its colour channels exchanged, in few tones, or washed out."""
    style = chance.choice(("grey", "exchanged", "few tones", "pale"))
    if style == "grey":
        return ImageOps.grayscale(picture).convert("RGB")
    if style == "exchanged":
        channels = list(picture.split())
        chance.shuffle(channels)
        return Image.merge("RGB", channels)
    if style == "few tones":
        return ImageOps.posterize(picture, bits=chance.choice((1, 2)))
    return ImageEnhance.Color(picture).enhance(chance.uniform(0.1, 0.6))
