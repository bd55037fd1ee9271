"""YAML as written: text, line and quoting kept, nothing guessed, a key given twice refused, size bounded."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mirage.config.values import Scalar
from mirage.errors import UserError
from mirage.safe_paths import open_regular
from mirage.strict_json import is_too_deep
from mirage.tracking.redact import refuse_secrets

# A recipe has a few hundred values. Aliases of aliases make billions of them out of a few lines.
MAX_VALUES = 20_000
MAX_BYTES = 8 * 1024**2
# No UTF-8 can hold it.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Node:
    """A piece of a YAML text and the line it begins on (from 1)."""

    value: Scalar | list[Node] | dict[str, Node]
    line: int
    key_line: int = 0


class YamlError(Exception):
    """The text is no recipe YAML; the message has the line."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str, *, max_values: int = MAX_VALUES) -> Node | None:
    """The tree of one YAML document, None for an empty one. Raises `YamlError`."""
    # PyYAML takes time by the square of the depth to find out.
    if is_too_deep(text):
        raise YamlError("not valid YAML: too many values inside each other, or brackets that do not match", None)
    try:
        loader = _Loader(text, max_values)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
        return None if root is None else _convert(root, (), _Count(max_values))
    except RecursionError:
        raise YamlError("not valid YAML: too many values inside each other", None) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"not valid YAML: {error.problem or error.context}", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {' '.join(str(error).split())}", None) from None


def read_yaml(path: Path, *, max_values: int = MAX_VALUES) -> Node | None:
    """The tree of a YAML file, None for an empty one. Raises `UserError` naming file and line."""
    text = _text(path)
    try:
        return parse_yaml(text, max_values=max_values)
    except YamlError as error:
        raise UserError(f"{path}:{error.line}: {error}" if error.line else f"{path}: {error}") from None


def read_plain_yaml(path: Path, *, max_values: int = MAX_VALUES) -> Any:
    """A YAML file as Python data with YAML's own guesses. Raises `UserError` as `read_yaml` does."""
    text = _text(path)
    try:
        return parse_plain_yaml(text, max_values=max_values)
    except YamlError as error:
        raise UserError(f"{path}:{error.line}: {error}" if error.line else f"{path}: {error}") from None


def parse_plain_yaml(text: str, *, max_values: int = MAX_VALUES) -> Any:
    """A YAML text as Python data with YAML's own guesses, none for an empty one. Raises `YamlError`."""
    parse_yaml(text, max_values=max_values)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # dates and numbers that are none
        raise YamlError(f"not valid YAML: {' '.join(str(error).split())}", None) from None


def _text(path: Path) -> str:
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise UserError(f"{path}: has more than {MAX_BYTES // 1024} KiB, which no settings need")
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: no UTF-8 text ({error.reason} at byte {error.start})") from None
    refuse_secrets(text, str(path))
    return text


class _Count:
    """How many values there were; one too many raises."""

    def __init__(self, most: int) -> None:
        self._num, self._most = 0, most

    def add(self, line: int) -> None:
        self._num += 1
        if self._num > self._most:
            raise YamlError(f"more than {self._most} values, those that aliases repeat counted", line)


class _Loader(yaml.BaseLoader):
    def __init__(self, text: str, max_values: int) -> None:
        super().__init__(text)
        self._count = _Count(max_values)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._count.add(self.peek_event().start_mark.line + 1)
        return super().compose_node(parent, index)


def _convert(node: yaml.Node, open_nodes: tuple[int, ...], count: _Count) -> Node:
    line = node.start_mark.line + 1
    count.add(line)
    if id(node) in open_nodes:
        raise YamlError("an alias contains itself", line)
    inner = (*open_nodes, id(node))
    if isinstance(node, yaml.ScalarNode):
        _refuse_half_characters(node.value, line)
        quoted = node.style is not None
        # `key:` with nothing after it is YAML's null.
        return Node(Scalar(node.value if quoted or node.value else "null", quoted), line)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(item, inner, count) for item in node.value], line)
    items: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlError("a key must be a plain word", key_line)
        _refuse_half_characters(key_node.value, key_line)
        if key_node.value in items:
            raise YamlError(
                f"{key_node.value!r} is given twice, first in line {items[key_node.value].key_line}", key_line
            )
        value = _convert(value_node, inner, count)
        items[key_node.value] = Node(value.value, value.line, key_line)
    return Node(items, line)


def _refuse_half_characters(text: str, line: int) -> None:
    if _HALF_CHARACTER.search(text):
        raise YamlError(r"an escape (\ud800 to \udfff) is half a character; write the character itself", line)
