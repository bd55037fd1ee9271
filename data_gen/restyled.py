"""A restyled dataset: a share of the training pictures in other colours, as a dataset folder of its own."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_gen.assemble import pictures_of
from data_gen.pictures import encode_picture
from data_gen.publish import OWN_KEYS, Progress, no_progress, write_dataset
from data_gen.stages import export
from data_gen.store import (
    MANIFEST_FILE,
    BuildFolder,
    StoredPicture,
    build_lock,
    open_build_folder,
    publish,
    read_manifest,
)
from mirage.data.picture_files import open_picture
from mirage.data.row import ImageRef, Row, canonical_json
from mirage.data.sources import read_rows
from mirage.data.styles import restyle
from mirage.errors import UserError

# What the names of the splits begin with whose pictures change.
TRAIN = "train"


@dataclass(frozen=True)
class RestyledDataset:
    """What was published, and how many of its training pictures have another style."""

    manifest: dict[str, Any]
    num_pictures: int
    num_restyled: int


def publish_restyled(
    folder: Path, target: Path, *, share: float, seed: int = 0, progress: Progress = no_progress
) -> RestyledDataset:
    """Write the dataset `folder` with `share` of its training pictures restyled as the new folder `target`.

    A picture changes in every row that shows it, so that a risky row and its benign twin still share it. Pictures that
    a row outside of training shows stay as they are. Raises UserError if `target` exists or `share` is no share.
    """
    if target.exists():
        raise UserError(f"{target} exists; name another folder for the restyled dataset")
    if not 0 < share <= 1:
        raise UserError(f"the share of pictures to restyle must be above 0 and at most 1, found {share:g}")
    manifest = read_manifest(folder)
    rows = list(read_rows(folder))
    description = {key: value for key, value in manifest.items() if key not in OWN_KEYS}
    description["restyled"] = {"of": manifest["content_sha256"], "share": share, "seed": seed}
    trained = {image.path for row in rows if row.split.startswith(TRAIN) for image in row.images}
    trained -= {image.path for row in rows if not row.split.startswith(TRAIN) for image in row.images}
    chosen = [path for path in sorted(trained) if random.Random(f"{seed} {path}").random() < share]
    with build_lock(target):
        build = open_build_folder(target, key=hashlib.sha256(canonical_json(description).encode()).hexdigest())
        styled = {
            path: _restyled(build, folder, path, seed=seed)
            for path in progress(chosen, "restyling pictures", len(chosen))
        }
        # A grey drawing in grey is the same file: nothing of it has changed.
        styled = {path: found for path, found in styled.items() if found.path != path}
        changed = [_with_pictures(row, styled) for row in rows]
        for path in pictures_of(changed):
            if not (build.path / path).exists():
                build.link_file(folder / path, path)
        written = write_dataset(
            build,
            changed,
            readme=(folder / "README.md").read_text("utf-8") + _card_section(len(styled), len(trained)),
            description=description,
            figures={"counts": export.count_rows(changed)},
            progress=progress,
        )
        publish(build, target, keep={MANIFEST_FILE, *written["files"]})
    return RestyledDataset(written, len(trained), len(styled))


def _restyled(build: BuildFolder, folder: Path, path: str, *, seed: int) -> StoredPicture:
    """The picture's restyled form, which is drawn unless an earlier, killed build has drawn it."""
    stored = build.picture(path)
    if stored is None:
        picture = restyle(open_picture(folder / path), random.Random(f"{seed} style {path}"))
        stored = build.add_picture(path, encode_picture(picture))
    return stored


def _with_pictures(row: Row, styled: Mapping[str, StoredPicture]) -> Row:
    return row.model_copy(
        update={"images": tuple(_with_picture(image, styled.get(image.path)) for image in row.images)}
    )


def _with_picture(image: ImageRef, styled: StoredPicture | None) -> ImageRef:
    if styled is None:
        return image
    source = image.source.model_copy(update={"generator": f"{image.source.generator}, restyled"})
    # The share-alike licences ask that a change be told.
    attribution = f"{image.attribution}; colours changed"
    return image.model_copy(update={**asdict(styled), "source": source, "attribution": attribution})


def _card_section(num_restyled: int, num_pictures: int) -> str:
    return (
        "\n## Styles\n\n"
        f"{num_restyled} of the {num_pictures} training pictures are in other colours than they were drawn in: grey, "
        "exchanged channels, few tones or washed out.\n"
    )
