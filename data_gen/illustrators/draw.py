"""Illustrator draw: OpenMoji art and packaged photographs for planned drafts, art by name for objects from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, get_args

from pydantic import Field

from data_gen import pictures
from data_gen.illustrators.base import Found, Illustrate, IllustrateOptions, NoPicture, PictureRequest
from data_gen.illustrators.naming import best_name
from data_gen.pictures import OPENMOJI_ATTRIBUTION, OPENMOJI_LICENCE, Picture, generator_versions
from data_gen.settings import SIZES, Settings
from data_gen.stages import illustrate
from data_gen.stages.draft import Style
from data_gen.stages.illustrate import PictureOrder, drawing_generator
from data_gen.taxonomy.facts import Thing
from data_gen.tools import Tools
from mirage.data.row import ImageSource

MAX_HELD_BYTES = 256 * 2**20


class DrawOptions(IllustrateOptions):
    """Options of `draw`."""

    pixels: int = Field(default=SIZES["paper"].image_pixels, ge=16, le=4096, description="edge of a drawing")


class DrawIllustrate(Illustrate):
    """Draws. The pictures of a planned draft are those that `make` draws for it, byte for byte."""

    implementation: ClassVar[str] = "draw"
    options_type: ClassVar[type[IllustrateOptions]] = DrawOptions
    styles: ClassVar[tuple[Style, ...]] = get_args(Style)

    def __init__(self, tools: Tools, options: DrawOptions) -> None:
        super().__init__(tools, options)
        size = SIZES["small"].model_copy(update={"image_pixels": options.pixels})
        self._settings = Settings(seed=tools.root_seed, size_name="small", size=size)
        self._versions = generator_versions()
        self._drawn: dict[tuple[str, int], Picture] = {}
        self._held_bytes = 0

    def source_identity(self) -> Mapping[str, Any]:
        """Versions of the art, of the code that draws, and the hash of the facts."""
        versions = {"pictures": pictures.VERSION, "illustrate": illustrate.VERSION}
        return {"packages": self._versions, "versions": versions, "taxonomy": self.tools.taxonomy.hash}

    @cached_property
    def _things(self) -> dict[str, Thing]:
        """Name or alias -> object that can be drawn; photographs are for planned drafts only."""
        drawn = [thing for thing in self.tools.taxonomy.things.values() if isinstance(thing, Thing)]
        aliases = {alias: thing for thing in drawn for alias in getattr(thing, "aliases", ())}
        return aliases | {thing.name: thing for thing in drawn}

    async def find(self, request: PictureRequest) -> Found:
        """The drawing. Raises NoPicture if the taxonomy has nothing of that name."""
        order = self._order(request)
        picture = await asyncio.to_thread(self._draw, order, is_shared=request.planned is not None)
        return self._found(order, picture)

    def _order(self, request: PictureRequest) -> PictureOrder:
        if request.planned is not None:
            slug, side, variant = request.planned
            order = illustrate.picture_order(
                self.tools.taxonomy, self._settings, slug, side=side, variant=variant, style=request.style
            )
            if request.round == 1:
                return order
            return replace(order, name=f"{order.name}/again", seed=request.seed)
        name = best_name(request.object, self._things)
        if name is None:
            raise NoPicture(f"nothing draws {request.object!r}")
        return PictureOrder(name, self._things[name], self.options.pixels, request.seed)

    def _draw(self, order: PictureOrder, *, is_shared: bool) -> Picture:
        """Many drafts share a drawing, so each of theirs is drawn once a run, as far as memory is set aside for it."""
        key = (order.name, order.seed)
        picture = self._drawn.get(key)
        if picture is None:
            picture = illustrate.draw(order)
            if is_shared and self._held_bytes < MAX_HELD_BYTES:
                self._drawn[key] = picture
                self._held_bytes += len(picture.png)
        return picture

    def _found(self, order: PictureOrder, picture: Picture) -> Found:
        """The drawing with the provenance that `make` writes."""
        taxonomy, subject = self.tools.taxonomy, order.subject
        source: dict[str, Any]
        if isinstance(subject, Thing):
            source = {"kind": "drawn", "generator": drawing_generator(order, self._versions)}
            licence, attribution = OPENMOJI_LICENCE, OPENMOJI_ATTRIBUTION
        else:
            generator = f"{subject.package} {self._versions[subject.package]}: {subject.file}"
            source = {"kind": "packaged", "generator": generator}
            licence, attribution = subject.licence, subject.attribution
        return Found(
            picture,
            ImageSource(**source, seed=order.seed),
            licence=licence,
            attribution=attribution,
            visible_harm=taxonomy.class_by_id[taxonomy.class_of[subject.slug]].visible_harm,
        )
