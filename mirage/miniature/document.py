"""A page as data, and its two forms: Markdown for docs/, and one HTML file that opens from disk."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from mirage.pages.document import page


@dataclass(frozen=True)
class Table:
    """A table. The first `num_labels` columns are words, the others figures."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A picture: `name` is its file in docs/figures without ending, `svg` its content."""

    name: str
    alt: str
    svg: str = field(repr=False, default="")


# A string is a paragraph; `code`, **strong** and [links](target) are marked as in Markdown.
Block = str | Table | Bullets | Figure


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A page."""

    title: str
    blocks: tuple[Block, ...]
    sections: tuple[Section, ...]


# Markdown


def markdown(document: Document) -> str:
    """The page as Markdown, lines unfolded; figures are links to `figures/NAME.png`."""
    parts = [f"# {document.title}", *map(_markdown_block, document.blocks)]
    for section in document.sections:
        parts += [f"## {section.title}", *map(_markdown_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Bullets):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Figure):
        return f"![{block.alt}](figures/{block.name}.png)"
    rule = ["---"] * block.num_labels + ["---:"] * (len(block.header) - block.num_labels)
    return "\n".join(_markdown_row(row) for row in (block.header, rule, *block.rows))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# HTML

# What the shared style lacks: long tables of figures, with words in their first columns.
_STYLE = """
nav { columns: 16rem; font-size: .9rem; }
.wide { margin: 1rem 0; }
th, td { padding: .3rem .6rem; white-space: nowrap; }
th { background: var(--panel); white-space: normal; min-width: 5rem; }
.word, th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
figure { margin: 1rem 0; padding: .5rem; background: var(--paper); border-radius: 6px; overflow-x: auto; }
figure img { width: 100%; height: auto; min-width: 34rem; display: block; }
.met { color: var(--good); font-weight: 600; } .missed { color: var(--bad); font-weight: 600; }
"""


def web_page(document: Document) -> str:
    """The page as one HTML file: no script, no other file, dark or light as the reader's system is."""
    parts = [f"<h1>{_inline(document.title)}</h1>", *map(_html_block, document.blocks)]
    parts.append("<nav>" + "<br>".join(f'<a href="#{_anchor(s)}">{_inline(s.title)}</a>' for s in document.sections))
    parts.append("</nav>")
    for section in document.sections:
        parts.append(f'<h2 id="{_anchor(section)}">{_inline(section.title)}</h2>')
        parts += map(_html_block, section.blocks)
    # Every text has gone through `_inline`, which escapes it.
    return page(document.title, Markup("<main>\n" + "\n".join(parts) + "\n</main>"), style=_STYLE)


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")


def _html_block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{_inline(block)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Figure):
        # As a picture of its own: its styles are in attributes, which the page's policy does not let in.
        data = base64.b64encode(block.svg.encode()).decode()
        return f'<figure><img alt="{html.escape(block.alt)}" src="data:image/svg+xml;base64,{data}"></figure>'
    head = "".join(_html_cell("th", cell, word=n < block.num_labels) for n, cell in enumerate(block.header))
    rows = [
        "<tr>" + "".join(_html_cell("td", cell, word=n < block.num_labels) for n, cell in enumerate(row)) + "</tr>"
        for row in block.rows
    ]
    body = "\n".join(rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _html_cell(tag: str, text: str, *, word: bool) -> str:
    kind = {"met": "met", "missed": "missed"}.get(text, "word" if word else "")
    return f'<{tag} class="{kind}">{_inline(text)}</{tag}>' if kind else f"<{tag}>{_inline(text)}</{tag}>"


def _inline(text: str) -> str:
    """Escaped text with `code`, **strong** and [links](target)."""
    found = html.escape(text, quote=False)
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", found)
    found = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", found)
    return re.sub(r"\[([^\[\]]+)\]\((\S+?)\)", r'<a href="\2">\1</a>', found)
