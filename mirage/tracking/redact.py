"""Take secrets out of what is logged: recipes, command lines and error messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "[hidden]"

# Environment variables whose values are secrets, and mapping keys whose values are.
_SECRET_NAME = re.compile(r"(^|_)(api_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
# Shapes of keys that need no context: Hugging Face, OpenAI-style, and a password inside a URL.
_SECRET_SHAPE = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")
# Shorter values ("1", "true", "none") are switches, and hiding them would blank unrelated text.
_MIN_SECRET_CHARS = 8


def redact(value: Any, *, environ: Mapping[str, str] | None = None) -> Any:
    """A copy of `value` (strings, mappings, lists, tuples; anything else as it is) with secrets replaced by `[hidden]`.

    A secret is a string under a key named like one, the value of an environment variable named like one, or text in
    the shape of a known key. Tuples become lists, as in JSON. `environ` is `os.environ` unless given.
    """
    return _redact(value, tuple(_environment_secrets(os.environ if environ is None else environ)))


def _environment_secrets(environ: Mapping[str, str]) -> Iterator[str]:
    for name, value in environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET_CHARS:
            yield value


def _redact(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return _SECRET_SHAPE.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(item, str) and _SECRET_NAME.search(str(key)) else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    return value
