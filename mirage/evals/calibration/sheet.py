"""A blind label sheet: a table to fill in, a page to look at, the pictures, and the key that nobody labels with."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from markupsafe import Markup

from mirage.data.picture_files import picture_format, picture_size, read_picture
from mirage.data.readers.images import ENDINGS
from mirage.errors import UserError
from mirage.evals.calibration.population import Judged, draw_sample, label_options, read_population
from mirage.evals.results import Results
from mirage.evals.tasks import TASKS
from mirage.files import write_atomic
from mirage.pages.document import page
from mirage.pages.templates import page_template

KEY_SUFFIX = ".key.json"
KEY_VERSION = 1
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# Beyond the look that all pages share.
_STYLE = """
section { border-top: 1px solid var(--line); padding: .6rem 0 1rem; break-inside: avoid }
section h2 { font-size: 1rem; margin-top: .6rem } dt { font-weight: 600 }
.pictures img { max-height: 18rem } .question { white-space: pre-wrap; overflow-wrap: anywhere }
"""
COLUMNS = ("item", "task", "options", "question", "answer", "pictures", "label", "note")


def export_sheet(folders: Sequence[Path], out: Path, *, n: int, tasks: Sequence[str] | None = None) -> list[Path]:
    """Write `out` (CSV), its page (.html), its pictures (a folder beside it) and its key; returns their paths.

    The sheet shows task, question, pictures and answer: no verdict, evaluation, checkpoint or judge. Those are in the
    key, with how many answers of each stratum there are. Raises `UserError` for a name that does not end in .csv, a
    sheet that exists (labels may be in it), or evaluations that cannot be used.
    """
    if out.suffix != ".csv":
        raise UserError(f"out={out}: end the name in .csv")
    if out.exists():
        raise UserError(f"{out} exists and may hold labels; choose another name or delete it")
    population, results = read_population(folders, tasks=tasks)
    chosen = draw_sample(population, n=n)
    options = {
        task: label_options(task, [item.verdict for item in population if item.task == task])
        for task in sorted({item.task for item in population})
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = out.with_name(f"{out.stem}_pictures")
    shown = {item.item: _copy_pictures(item, pictures) for item in chosen}
    key, page = out.with_name(out.stem + KEY_SUFFIX), out.with_suffix(".html")
    write_atomic(key, _key(out, population, chosen, results, options))
    write_atomic(page, _page(chosen, options, shown))
    write_atomic(out, _table(chosen, options, shown))
    return [out, page, pictures, key]


def _copy_pictures(item: Judged, folder: Path) -> list[str]:
    """The item's pictures in `folder`, named by content; paths relative to the sheet."""
    names = []
    for path in item.image_paths:
        # Only what opens as a picture is copied, and named as what it is: the paths are from a file of somebody else.
        content = read_picture(path)
        picture_size(path)
        name = hashlib.sha256(content).hexdigest()[:24] + ENDINGS[picture_format(content)]
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        if not target.exists():
            temporary = target.with_name(f".{name}.tmp")
            temporary.write_bytes(content)
            temporary.replace(target)
        names.append(f"{folder.name}/{name}")
    return names


def _table(chosen: Sequence[Judged], options: Mapping[str, Sequence[str]], shown: Mapping[str, Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in chosen:
        cells = [item.item, item.task, " | ".join(options[item.task]), item.question, item.answer]
        writer.writerow([_inert(cell) for cell in [*cells, " ".join(shown[item.item])]] + ["", ""])
    return text.getvalue()


def _inert(cell: str) -> str:
    """A spreadsheet runs cells that begin like a formula, and answers are a model's: a quote makes them text.

    The characters are those of OWASP's page on CSV injection, full-width forms included.
    """
    return "'" + cell if cell.startswith(_FORMULA_STARTS) else cell


def _page(chosen: Sequence[Judged], options: Mapping[str, Sequence[str]], shown: Mapping[str, Sequence[str]]) -> str:
    source = (resources.files("mirage.evals.calibration") / "page.html.jinja").read_text("utf-8")
    body = page_template(source, trim=True).render(
        items=chosen, options=options, shown=shown, meanings={task: _meanings(task) for task in options}
    )
    return page("Answers to label", Markup(body), style=_STYLE, linked_pictures=True)


def _meanings(task: str) -> dict[str, str]:
    known = TASKS.get(task.partition("@")[0])
    return {metric.name: metric.meaning for metric in known.metrics} if known is not None else {}


def _key(
    out: Path,
    population: Sequence[Judged],
    chosen: Sequence[Judged],
    results: Mapping[str, Results],
    options: Mapping[str, Sequence[str]],
) -> str:
    sizes, drawn = Counter(item.stratum for item in population), Counter(item.stratum for item in chosen)
    content = {
        "schema_version": KEY_VERSION,
        "sheet": out.name,
        "sources": {
            source: {
                "checkpoint": item.checkpoint,
                "step": item.step,
                "request": item.request,
                "judge": f"{item.judge.name}-v{item.judge.version}",
            }
            for source, item in results.items()
        },
        "options": {task: list(found) for task, found in options.items()},
        "strata": [
            {"source": name[0], "task": name[1], "verdict": name[2], "size": sizes[name], "drawn": drawn[name]}
            for name in sorted(sizes)
        ],
        "items": {
            item.item: {
                "source": item.source,
                "task": item.task,
                "verdict": item.verdict,
                "category": item.category,
                "sub_category": item.sub_category,
                "reason": item.reason,
            }
            for item in chosen
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
