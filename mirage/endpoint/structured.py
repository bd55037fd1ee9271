"""Replies as data: what is asked for a schema, how JSON is found in a reply, and what a repair turn says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from mirage.strict_json import is_too_deep

Structured = Literal["json_schema", "json_object", "prompt"]
Model = TypeVar("Model", bound=BaseModel)

REPAIR_OPENING = "Your reply does not fit what was asked."
_MAX_ERRORS, _MAX_PROBLEM_CHARS = 12, 2000
_MAX_SCHEMA_DEPTH = 64
# Where an object begins: prose may hold braces of its own, such as {name}, which begin none.
_OBJECT_START = re.compile(r"\{\s*[\"}]")
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


class BadReply(ValueError):
    """A reply that is not the object asked for; the text says why, in words that the model can act on."""

    def __init__(self, problem: str, *, has_object: bool) -> None:
        super().__init__(problem)
        self.problem = problem[:_MAX_PROBLEM_CHARS]
        self.has_object = has_object


@lru_cache(maxsize=256)
def response_format(schema: type[BaseModel], mode: Structured) -> dict[str, Any] | None:
    """The request's `response_format`; None where JSON is asked for in words only."""
    if mode == "prompt":
        return None
    if mode == "json_object":
        return {"type": "json_object"}
    definition = strict_schema(schema)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", schema.__name__)[:64]
    return {
        "type": "json_schema",
        "json_schema": {"name": name, "schema": definition, "strict": _is_closed(definition)},
    }


@lru_cache(maxsize=256)
def instruction(schema: type[BaseModel]) -> str:
    """What is added to the prompt where the endpoint is not given the schema."""
    definition = json.dumps(strict_schema(schema), ensure_ascii=False, separators=(",", ":"))
    return f"\n\nReply with one JSON object that fits this JSON schema, and with nothing else:\n{definition}"


def repair_request(problem: str) -> str:
    """What the model is told about a reply that does not fit."""
    return f"{REPAIR_OPENING} {problem}\nReply again with the whole corrected JSON object, and with nothing else."


def strict_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema in the form that strict decoding takes (OpenAI, "Structured outputs").

    Objects are closed and require all their fields, defaults and titles are gone, and no `$ref` has neighbours.
    """
    definition = schema.model_json_schema()
    return _strict(definition, definition.get("$defs", {}), depth=0)


def _strict(node: Any, definitions: Mapping[str, Any], *, depth: int) -> Any:
    if depth > _MAX_SCHEMA_DEPTH:
        raise ValueError("the schema is nested too deeply for structured replies")
    if isinstance(node, list):
        return [_strict(item, definitions, depth=depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node and len(node) > 1:
        neighbours = {key: value for key, value in node.items() if key != "$ref"}
        node = {**definitions[node["$ref"].rsplit("/", 1)[1]], **neighbours}
    closed: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("properties", "$defs"):
            closed[key] = {name: _strict(item, definitions, depth=depth + 1) for name, item in value.items()}
        elif key in ("enum", "const", "required"):
            closed[key] = value
        elif key not in ("default", "title"):
            closed[key] = _strict(value, definitions, depth=depth + 1)
    if closed.get("type") == "object" and "properties" in closed:
        closed["required"] = list(closed["properties"])
        closed["additionalProperties"] = False
    return closed


def _is_closed(node: Any) -> bool:
    """Whether every object's fields are known; a mapping with free keys cannot be decoded strictly."""
    if isinstance(node, list):
        return all(_is_closed(item) for item in node)
    if not isinstance(node, dict):
        return True
    if node.get("type") == "object" and "properties" not in node:
        return False
    return all(_is_closed(value) for value in node.values())


def parse_reply(text: str, schema: type[Model]) -> Model:
    """The one object in a reply, validated. Raises `BadReply` if there is none, more than one, or a broken one."""
    found = extract_object(text)
    try:
        return schema.model_validate_json(json.dumps(found))
    except ValidationError as error:
        raise BadReply(_validation_problem(error), has_object=True) from None


def extract_object(text: str) -> dict[str, Any]:
    """The one JSON object in a reply that may have thoughts, code fences or prose around it. Raises `BadReply`.

    A second, different object is refused and so is a broken one, without looking inside it: a reply that quotes what
    it judges would otherwise let the quoted text choose the verdict.
    """
    text = _THOUGHTS.sub("", text)
    if is_too_deep(text):
        raise BadReply("The JSON is nested too deeply.", has_object=_OBJECT_START.search(text) is not None)
    decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    found: list[dict[str, Any]] = []
    position = 0
    while match := _OBJECT_START.search(text, position):
        try:
            value, position = decoder.raw_decode(text, match.start())
        except RecursionError:
            raise BadReply("The JSON is nested too deeply.", has_object=True) from None
        except ValueError as error:
            raise BadReply(f"The JSON object in it is broken: {error}.", has_object=True) from None
        if value not in found:
            found.append(value)
    if not found:
        raise BadReply("There is no JSON object in it.", has_object=False)
    if len(found) > 1:
        raise BadReply(f"There are {len(found)} different JSON objects in it; exactly one is wanted.", has_object=True)
    return found[0]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _validation_problem(error: ValidationError) -> str:
    problems = [
        f"{'.'.join(str(part) for part in item['loc']) or 'the object'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    more = f"; and {len(problems) - _MAX_ERRORS} more" if len(problems) > _MAX_ERRORS else ""
    return f"The JSON object is not valid: {'; '.join(problems[:_MAX_ERRORS])}{more}."
