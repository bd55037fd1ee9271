"""`--help`: the tree of recipe keys with types, values and one sentence each, in the terminal."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from mirage.config.keys import ANY_INDEX
from mirage.config.loader import list_recipes
from mirage.config.schema import Recipe
from mirage.config.values import describe_field, format_value, is_section, item_type, strip_optional
from mirage.tracking.terminal_text import SafeConsole

USAGE = "recipe=NAME [key.sub=value ...]"
RULES = "Values are read by the key's type. A list: a,b or [a, b]. No value: null. All mistakes are reported at once."


def print_schema(recipe: Recipe | None = None, *, console: Console | None = None) -> None:
    """Print every key with its value (of `recipe`, else the default), its type and what it means."""
    console = console or SafeConsole(highlight=False)
    console.print(Text.assemble(("Usage: ", "bold"), USAGE))
    console.print(Text(RULES))
    _print_section(console, Recipe, recipe, "")
    console.print(Text("\nRecipes", style="bold"))
    for name, comment in list_recipes().items():
        console.print(Text.assemble((name, "cyan")))
        console.print(Padding(Text(comment, style="dim"), (0, 0, 0, 4)))


def _print_section(console: Console, kind: type[BaseModel], values: Any, prefix: str) -> None:
    for name, field in kind.model_fields.items():
        inner, optional = strip_optional(field.annotation)
        value = getattr(values, name) if values is not None else None
        key = f"{prefix}{name}"
        item = item_type(inner)
        if is_section(inner):
            note = "  (null unless a key of it is given)" if optional and value is None else ""
            console.print(Text.assemble(("\n" + key, "bold"), f"  {_first_line(inner)}{note}"))
            _print_section(console, inner, value, f"{key}.")
        elif item is not None and is_section(item):
            shown = "" if values is None else f" = {format_value(value)}"
            console.print(
                Text.assemble(("\n" + key, "bold"), f"{shown}  {field.description} Each: {_first_line(item)}")
            )
            _print_section(console, item, None, f"{key}.{ANY_INDEX}.")
        else:
            shown = _default(field) if values is None else format_value(value)
            console.print(Text.assemble((key, "cyan"), f" = {shown}", (f"   {describe_field(field)}", "dim")))
            console.print(Padding(Text(" ".join((field.description or "").split()), style="dim"), (0, 0, 0, 4)))


def _default(field: FieldInfo) -> str:
    return "(required)" if field.is_required() else format_value(field.get_default(call_default_factory=True))


def _first_line(kind: type[BaseModel]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0] if kind.__doc__ else ""
