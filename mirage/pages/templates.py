"""Templates of the pages: escaped, strict about names, and in a sandbox."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment


def page_template(
    source: str, *, filters: Mapping[str, Callable[..., Any]] | None = None, trim: bool = False
) -> Template:
    """A template whose values are escaped and whose unknown names are errors; values cannot reach into Python.

    `trim` takes away the line of a statement that stands alone.
    """
    environment = SandboxedEnvironment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=trim, lstrip_blocks=trim, keep_trailing_newline=not trim
    )
    environment.filters.update(filters or {})
    return environment.from_string(source)
