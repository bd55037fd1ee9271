"""Pictures: the same bytes for the same seed, variety between seeds, and nothing about time in the file."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from data_gen.pictures import crop_photo, draw_thing
from data_gen.taxonomy.facts import load_taxonomy
from mirage.errors import UserError

TAXONOMY = load_taxonomy()


def test_drawing_is_a_function_of_its_seed():
    candle = TAXONOMY.things["candle"]
    first, again, other = (draw_thing(candle, pixels=48, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.png != other.png
    image = Image.open(io.BytesIO(first.png))
    assert (image.size, image.mode, image.info) == ((48, 48), "RGB", {})


def test_objects_of_one_seed_differ():
    assert len({draw_thing(thing, pixels=32, seed=5).png for g in TAXONOMY.classes for thing in g.objects}) == sum(
        len(g.objects) for g in TAXONOMY.classes
    )


@pytest.mark.parametrize("photo", TAXONOMY.photos, ids=lambda photo: photo.slug)
def test_crops_of_photographs(photo):
    crops = [crop_photo(photo, pixels=40, seed=seed) for seed in range(6)]
    assert crops[0] == crop_photo(photo, pixels=40, seed=0)
    assert len({crop.png for crop in crops}) >= 4
    assert all(Image.open(io.BytesIO(crop.png)).size == (40, 40) for crop in crops)


def test_missing_photograph_is_named():
    photo = TAXONOMY.photos[0].model_copy(update={"file": "skimage/data/none.png"})
    with pytest.raises(UserError, match=r"skimage/data/none\.png"):
        crop_photo(photo, pixels=40, seed=0)
