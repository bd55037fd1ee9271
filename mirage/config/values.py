"""Text to value by the type of a recipe's field: `1e-5`, `no`, `010`, `a,b`, `null` mean what the field says."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NULL_WORDS = ("null", "Null", "NULL", "~")
TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
_RANGE_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class Scalar:
    """One value as written. `quoted` text is never null, whatever it says."""

    text: str
    quoted: bool = False

    @property
    def is_null(self) -> bool:
        return not self.quoted and self.text in NULL_WORDS


def strip_optional(annotation: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), any other type as (type, False)."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [argument for argument in get_args(annotation) if argument is not types.NoneType]
        if len(inner) == 1:
            return inner[0], True
    return annotation, False


def is_section(annotation: Any) -> bool:
    """Whether the type is a part of the tree with keys of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def item_type(annotation: Any, index: int = 0) -> Any | None:
    """Type of item `index` of a `tuple[X, ...]` or `tuple[X, Y]`; None when the type is no list or too short."""
    if get_origin(annotation) is not tuple:
        return None
    arguments = get_args(annotation)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return arguments[index] if index < len(arguments) else None


def fixed_length(annotation: Any) -> int | None:
    """Number of items of a `tuple[X, Y]`, None for lists of any length."""
    arguments = get_args(annotation)
    return None if len(arguments) == 2 and arguments[1] is Ellipsis else len(arguments)


def parse_scalar(scalar: Scalar, annotation: Any, *, wanted: str | None = None) -> Any:
    """The value of `scalar` for a field of type `annotation` (no list, no section).

    Raises `ValueError` with the end of a sentence that begins with the key: "must be ...". `wanted` says what the
    field takes, in place of the type alone.
    """
    kind, optional = strip_optional(annotation)
    wanted = wanted or describe_type(annotation)
    if scalar.is_null:
        if optional:
            return None
        raise ValueError(f"must be {wanted}; it cannot be null")
    if optional and not scalar.quoted and scalar.text.lower() == "none":
        raise ValueError("write null for no value" + (', or "none" in quotes for the word' if kind is str else ""))
    if get_origin(kind) is Literal:
        return _parse_choice(scalar.text, kind, wanted)
    parser = _PARSERS.get(kind)
    if parser is None:
        raise TypeError(f"the recipe schema uses a type that the loader does not know: {annotation!r}")
    try:
        return parser(scalar.text)
    except ValueError:
        raise ValueError(f"must be {wanted}, found {scalar.text!r}") from None


def _parse_bool(text: str) -> bool:
    word = text.lower()
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    raise ValueError(text)


def _parse_int(text: str) -> int:
    # Decimal always: YAML 1.1 would read 010 as 8 and 3:30 as 210.
    return int(text.strip(), 10)


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _parse_text(text: str) -> str:
    # A command line's bytes that are no UTF-8 come as half surrogates, which no file of the run can hold.
    text.encode("utf-8")
    return text


def _parse_path(text: str) -> Path:
    _parse_text(text)
    if not text.strip() or "\0" in text:
        raise ValueError(text)
    return Path(text).expanduser() if text.startswith("~/") else Path(text)


_PARSERS: dict[Any, Callable[[str], Any]] = {
    bool: _parse_bool,
    int: _parse_int,
    float: _parse_float,
    str: _parse_text,
    Path: _parse_path,
}


def _parse_choice(text: str, kind: Any, wanted: str) -> Any:
    for choice in get_args(kind):
        if str(choice) == text:
            return choice
    raise ValueError(f"must be {wanted}, found {text!r}")


def describe_type(annotation: Any) -> str:
    """A type in plain words: `a number`, `one of bf16, fp32`, `a list of ...`, `... or null`."""
    kind, optional = strip_optional(annotation)
    suffix = " or null" if optional else ""
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return ("one of " + ", ".join(choices) if len(choices) > 1 else choices[0]) + suffix
    if get_origin(kind) is tuple:
        length, item = fixed_length(kind), item_type(kind)
        many = "a list of" if length is None else f"{length} items, each"
        return f"{many} {describe_type(item).removeprefix('a ')}{suffix}"
    if is_section(kind):
        return f"a section{suffix}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return names.get(kind, str(kind)) + suffix


def describe_field(field: FieldInfo) -> str:
    """Type and range of a schema field: `a number > 0`, `a whole number >= 1 or null`."""
    text = describe_type(field.annotation)
    ranges = [
        f"{sign} {format_value(limit)}" for name, sign in _RANGE_SIGNS if (limit := _limit(field, name)) is not None
    ]
    multiple = _limit(field, "multiple_of")
    ranges += [f"a multiple of {multiple}"] if multiple is not None else []
    if not ranges:
        return text
    base = text.removesuffix(" or null")
    joined = " and ".join(ranges).replace(" and a multiple", ", a multiple")
    return f"{base} {joined}{text[len(base) :]}"


def _limit(field: FieldInfo, name: str) -> Any | None:
    return next((getattr(item, name) for item in field.metadata if getattr(item, name, None) is not None), None)


def format_value(value: Any) -> str:
    """A value as one would write it in a recipe."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        # repr is exact; 1e-05 is written 1e-5 and 2.0 is written 2.
        text = repr(value).replace("e-0", "e-")
        return text.removesuffix(".0")
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{key}: {format_value(item)}" for key, item in value) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    return str(value)
