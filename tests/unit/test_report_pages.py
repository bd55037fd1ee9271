"""The document that every HTML page is: a strict policy, data that cannot end its element, one shared style."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re

import pytest
from markupsafe import Markup

from mirage.pages.document import json_text, page, shared


def test_the_policy_allows_this_style_and_script_and_nothing_else() -> None:
    text = page("a <b>", Markup("<p>x</p>"), style="p { color: red }", script="readData('d');", data={"d": [1]})
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1] and "img-src data:;" in policy[1]
    for name in ("style", "script"):
        content = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy[1]
    assert "<title>a &lt;b&gt;</title>" in text


def test_a_page_without_script_runs_none() -> None:
    text = page("a", Markup(""), linked_pictures=True)
    assert "<script" not in text and "script-src" not in text and "img-src 'self' file: data:" in text


def test_data_cannot_end_its_element() -> None:
    value = {"</script><script>alert(1)</script>": "<!-- \u2028 é 𝄞"}
    text = page("a", Markup(""), script="1;", data={"d": value})
    element = text.split('id="d">')[1].split("</script>")[0]
    assert "<" not in element and element.isascii() and json.loads(element) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text(math.nan)


def test_what_would_break_out_is_refused() -> None:
    with pytest.raises(ValueError, match="would end its element"):
        page("a", Markup(""), script="'</SCRIPT>'")
    with pytest.raises(ValueError, match="would end its element"):
        page("a", Markup(""), style="</style>")
    with pytest.raises(ValueError, match="plain lower-case word"):
        page("a", Markup(""), data={'"><b': 1})


def test_dark_print_and_light_have_the_same_colours_named() -> None:
    """A colour that dark mode lacks would be unreadable there."""
    style = shared("style.css")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    names = [set(re.findall(r"--([a-z0-9-]+):", block)) for block in blocks]
    assert len(names) == 3 and names[0] - {"paper"} == names[1]
    assert names[2] == names[1]
