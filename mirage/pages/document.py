"""One HTML file from a body: shared style, own style and script, data as JSON, and a policy that lets nothing else run.

A page loads nothing from a network: no font, no script, no picture. Whatever comes from data is either escaped by the
template that made the body, or lies in a JSON element and is put into the document as text by the page's script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from markupsafe import Markup

_ID = re.compile(r"[a-z][a-z0-9-]*")


def page(
    title: str,
    body: Markup,
    *,
    style: str = "",
    script: str = "",
    data: Mapping[str, Any] | None = None,
    linked_pictures: bool = False,
) -> str:
    """A whole HTML document. `body` is finished markup, which only a template with escaping should make.

    `style` and `script` come after the shared ones (`style.css`, `elements.js`). Each item of `data` becomes an element
    of that id, which `readData(id)` in the script reads. With `linked_pictures` the page may show pictures that lie
    beside it on disk; otherwise only those inside it (data URIs). The policy has hashes of this very style and script:
    style attributes, handlers in attributes and any other script do nothing.

    Raises ValueError for a style or script that would end its element, and for an id that is none.
    """
    styles = shared("style.css") + style
    scripts = shared("elements.js") + script if script else ""
    for name, text in (("style", styles), ("script", scripts)):
        if f"</{name}" in text.lower():
            raise ValueError(f"the {name} holds </{name}, which would end its element")
    sources = "'self' file: data:" if linked_pictures else "data:"
    policy = [
        "default-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        f"img-src {sources}",
        f"style-src 'sha256-{_digest(styles)}'",
        *([f"script-src 'sha256-{_digest(scripts)}'"] if scripts else []),
    ]
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{html.escape(title)}</title>\n<style>{styles}</style>\n</head>\n<body>",
        str(body),
        *(_json_element(name, value) for name, value in (data or {}).items()),
        *([f"<script>{scripts}</script>"] if scripts else []),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def json_text(value: Any) -> str:
    """JSON that can stand inside a script element: ASCII, and no '<' that could end the element.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


@cache
def shared(name: str) -> str:
    """A file of this package, as text."""
    return (resources.files("mirage.pages") / name).read_text("utf-8")


def _json_element(name: str, value: Any) -> str:
    if not _ID.fullmatch(name):
        raise ValueError(f"an element's id must be a plain lower-case word, found {name!r}")
    return f'<script type="application/json" id="{name}">{json_text(value)}</script>'


def _digest(text: str) -> str:
    """As the policy wants it: base64 of sha256 of the element's exact content."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
