"""Which names the panels of a dashboard's definition ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PREFIXES = ("train/", "eval/", "select/", "data/", "samples/")


def panels_of(definition: Any) -> Iterator[dict[str, Any]]:
    """Every panel of a workspace or report, wherever it stands."""
    if isinstance(definition, dict):
        if "viewType" in definition and "config" in definition:
            yield definition
        for value in definition.values():
            yield from panels_of(value)
    elif isinstance(definition, list):
        for value in definition:
            yield from panels_of(value)


def asked_names(definition: Any) -> tuple[set[str], set[str]]:
    """(names, regular expressions of names) of all panels."""
    names: set[str] = set()
    patterns: set[str] = set()
    for panel in panels_of(definition):
        config = panel["config"]
        patterns |= {config["metricRegex"]} if config.get("metricRegex") else set()
        for text in _texts({key: value for key, value in config.items() if "itle" not in key}):
            bare = text.removeprefix("summary:").removeprefix("summary_metrics.")
            if bare.startswith(PREFIXES):
                names.add(bare)
    return names - patterns, patterns


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
