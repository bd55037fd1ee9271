"""What a card says of training data: each dataset folder's name, hash, licence and own card; each source's rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirage.config.yaml_tree import YamlError, parse_plain_yaml
from mirage.data.row import canonical_json
from mirage.files import file_sha256, read_object
from mirage.model_card.facts import DatasetFacts, SourceFacts
from mirage.model_card.text import name_of_path

_INDEX_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv")
# Larger index files would hold up the end of a run.
_MAX_HASHED_BYTES = 2 * 1024**3
_MAX_NOTES = 20
# Keys of a source that say how it is used and are not said elsewhere.
_SOURCE_SETTINGS = ("pictures", "answers", "max_samples", "share", "epochs", "seed", "weight")


def dataset_facts(path: Path, *, name: str) -> DatasetFacts:
    """A dataset folder, or a file of data. `name` alone where it is no longer there."""
    folder = path if path.is_dir() else path.parent
    front = front_matter(folder / "README.md")
    manifest = read_object(folder / "manifest.json") if path.is_dir() else {}
    sha256, hash_of = _content_hash(path, manifest)
    languages = front.get("language") or []
    attributions = manifest.get("licences") or {}
    return DatasetFacts(
        name=name,
        title=_text(front.get("pretty_name")),
        licence=_text(front.get("license")),
        languages=tuple(map(str, [languages] if isinstance(languages, str) else languages)),
        num_rows=_number((manifest.get("counts") or {}).get("rows")),
        sha256=sha256,
        hash_of=hash_of,
        attributions=tuple(f"{key}: {value}" for key, value in sorted(attributions.items()))[:_MAX_NOTES],
        limitations=tuple(map(str, manifest.get("limitations") or ()))[:_MAX_NOTES],
    )


def source_facts(
    source: Mapping[str, Any], *, path: Path, dataset: str, defaults: Mapping[str, Any], summary: Mapping[str, Any]
) -> SourceFacts:
    """One entry of `data.sources`, with what the run's summary counted of it."""
    name = source.get("name") or source.get("split") or "train"
    manifest = read_object(path / "manifest.json") if path.is_dir() else {}
    split = str(source.get("split") or "train")
    counts = ((manifest.get("counts") or {}).get("splits") or {}).get(split) or {}
    changed = {key: source[key] for key in _SOURCE_SETTINGS if key in source and source[key] != defaults.get(key)}
    return SourceFacts(
        name=str(name),
        dataset=dataset,
        split=split,
        format=str(source.get("format") or "rows"),
        settings=changed,
        num_rows=_number(summary.get(f"data/{name}/rows", summary.get("data/rows"))),
        num_tokens=_number(summary.get(f"data/{name}/tokens", summary.get("data/tokens"))),
        num_supervised_tokens=_number(
            summary.get(f"data/{name}/supervised_tokens", summary.get("data/supervised_tokens"))
        ),
        categories={str(key): int(value) for key, value in (counts.get("category") or {}).items()},
    )


def locate(named: str, *, run_dir: Path | None, recorded_run_dir: str | None) -> Path:
    """A path of the recipe as it is now: from here, or from the folder that the run was started in."""
    path = Path(named).expanduser()
    if path.is_absolute() or path.exists() or run_dir is None or not recorded_run_dir:
        return path
    parts = Path(recorded_run_dir).parts
    if Path(recorded_run_dir).is_absolute() or run_dir.absolute().parts[-len(parts) :] != parts:
        return path
    return Path(*run_dir.absolute().parts[: -len(parts)]) / named


def front_matter(card: Path) -> dict[str, Any]:
    """The metadata at the head of a card; empty where there is no card, or none that can be read."""
    try:
        text = card.read_text(encoding="utf-8")
        parts = text.split("---\n", 2)
        found = parse_plain_yaml(parts[1]) if text.startswith("---\n") and len(parts) == 3 else {}
    except (OSError, UnicodeDecodeError, YamlError):
        return {}
    return found if isinstance(found, dict) else {}


def dataset_name(named: str, path: Path) -> str:
    """What a dataset is called: its folder or file."""
    return name_of_path(named) or name_of_path(path.absolute()) or "data"


def _content_hash(path: Path, manifest: Mapping[str, Any]) -> tuple[str | None, str]:
    if manifest.get("content_sha256"):
        return str(manifest["content_sha256"]), "manifest"
    files = [path] if path.is_file() else sorted([*path.glob("*"), *path.glob("data/*")]) if path.is_dir() else []
    files = [file for file in files if file.is_file() and file.suffix.lower() in _INDEX_SUFFIXES]
    if not files:
        return None, "it is no longer there" if not path.exists() else "it has no index files"
    if sum(file.stat().st_size for file in files) > _MAX_HASHED_BYTES:
        return None, "its index files are too large to hash here"
    content = [[file.name, file_sha256(file)] for file in files]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest(), f"{len(files)} index files"


def _text(value: Any) -> str | None:
    return str(value) if value else None


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
