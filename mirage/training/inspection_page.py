"""An inspection as files and in the terminal: index.html, tiles.png (a contact sheet) and a short summary."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageOps
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirage.config.loader import recipe_hash
from mirage.files import temporary_of
from mirage.pages.document import page
from mirage.pages.templates import page_template
from mirage.tracking.terminal_text import SafeConsole
from mirage.training.checkpoint import write_atomic
from mirage.training.inspection import InspectedSample, InspectedStep, Inspection

PAGE_FILE, SHEET_FILE = "index.html", "tiles.png"
# Edge of a tile on the page and on the contact sheet, pixels.
_SHOWN_EDGE = 112
_SHEET_MIN_COLUMNS, _SHEET_COLUMNS = 4, 10

_STYLE = """
main { max-width: 1080px }
.tokens { font: 13px/1.9 ui-monospace, SFMono-Regular, Menlo, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
 border: 1px solid var(--line); border-radius: 6px; padding: .6rem }
.tokens span { border-radius: 3px; padding: 2px 1px; margin-right: 1px }
.prompt { background: var(--panel) } .supervised { background: var(--reply) } .image { background: var(--perceive) }
.tiles { display: inline-block; margin: 0 .8rem .3rem 0; max-width: 100% }
.tiles img { width: 112px; margin: 2px; border: 1px solid var(--line); background: var(--paper); vertical-align: top }
.room { width: 160px; height: 11px; vertical-align: middle } .room .whole { fill: var(--line) }
.room .used { fill: var(--accent) }
"""

_TEMPLATE = """\
<main>
<h1>{{ name }}</h1>
<p class="soft">Recipe {{ hash }}. Weights: <code>{{ base }}</code>. What the run would do, before it does it.</p>

<h2>What is trained and saved</h2>
<div class="wide"><table><tr><th>part</th><th>parameters</th><th>trained</th><th>adapters</th><th>saved</th></tr>
{% for part in parts %}<tr><td>{{ part.part }}</td><td>{{ part.total | count }}</td><td>{{ part.trained | count }}</td>
<td>{{ part.adapters | count }}</td><td>{{ part.saved | count }}</td></tr>{% endfor %}
<tr><th>all</th>{% for number in totals %}<th>{{ number | count }}</th>{% endfor %}</tr></table></div>
<p>A checkpoint holds {{ saved_as }}.</p>
{% if lora_modules %}<details><summary>{{ lora_modules | length }} layers get adapters</summary>
<p>{% for module in lora_modules %}<code>{{ module }}</code><br>{% endfor %}</p></details>{% endif %}

<h2>Preprocessing</h2>
<div class="wide"><table>{% for key, value in preprocessing.items() %}<tr><td>{{ key }}</td>
<td><code>{{ value | tojson }}</code></td></tr>{% endfor %}</table></div>

<h2>Lengths</h2>
<div class="wide"><table>{% for label, value in lengths %}<tr><td>{{ label }}</td><td>{{ value }}</td></tr>{% endfor %}
</table></div>
{% if left_out %}<details><summary>{{ left_out | length }} rows left out</summary>
<p>{% for line in left_out %}{{ line }}<br>{% endfor %}</p></details>{% endif %}

<h2>Packs of the first steps</h2>
<p class="soft">{{ world_size }} process{{ "es" if world_size > 1 }} ({{ world_note }}), rows of at most
{{ pack_tokens | count }} tokens. Balance: the dearest row of a micro-step over the mean; 1.00 means that no process
waits.</p>
{% for step in steps %}<h3>Step {{ step.number }}: {{ step.num_samples }} samples, {{ percent(step.fill) }} full,
balance {{ "%.2f" | format(step.imbalance) }}</h3>
<div class="wide"><table>{% for micro in step.row_tokens %}<tr><td>pack {{ loop.index }}</td>{% for tokens in micro %}
<td><svg class="room" viewBox="0 0 160 11" aria-hidden="true"><rect class="whole" width="160" height="11" rx="2"/>
<rect class="used" width="{{ 160 * tokens // pack_tokens }}" height="11" rx="2"/></svg> {{ tokens | count }}</td>
{% endfor %}</tr>{% endfor %}</table></div>{% endfor %}

<h2>The first samples</h2>
<p><span class="supervised">learnt</span> <span class="prompt">prompt, not learnt</span>
<span class="image">picture placeholders</span></p>
{% for sample in samples %}<h3>{{ sample.row_id }}
<span class="soft">{{ sample.source }}, {{ sample.location }}</span></h3>
<p class="soft">{{ "{:,}".format(sample.num_tokens) }} tokens: {{ "{:,}".format(sample.num_image_tokens) }} of pictures,
{{ "{:,}".format(sample.num_supervised_tokens) }} learnt
{%- if sample.weight != 1 %}, weight {{ sample.weight }}{% endif %}</p>
{% for picture in sample.pictures %}<div class="tiles">{% for tile in picture %}<img alt="tile {{ loop.index }}"
title="picture {{ loop.index }}: {{ tile.width }} x {{ tile.height }}" src="{{ tile | data_uri }}">{% endfor %}</div>
{% endfor %}<div class="tokens">{% for token in sample.tokens -%}
<span class="{{ token.kind }}">{{ token.text | visible }}
{%- if token.kind == "image" %} ×{{ token.count }}{% endif %}</span>{% endfor %}</div>{% endfor %}
</main>
"""


def write_inspection(inspection: Inspection, folder: Path) -> Path:
    """Write index.html and tiles.png into `folder`, each whole or not at all. Returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    contact_sheet(inspection.samples).save(content, format="PNG")
    temporary = temporary_of(folder / SHEET_FILE)
    temporary.write_bytes(content.getvalue())
    temporary.replace(folder / SHEET_FILE)
    write_atomic(folder / PAGE_FILE, render_page(inspection))
    return folder / PAGE_FILE


