"""A reviewed dataset: the rows that a person's decisions leave, as a dataset folder of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.assemble import pictures_of
from data_gen.publish import OWN_KEYS, Progress, no_progress, write_dataset
from data_gen.review import Reviewed, apply_decisions, read_decisions
from data_gen.stages import export
from data_gen.store import MANIFEST_FILE, build_lock, open_build_folder, publish, read_manifest
from mirage.data.row import canonical_json
from mirage.data.sources import read_rows
from mirage.errors import UserError
from mirage.files import file_sha256


@dataclass(frozen=True)
class ReviewedDataset:
    """What was published, and how the decisions changed the rows."""

    manifest: dict[str, Any]
    reviewed: Reviewed


def publish_reviewed(
    folder: Path, decisions_file: Path, target: Path, *, progress: Progress = no_progress
) -> ReviewedDataset:
    """Write the dataset `folder` without its rejected rows, and without their siblings, as the new folder `target`.

    Raises UserError if `target` exists, if the decisions are about another dataset, or if no row is left.
    """
    if target.exists():
        raise UserError(f"{target} exists; name another folder for the reviewed dataset")
    manifest = read_manifest(folder)
    decisions = read_decisions(decisions_file)
    reviewed = apply_decisions(list(read_rows(folder)), decisions, where=str(decisions_file))
    if not reviewed.kept:
        raise UserError(f"{decisions_file} rejects every row of {folder}; nothing is written")
    review = {
        "of": manifest["content_sha256"],
        "decisions_sha256": file_sha256(decisions_file),
        "accepted": sum(decision.status == "accepted" for decision in decisions.values()),
        "rejected": len(reviewed.rejected),
        "rejected_with_their_sibling": len(reviewed.orphaned),
    }
    kept = {name: value for name, value in manifest.items() if name not in OWN_KEYS} | {"review": review}
    with build_lock(target):
        build = open_build_folder(target, key=hashlib.sha256(canonical_json(kept).encode()).hexdigest())
        pictures = pictures_of(reviewed.kept)
        for path in progress(pictures, "linking pictures", len(pictures)):
            build.link_file(folder / path, path)
        written = write_dataset(
            build,
            reviewed.kept,
            readme=(folder / "README.md").read_text("utf-8") + _card_section(review),
            description=kept,
            figures={"counts": export.count_rows(reviewed.kept)},
            progress=progress,
        )
        publish(build, target, keep={MANIFEST_FILE, *written["files"]})
    return ReviewedDataset(written, reviewed)


def _card_section(review: dict[str, Any]) -> str:
    return (
        "\n## Review\n\n"
        f"A person accepted {review['accepted']} rows and rejected {review['rejected']}; "
        f"{review['rejected_with_their_sibling']} benign siblings went with their risky rows. The tables above count "
        "the rows before the review; `manifest.json` counts those that are left.\n"
    )
