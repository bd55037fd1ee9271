"""Seeds from files: texts and pictures to start from, each with where it comes from and under which licence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_gen.blobs import Blobs
from data_gen.illustrators.decode import decode_picture, read_picture_bytes
from data_gen.pipeline import SeedFile
from data_gen.sample import Seed
from data_gen.stages.licences import UNKNOWN_ATTRIBUTIONS, UNKNOWN_LICENCES
from mirage.config.keys import nearest_word
from mirage.data.row import canonical_json
from mirage.errors import UserError
from mirage.safe_paths import leads_outside, stays_inside
from mirage.strict_json import read_json, read_json_lines

MAX_EDGE_PIXELS = 1536  # of a stored seed picture; more tells a vision model nothing and costs tokens
MAX_SHOWN = 10
MAX_TEXT_CHARACTERS = 20_000


class SeedEntry(BaseModel):
    """One seed as a file words it: a text, a picture, or both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | None = Field(default=None, min_length=1)
    text: str = Field(default="", max_length=MAX_TEXT_CHARACTERS)
    image: str | None = Field(default=None, min_length=1, description="path inside the file's folder")
    category: str | None = None
    sub_category: str | None = None
    source: str | None = Field(default=None, min_length=1)
    licence: str | None = Field(default=None, min_length=1)
    attribution: str | None = Field(default=None, min_length=1)


def read_seeds(files: Sequence[SeedFile], *, folder: Path, blobs: Blobs, limit: int | None = None) -> tuple[Seed, ...]:
    """The seeds of all files, in order; their pictures are put into the blob store as plain PNG.

    Relative paths start from `folder`. Raises UserError naming every file and line that is wrong (up to ten).
    """
    seeds: dict[str, Seed] = {}
    places: dict[str, str] = {}
    problems: list[str] = []
    for file in files:
        for place, entry in _entries(folder / file.path):
            if limit is not None and len(seeds) >= limit:
                break
            try:
                seed = _seed(entry, file, folder=(folder / file.path).parent, blobs=blobs)
            except (UserError, ValidationError) as error:
                problems.append(f"{place}: {_explained(error)}")
                continue
            if seed.id in seeds:
                problems.append(f"{place}: the seed {seed.id!r:.80} is given already, at {places[seed.id]}; remove one")
                continue
            seeds[seed.id], places[seed.id] = seed, place
    if problems:
        more = f"\n  (and {len(problems) - MAX_SHOWN} more)" if len(problems) > MAX_SHOWN else ""
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''} in the seeds"
        raise UserError("\n  ".join([count, *problems[:MAX_SHOWN]]) + more)
    if not seeds:
        raise UserError(f"{', '.join(str(file.path) for file in files)}: there is no seed in it")
    return tuple(seeds.values())


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, plain data) of each seed: the items of a JSON list, or the lines of a JSONL file."""
    if path.suffix == ".json":
        items = read_json(path, remedy="mend the seeds")
        if not isinstance(items, list):
            raise UserError(f"seeds {path}: must be a JSON list of seeds")
        yield from ((f"{path} item {number}", item) for number, item in enumerate(items, 1))
        return
    for number, value in read_json_lines(path, remedy="mend the seed"):
        yield f"{path}:{number}", value


def _seed(entry: Any, file: SeedFile, *, folder: Path, blobs: Blobs) -> Seed:
    if not isinstance(entry, dict):
        raise UserError(f'a seed is an object like {{"text": ...}}, found {type(entry).__name__}')
    seed = SeedEntry.model_validate(entry)
    if not seed.text.strip() and seed.image is None:
        raise UserError("a seed needs text, image or both")
    origin = {name: getattr(seed, name) or getattr(file, name) for name in ("source", "licence", "attribution")}
    missing = [name for name, value in origin.items() if value is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: give it with the seed, or for the whole file in the pipeline")
    for name, unknown in (("licence", UNKNOWN_LICENCES), ("attribution", UNKNOWN_ATTRIBUTIONS)):
        if (origin[name] or "").strip().lower() in unknown:
            raise UserError(f"{name} {origin[name]!r} tells nothing, and no row is written without one; find it out")
    image = None if seed.image is None else _store_picture(seed.image, folder=folder, blobs=blobs)
    return Seed(
        id=seed.id or hashlib.sha256(canonical_json([seed.text, image]).encode()).hexdigest()[:16],
        kind="text" if image is None else "image",
        text=seed.text,
        image=image,
        category=seed.category,
        sub_category=seed.sub_category,
        **origin,
    )


def _store_picture(name: str, *, folder: Path, blobs: Blobs) -> str:
    """Put a seed's picture into the store; returns its content hash. Raises UserError for a path outside `folder`."""
    path = folder / name
    if not stays_inside(name) or leads_outside(path, folder):
        raise UserError(f"image {name!r:.200} lies outside the folder of the seed file; copy it there")
    content = read_picture_bytes(path, where=f"image {name!r:.200}")
    stored = blobs.put(decode_picture(content, where=f"image {name!r:.200}", max_edge_pixels=MAX_EDGE_PIXELS).png)
    return PurePosixPath(stored).stem


def _explained(error: UserError | ValidationError) -> str:
    if isinstance(error, UserError):
        return str(error)
    parts = []
    for item in error.errors(include_url=False):
        key = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            near = nearest_word(key, list(SeedEntry.model_fields))
            hint = f"did you mean {near}?" if near else f"a seed has {', '.join(SeedEntry.model_fields)}"
            parts.append(f"{key}: unknown key; {hint}")
        else:
            parts.append(f"{key}: {item['msg'][:1].lower()}{item['msg'][1:]}, found {item['input']!r:.60}")
    return "; ".join(parts)
