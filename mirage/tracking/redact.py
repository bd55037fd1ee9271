"""Secrets: taken out of what is logged (recipes, command lines, messages), and refused where settings hold one."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

from mirage.errors import UserError

HIDDEN = "[hidden]"

# Environment variables whose values are secrets, and mapping keys whose values are.
_SECRET_NAME = re.compile(r"(^|_)(api_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
# Shapes of keys that need no context: Hugging Face, OpenAI-style, GitHub, AWS, and a password inside a URL.
_SECRET_SHAPE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
    r"|(?<=://)[^/@\s:]*:[^/@\s]+(?=@)"
)
# Shorter values ("1", "true", "none") are switches, and hiding them would blank unrelated text.
_MIN_SECRET_CHARS = 8
# A setting that holds a shorter value of such a variable holds it by chance: a word, a name, a folder.
_MIN_REFUSED_CHARS = 20
# Text that gives a secret by its name; `api_key_env: NAME` gives the name of a variable.
_SECRET_SETTING = re.compile(
    r"""(?:^|[\s{,"'._-])(?:api[_-]?key|access[_-]?token|auth[_-]?token|password|passwd)["']?\s*[:=]\s*["']?[^\s#"',}]""",
    re.IGNORECASE,
)


def redact(value: Any, *, environ: Mapping[str, str] | None = None) -> Any:
    """A copy of `value` (strings, mappings, lists, tuples; anything else as it is) with secrets replaced by `[hidden]`.

    A secret is a string under a key named like one, the value of an environment variable named like one (as it is,
    percent-encoded, or in base64), or text in the shape of a known key. Tuples become lists, as in JSON. `environ` is
    `os.environ` unless given.
    """
    return _redact(value, _forms(_environment_secrets(os.environ if environ is None else environ)))


def strike(value: Any, secret: str) -> Any:
    """A copy of JSON data without one secret, in whichever of its forms and wherever a text holds it.

    What a server sends may hold the key that it was sent; replies are stored and shown.
    """
    if isinstance(value, str):
        for form in _forms((secret,)):
            value = value.replace(form, HIDDEN)
        return value
    if isinstance(value, dict):
        return {strike(name, secret): strike(item, secret) for name, item in value.items()}
    return [strike(item, secret) for item in value] if isinstance(value, list) else value


def refuse_secrets(text: str, where: str, *, environ: Mapping[str, str] | None = None) -> None:
    """Raise `UserError` if a setting's text holds a secret; the message names the place and does not repeat it.

    What is on a command line every user of the machine can read, and a recipe is copied into runs and checkpoints.
    """
    secrets = _environment_secrets(os.environ if environ is None else environ)
    known = any(form in text for form in _forms(tuple(item for item in secrets if len(item) >= _MIN_REFUSED_CHARS)))
    if known or _SECRET_SHAPE.search(text) or _SECRET_SETTING.search(text):
        raise UserError(
            f"{where} holds a key, token or password (not repeated here), and settings are written down with a run; "
            "take it out, export it as an environment variable (OPENAI_API_KEY, HF_TOKEN, WANDB_API_KEY), and name an "
            "endpoint's variable in api_key_env. Make a new key if this one was seen by others"
        )


def refuse_secret_arguments(arguments: Sequence[str]) -> None:
    """`refuse_secrets` for each argument of a command line."""
    for number, argument in enumerate(arguments, start=1):
        name = argument.partition("=")[0]
        place = f" ({name}=...)" if "=" in argument and redact(name) == name and len(name) < 60 else ""
        refuse_secrets(argument, f"argument {number} of the command line{place}")


def _environment_secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    found = {
        value.strip()
        for name, value in environ.items()
        if _SECRET_NAME.search(name) and len(value.strip()) >= _MIN_SECRET_CHARS
    }
    # The longest first: one that begins with another must not leave its rest behind.
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


@lru_cache(maxsize=16)
def _forms(secrets: tuple[str, ...]) -> tuple[str, ...]:
    """Each secret as it is and as it is often written: percent-encoded, and within base64 of a longer text."""
    return tuple(dict.fromkeys(form for secret in secrets for form in _written(secret)))


def _written(secret: str) -> Iterator[str]:
    yield secret
    yield quote(secret, safe="")
    yield quote_plus(secret)
    content = secret.encode("utf-8", "surrogateescape")
    for offset in range(3):
        # The letters that depend on the secret alone, wherever it begins in the encoded text.
        text = base64.b64encode(b"\0" * offset + content).decode("ascii")
        core = text[-(-8 * offset // 6) : (offset + len(content)) * 8 // 6]
        if len(core) >= _MIN_SECRET_CHARS:
            yield core
            yield core.replace("+", "-").replace("/", "_")


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
