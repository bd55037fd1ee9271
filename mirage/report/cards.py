"""What a figure rests on, as the run recorded it: data, recipe, environment; and the dataset's card where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mirage.errors import UserError
from mirage.model_card.datasets import locate
from mirage.report.run_folder import Run, read_object
from mirage.tracking.redact import redact

_MAX_CARD_CHARS = 60_000
# Groups of the summary that say what a run ran on, with what.
_ENVIRONMENT = ("hardware/", "versions/", "kernels/")


@dataclass(frozen=True)
class Facts:
    """A table of names and values, and texts to unfold."""

    title: str
    rows: tuple[tuple[str, str], ...]
    texts: tuple[tuple[str, str], ...] = ()
    note: str = ""


def data_card(run: Run) -> Facts:
    """Rows and tokens by source as trained on, hashes, and the dataset folder's own card if it is still there."""
    rows = []
    data = run.recipe.get("data")
    named = data.get("dir") if isinstance(data, dict) else None
    if named:
        rows.append(("dataset folder (data.dir)", str(named)))
    for key, value in run.summary.items():
        if key.startswith("data/"):
            rows.append((key.removeprefix("data/").replace("/", ": ").replace("_", " "), _text(value)))
    rows.append(("hash of the test data (data_sha256)", run.last.results.data_sha256))
    folder = find_dataset(run)
    if folder is None:
        note = "The dataset folder is not where the recipe says; only what the run recorded is shown." if named else ""
        return Facts("Data", tuple(rows), note=note)
    manifest = _manifest(folder)
    rows += [(f"manifest: {name}", _text(manifest[name])) for name in _plain_keys(manifest)]
    for name, value in (manifest.get("counts") or {}).items() if isinstance(manifest.get("counts"), dict) else ():
        if isinstance(value, int | str):
            rows.append((f"manifest: {name.replace('_', ' ')}", _text(value)))
        elif isinstance(value, dict) and all(isinstance(item, int) for item in value.values()):
            rows.append((f"manifest: {name.replace('_', ' ')}", ", ".join(f"{k} {v:,}" for k, v in value.items())))
    return Facts("Data", tuple(rows), _card_text(folder))


def find_dataset(run: Run) -> Path | None:
    """The dataset folder: as the recipe has it, or from the folder that the run was started in."""
    data = run.recipe.get("data")
    named = data.get("dir") if isinstance(data, dict) else None
    if not isinstance(named, str) or not named:
        return None
    own = run.recipe.get("run_dir")
    place = locate(named, run_dir=run.folder, recorded_run_dir=own if isinstance(own, str) else None)
    return place if (place / "manifest.json").is_file() else None


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "manifest.json")
    except UserError as error:
        return {"unreadable": str(error)}


def _plain_keys(manifest: Mapping[str, Any]) -> list[str]:
    return [name for name, value in manifest.items() if isinstance(value, str | int | float) and value != ""]


def _card_text(folder: Path) -> tuple[tuple[str, str], ...]:
    card = folder / "README.md"
    try:
        text = card.read_text("utf-8", errors="replace")
    except OSError:
        return ()
    return (("The dataset's own card", text[:_MAX_CARD_CHARS]),)


def recipe_card(run: Run) -> Facts:
    """The resolved recipe as YAML, secrets hidden."""
    if not run.recipe:
        return Facts("Recipe", (), note="This folder has no recipe.")
    text = yaml.safe_dump(run.recipe, sort_keys=True, allow_unicode=True, default_flow_style=False, width=110)
    return Facts("Recipe", (), (("The whole recipe, resolved", text),))


def recipe_differences(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...]]]:
    """The keys in which recipes differ, with each run's value."""
    flat = [_flat(run.recipe) for run in runs]
    names = dict.fromkeys(name for recipe in flat for name in recipe)
    found = []
    for name in sorted(names):
        values = tuple(_text(recipe[name]) if name in recipe else "-" for recipe in flat)
        if len(set(values)) > 1 and name not in ("name", "run_dir"):
            found.append((name, values))
    return found


def environment_card(run: Run) -> Facts:
    """Kernels, hardware, versions, precision, judge and decoding, as they were recorded."""
    rows = [
        (key.replace("/", ": ", 1), _text(value)) for key, value in run.summary.items() if key.startswith(_ENVIRONMENT)
    ]
    state = _state(run)
    if "world_size" in state:
        rows.append(("processes", _text(state["world_size"])))
    if "recipe_hash" in state:
        rows.append(("recipe hash", _text(state["recipe_hash"])))
    results = run.last.results
    rows += [
        ("weights measured", f"{results.checkpoint}, fingerprint {results.fingerprint}"),
        ("judge", f"{results.judge.name}-v{results.judge.version}"),
        *((f"prompt of {name}", digest) for name, digest in results.judge.prompts.items()),
    ]
    for title, part in (("decoding", results.decoding), ("preprocessing", results.preprocessing)):
        rows += [(f"{title}: {name}", _text(value)) for name, value in part.model_dump(mode="json").items()]
    rows += _recorded_by_wandb(run)
    rows.append(("report made by", f"mirage {_version()}"))
    return Facts("Environment", tuple(rows))


def _version() -> str:
    import mirage

    return mirage.__version__


def _state(run: Run) -> dict[str, Any]:
    """Of the newest checkpoint that can be resumed."""
    for path in sorted(run.folder.glob("checkpoint-*/resume/state.json"), reverse=True):
        return read_object(path)
    return {}


def _recorded_by_wandb(run: Run) -> list[tuple[str, str]]:
    """What wandb wrote down of system, program and code, where it did; secrets hidden."""
    found = []
    for path in sorted(run.folder.glob("wandb/*run-*/files/wandb-metadata.json"))[-1:]:
        known = redact(read_object(path))
        for name in ("os", "program", "args", "git"):
            if known.get(name):
                found.append((f"wandb: {name.replace('_', ' ')}", _text(known[name])))
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value) if value != "" else "(empty)"
