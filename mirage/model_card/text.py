"""Text of others in a Markdown card: no HTML, no links or pictures of theirs, no broken tables, no machine paths."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_COMMENT = re.compile(r"<!--.*?(-->|$)", re.DOTALL)
_TAG = re.compile(r"<[/!?]?[A-Za-z][^>]*>", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
_SPECIAL = re.compile(r"([\\|`*\[\]])")
# Addresses inside settings: of servers that only one place can reach.
_ADDRESS_KEYS = ("base_url", "url", "host")


def strip_html(text: str) -> str:
    """The text without comments and tags; what is left of `<` and `>` is shown as such."""
    return _TAG.sub("", _COMMENT.sub("", text)).replace("<", "&lt;").replace(">", "&gt;")


def plain(value: Any) -> str:
    """One line of plain text that Markdown shows as it is, inside a table too."""
    text = " ".join(_CONTROL.sub("", str(value)).split())
    return _SPECIAL.sub(r"\\\1", strip_html(text))


def code(value: Any) -> str:
    """A code span of one line, inside a table too."""
    text = " ".join(_CONTROL.sub("", str(value)).split())
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`" if text else ""


def count(value: float | None) -> str:
    """A number with separators, or that it was not recorded."""
    return "not recorded" if value is None else f"{value:,.0f}"


def without_paths(value: Any) -> Any:
    """Settings as they may leave the machine: absolute paths by their last part, servers without their address."""
    if isinstance(value, dict):
        return {
            key: "(a server)" if key in _ADDRESS_KEYS and isinstance(item, str) else without_paths(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return name_of_path(value) if isinstance(value, str) and _is_absolute(value) else value


def name_of_path(path: str | os.PathLike[str]) -> str:
    """The last part of a path: a name, not a place."""
    text = os.fspath(path).rstrip("/\\")
    return PureWindowsPath(text).name if "\\" in text else PurePosixPath(text).name


def _is_absolute(text: str) -> bool:
    return text.startswith(("/", "~")) or bool(re.match(r"[A-Za-z]:[\\/]", text))
