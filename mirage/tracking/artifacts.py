"""What wandb keeps as versioned artifacts: the dataset, the base model, checkpoints and results, as small cards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mirage.files import file_sha256, read_object
from mirage.safe_paths import is_file, leads_outside
from mirage.tracking.redact import redact

Detail = Literal["card", "files"]
CARD_FILE = "card.json"
_NAME_CHARS = re.compile(r"[^A-Za-z0-9_.-]+")
# A folder of pictures is named by its other files: its manifest or index says which pictures there are.
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MAX_FILES = 100
# Larger ones are counted by size alone: a card is written while a GPU waits.
_MAX_HASHED_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class ArtifactCard:
    """One artifact before wandb sees it: `card.json` with `metadata`, files beside it, names of local files."""

    kind: Literal["dataset", "model", "results"]
    name: str
    metadata: dict[str, Any]
    files: tuple[tuple[str, Path], ...] = ()
    references: tuple[tuple[str, Path], ...] = ()
    """Files that stay where they are; the artifact says where that is."""
    aliases: tuple[str, ...] = ()
    left_out: tuple[str, ...] = field(default=())

    @property
    def note(self) -> str | None:
        """What was left out for size, in one line."""
        if not self.left_out:
            return None
        return (
            f"artifact {self.name}: left out for their size: {', '.join(self.left_out)} (tracking.artifacts.max_bytes)"
        )


def dataset_card(folder: Path, *, detail: Detail, max_bytes: int) -> ArtifactCard:
    """A dataset folder, or one file of data: what its manifest says, and size and hash of its own files."""
    own = sorted(path for path in folder.iterdir() if is_file(path)) if folder.is_dir() else [folder]
    # A dataset of others may hold links; what they lead to is no part of it.
    own = [path for path in own if path == folder or not leads_outside(path, folder)]
    own = [path for path in own if not path.name.startswith(".") and path.suffix.lower() not in _PICTURES][:MAX_FILES]
    manifest = read_object(folder / "manifest.json") if folder / "manifest.json" in own else {}
    wanted = [path for path in own if path.name in ("manifest.json", "README.md")] if detail == "files" else []
    files, left_out = _within(((path.name, path) for path in wanted), max_bytes)
    kept = ("kind", "schema_version", "content_sha256", "code_version", "counts", "licences", "taxonomy_sha256")
    metadata = {
        "folder": folder.name,
        "manifest": {key: manifest[key] for key in kept if key in manifest},
        "files": {path.name: _size_and_hash(path) for path in own},
    }
    references = tuple((path.name, path) for path in own if path.name not in dict(files))
    return ArtifactCard("dataset", f"dataset-{_slug(folder.name)}", metadata, files, references, left_out=left_out)


def base_card(folder: Path, *, name: str) -> ArtifactCard:
    """The model that training starts from: its configuration, and names and sizes of its weights."""
    weights = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    metadata = {
        "name": name,
        "config": read_object(folder / "config.json"),
        "files": {path.name: {"num_bytes": path.stat().st_size} for path in weights},
    }
    files = tuple((path.name, path) for path in weights if path.name == "config.json")
    return ArtifactCard("model", f"base-{_slug(name)}", metadata, files)


def checkpoint_card(checkpoint: Path, *, run_id: str, detail: Detail, max_bytes: int) -> ArtifactCard | None:
    """A finished checkpoint: step, fingerprint and hash of every file; None for one that was never finished."""
    ready = read_object(checkpoint / "READY")
    if "step" not in ready:
        return None
    model = sorted(path for path in (checkpoint / "model").rglob("*") if path.is_file())
    named = [(path.relative_to(checkpoint).as_posix(), path) for path in model]
    files, left_out = _within(named, max_bytes) if detail == "files" else ((), ())
    metadata = {
        "step": ready["step"],
        "fingerprint": ready.get("fingerprint"),
        "files": {name: {"sha256": value} for name, value in ready.get("files", {}).items()},
    }
    references = tuple((name, path) for name, path in named if name not in dict(files))
    alias = f"step-{int(ready['step']):06d}"
    return ArtifactCard(
        "model", f"checkpoint-{run_id}", metadata, files, references, aliases=(alias, "latest"), left_out=left_out
    )


def results_card(
    folder: Path, *, run_id: str, step: int, metadata: Mapping[str, Any], detail: Detail, max_bytes: int
) -> ArtifactCard:
    """An evaluation: its numbers in the card; results.json, guards.json and samples.jsonl as files."""
    names = ("results.json", "guards.json", "samples.jsonl")
    own = [(name, folder / name) for name in names if (folder / name).is_file()]
    files, left_out = _within(own, max_bytes) if detail == "files" else ((), ())
    references = tuple((name, path) for name, path in own if name not in dict(files))
    alias = f"step-{step:06d}"
    return ArtifactCard(
        "results",
        f"results-{run_id}",
        {"step": step, **metadata},
        files,
        references,
        aliases=(alias, "latest"),
        left_out=left_out,
    )


def make_artifact(card: ArtifactCard) -> Any:
    """The `wandb.Artifact` of a card; its digest depends on its content and on where referenced files lie."""
    import wandb

    metadata = redact({**card.metadata, "left_out": list(card.left_out)})
    artifact = wandb.Artifact(card.name, card.kind, metadata=metadata)
    with artifact.new_file(CARD_FILE, encoding="utf-8") as file:
        file.write(json.dumps(metadata, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    for name, path in card.files:
        artifact.add_file(str(path), name=name)
    for name, path in card.references:
        # Without a checksum: the card has the hashes, and reading gigabytes again would hold up the training.
        artifact.add_reference(path.resolve().as_uri(), name=name, checksum=False)
    return artifact


def _within(files: Iterable[tuple[str, Path]], max_bytes: int) -> tuple[tuple[tuple[str, Path], ...], tuple[str, ...]]:
    """The files that fit, the smallest first, and the names of the others."""
    kept: list[tuple[str, Path]] = []
    left_out: list[str] = []
    room = max_bytes
    for name, path in sorted(files, key=lambda item: (item[1].stat().st_size, item[0])):
        size = path.stat().st_size
        if size > room:
            left_out.append(name)
        else:
            kept.append((name, path))
            room -= size
    return tuple(sorted(kept)), tuple(sorted(left_out))


def _size_and_hash(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"num_bytes": size, "sha256": file_sha256(path) if size <= _MAX_HASHED_BYTES else None}


def _slug(name: str) -> str:
    return _NAME_CHARS.sub("-", name).strip("-.")[:100] or "data"
