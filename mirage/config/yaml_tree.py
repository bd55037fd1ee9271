"""YAML as written: text, line and quoting kept, nothing guessed, a key given twice refused."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from mirage.config.values import Scalar


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


def parse_yaml(text: str) -> Node | None:
    """The tree of one YAML document, None for an empty one. Raises `YamlError`."""
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"not valid YAML: {error.problem or error.context}", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {error}", None) from None
    return None if root is None else _convert(root, ())


def _convert(node: yaml.Node, open_nodes: tuple[int, ...]) -> Node:
    line = node.start_mark.line + 1
    if id(node) in open_nodes:
        raise YamlError("an alias contains itself", line)
    inner = (*open_nodes, id(node))
    if isinstance(node, yaml.ScalarNode):
        quoted = node.style is not None
        # `key:` with nothing after it is YAML's null.
        return Node(Scalar(node.value if quoted or node.value else "null", quoted), line)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(item, inner) for item in node.value], line)
    items: dict[str, Node] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlError("a key must be a plain word", key_line)
        if key_node.value in items:
            raise YamlError(
                f"{key_node.value!r} is given twice, first in line {items[key_node.value].key_line}", key_line
            )
        value = _convert(value_node, inner)
        items[key_node.value] = Node(value.value, value.line, key_line)
    return Node(items, line)