def render_page(inspection: Inspection) -> str:
    """The HTML page, pictures inside; every text from the data is escaped."""
    filters: dict[str, Callable[..., Any]] = {"count": _count, "data_uri": _data_uri, "visible": _visible}
    body = page_template(_TEMPLATE, filters=filters).render(
        name=inspection.recipe.name,
        hash=recipe_hash(inspection.recipe),
        base=inspection.base,
        parts=inspection.parts,
        totals=_totals(inspection),
        saved_as=inspection.saved_as,
        lora_modules=inspection.lora_modules,
        preprocessing=inspection.preprocessing,
        lengths=_length_rows(inspection),
        left_out=inspection.left_out,
        world_size=inspection.world_size,
        world_note=inspection.world_note,
        pack_tokens=inspection.recipe.data.pack_tokens,
        steps=inspection.steps,
        percent=_percent,
        samples=inspection.samples,
    )
    return page(f"{inspection.recipe.name}: before the run", Markup(body), style=_STYLE)


def contact_sheet(samples: Sequence[InspectedSample]) -> Image.Image:
    """All tiles of the samples, a sample a block, captioned with its row id."""
    edge, line = _SHOWN_EDGE, 16
    blocks = [[tile for picture in sample.pictures for tile in picture] for sample in samples]
    columns = max(_SHEET_MIN_COLUMNS, min(_SHEET_COLUMNS, max(map(len, blocks), default=0)))
    heights = [line + edge * -(-len(tiles) // columns) for tiles in blocks]
    sheet = Image.new("RGB", (edge * columns, max(1, sum(heights))), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for sample, tiles, height in zip(samples, blocks, heights, strict=True):
        counts = ", ".join(str(len(picture)) for picture in sample.pictures)
        caption = f"tiles of its pictures: {counts}" if sample.pictures else "no picture"
        draw.text((4, top + 2), f"{sample.row_id}  {caption}", fill="black")
        for number, tile in enumerate(tiles):
            row, column = divmod(number, columns)
            small = ImageOps.contain(tile, (edge - 4, edge - 4), Image.Resampling.BICUBIC)
            sheet.paste(small, (column * edge + 2, top + line + row * edge + 2))
        top += height
    return sheet


def print_inspection(inspection: Inspection, page: Path, *, console: Console | None = None) -> None:
    """The summary in the terminal."""
    console = console or SafeConsole(highlight=False)
    console.print(
        Text.assemble(("Recipe ", "bold"), (inspection.recipe.name, "bold cyan"), f"  {recipe_hash(inspection.recipe)}")
    )
    table = _table("part", "parameters", "trained", "adapters", "saved")
    for part in inspection.parts:
        table.add_row(part.part, *(_count(n) for n in (part.total, part.trained, part.adapters, part.saved)))
    table.add_row("all", *(_count(number) for number in _totals(inspection)), style="bold")
    console.print(table)
    layers = f" {len(inspection.lora_modules)} layers get adapters." if inspection.lora_modules else ""
    console.print(f"A checkpoint holds {inspection.saved_as}.{layers}\n")
    table = _table("lengths", "")
    for label, value in _length_rows(inspection):
        table.add_row(label, value)
    console.print(table)
    table = _table("step", "samples", "packs a process", "fill", "balance")
    for step in inspection.steps:
        table.add_row(*_step_cells(step))
    console.print(table)
    table = _table("row", "tokens", "of pictures", "learnt", "tiles")
    for sample in inspection.samples:
        tiles = "+".join(str(len(picture)) for picture in sample.pictures) or "-"
        numbers = (sample.num_tokens, sample.num_image_tokens, sample.num_supervised_tokens)
        table.add_row(Text(sample.row_id), *(_count(number) for number in numbers), tiles)
    console.print(table)
    console.print(Text(f"page: {page}\ntiles: {page.with_name(SHEET_FILE)}"))


def _step_cells(step: InspectedStep) -> tuple[str, ...]:
    return (
        str(step.number),
        str(step.num_samples),
        str(len(step.row_tokens)),
        _percent(step.fill),
        f"{step.imbalance:.2f}",
    )


def _totals(inspection: Inspection) -> tuple[int, int, int, int]:
    parts = inspection.parts
    return (
        sum(part.total for part in parts),
        sum(part.trained for part in parts),
        sum(part.adapters for part in parts),
        sum(part.saved for part in parts),
    )


def _length_rows(inspection: Inspection) -> list[tuple[str, str]]:
    lengths = inspection.lengths
    tokens = lengths.num_tokens
    middle, high = (int(value) for value in np.percentile(tokens, [50, 95]))
    return [
        ("samples", f"{len(lengths):,}"),
        ("rows left out", f"{len(inspection.left_out):,}"),
        ("tokens a sample", f"mean {tokens.mean():,.0f}, median {middle:,}, 95 % {high:,}, longest {tokens.max():,}"),
        ("of pictures", _percent(lengths.num_image_tokens.sum() / tokens.sum())),
        ("learnt", _percent(lengths.num_supervised_tokens.sum() / tokens.sum())),
        ("optimiser steps", f"{inspection.num_steps:,}"),
    ]


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number and header else "left")
    return table


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"


def _visible(text: str) -> str:
    """Line breaks stay line breaks and are seen; so are texts that would show nothing."""
    return text.replace("\n", "⏎\n") if text else "␀"


def _data_uri(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((2 * _SHOWN_EDGE, 2 * _SHOWN_EDGE))
    content = io.BytesIO()
    small.save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
