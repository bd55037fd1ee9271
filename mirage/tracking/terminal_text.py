"""Text for a terminal: nothing in it that a terminal obeys, whatever data, models and servers put there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from mirage.tracking.redact import redact

# Escape sequences set colours, titles, links (OSC 8) and the clipboard (OSC 52), and move the cursor over what was
# said; 0x80 to 0x9f are their eight-bit forms. The marks that reverse the direction of text hide what a line says.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def inert(text: str) -> str:
    """The text without control characters (line breaks and tabs stay) and without marks of direction."""
    return _CONTROL.sub("", text)


def safe_message(text: str) -> str:
    """A message as it may be shown and written down: secrets hidden, inert."""
    return inert(redact(text))


class SafeConsole(Console):
    """A rich console that passes its own styles to the terminal and no escape sequence of the text."""

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As rich's, with inert text."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or not _CONTROL.search(text) else Segment(inert(text), style)
