"""Pictures: the same bytes for the same seed, variety between seeds, and nothing about time in the file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_gen.pictures import _sprite, crop_photo, draw_thing, line_art
from data_gen.taxonomy.facts import Thing, load_taxonomy
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


def _levels(picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png))).astype(int)


@pytest.mark.parametrize("slug", ["candle", "knife", "laptop", "glass_of_wine"])
def test_line_art_stands_where_the_coloured_drawing_stands(slug):
    colour, line = (
        _levels(draw_thing(TAXONOMY.things[slug], pixels=96, seed=3, style=style)) for style in ("colour", "line")
    )
    outlines = line.max(-1) < 40
    assert outlines.any() and (colour.max(-1) < 60)[outlines].mean() > 0.95, "the outlines are in both, at one place"
    changed = (colour != line).any(-1)
    assert changed.mean() > 0.01
    for axis in (0, 1):
        around, inside = np.flatnonzero(outlines.any(axis)), np.flatnonzero(changed.any(axis))
        assert around[0] - 6 <= inside[0] and inside[-1] <= around[-1] + 6, "around the outlines nothing changes"


def test_every_drawing_has_line_art_without_colour():
    things = [thing for thing in TAXONOMY.things.values() if isinstance(thing, Thing)]
    for thing in things:
        levels = np.asarray(_sprite(thing.code, 48, "line")).astype(int)
        ink = levels[levels[..., 3] > 200][:, :3]
        assert len(ink) > 20 and ink.max() < 60, thing.slug
    assert len({_sprite(thing.code, 48, "line").tobytes() for thing in things}) == len(things)


def test_a_drawing_of_colours_alone_keeps_its_outlines():
    shape = '<g id="color"><g id="skin"><rect x="9" y="9" width="40" height="40" style="fill:red"/></g></g>'
    art = line_art(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{shape}<g id="line"/></svg>')
    assert 'fill="none"' in art and 'stroke="#000"' in art and "red" not in art
    with_line = f'<svg xmlns="http://www.w3.org/2000/svg">{shape}<g id="line"><path d="M9 9h9"/></g></svg>'
    assert "rect" not in line_art(with_line) and "path" in line_art(with_line)


def test_drawings_with_entities_are_refused():
    with pytest.raises(UserError, match="entities"):
        line_art('<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>')


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
