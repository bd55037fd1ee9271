"""Publish: finished rows become a dataset folder's files and manifest; shared by the offline and the run builds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, TypeVar

from data_gen.stages import export
from data_gen.store import MANIFEST_FILE, BuildFolder, manifest_sha256
from mirage.data.row import Row, canonical_json

KIND = "mirage-dataset"
# What a folder's own rows and files decide; everything else in a manifest says how the rows were made.
OWN_KEYS = ("files", "content_sha256", "code_version", "counts")
Item = TypeVar("Item")
Progress = Callable[[Iterable[Item], str, int], Iterator[Item]]


def no_progress(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """The items, with nothing shown."""
    yield from items


def write_dataset(
    build: BuildFolder,
    rows: Sequence[Row],
    *,
    readme: str,
    description: Mapping[str, Any],
    figures: Mapping[str, Any],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write rows, card, published layout and manifest beside the pictures, which are there; returns the manifest.

    `description` says what the folder is made from, `figures` what is in it. The manifest is written last.
    """
    texts = {"rows.jsonl": export.rows_jsonl(rows), "README.md": readme}
    published = export.export_mis([row for row in rows if fits_published_layout(row)])
    texts |= published.texts
    files = {image.path: image.sha256 for row in rows for image in row.images}
    for relative, content in progress(texts.items(), "writing files", len(texts)):
        build.write_text(relative, content)
        files[relative] = hashlib.sha256(content.encode("utf-8")).hexdigest()
    links = published.links
    for relative, source in progress(links.items(), "linking the published layout", len(links)):
        build.link_picture(source, relative)
        files[relative] = files[source]
    manifest = {
        **description,
        "code_version": metadata.version("mirage-vlm"),
        **figures,
        "files": dict(sorted(files.items())),
    }
    manifest["content_sha256"] = manifest_sha256(manifest)
    build.write_text(MANIFEST_FILE, canonical_json(manifest) + "\n")
    return manifest


def fits_published_layout(row: Row) -> bool:
    """Whether the published layout can hold the row: its test files have two pictures a record."""
    return row.split not in export.MIS_TESTS or len(row.images) == 2
