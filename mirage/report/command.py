"""`mirage report`: run folders to one HTML file, or to Markdown for pull requests and model cards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mirage.errors import UserError
from mirage.evals.report import results_markdown, results_table, summary_markdown, where_to_look
from mirage.files import write_atomic
from mirage.report.comparison import columns_of, lines_of
from mirage.report.page import MAX_MB, Written, write_report
from mirage.report.run_folder import Run, read_runs
from mirage.report.words import Paragraph, summarise, what_was_trained
from mirage.tracking.terminal_text import SafeConsole, inert


def run(folders: Sequence[Path], *, out: str | None, max_mb: str | None, markdown: bool) -> int:
    """Write the page and print its summary, or print the Markdown (or write it to `out`). Returns the exit code."""
    if not folders:
        raise UserError(
            "report takes one RUN_DIR or more, found none; for example: mirage report runs/mini_internvl_mis"
        )
    target = Path(out).expanduser().absolute() if out else None
    if markdown:
        if max_mb is not None:
            raise UserError(f"max_mb={max_mb} has no effect with --markdown")
        text = report_markdown(folders)
        if target is None:
            print(inert(text))
        else:
            _check_folder(target)
            write_atomic(target, text if text.endswith("\n") else f"{text}\n")
        return 0
    written = write_report(folders, target, max_mb=_megabytes(max_mb))
    _show(written, folders)
    return 0


def report_markdown(folders: Sequence[Path]) -> str:
    """One run: its table, examples and files. Several: the words and figures of each against the first."""
    runs = read_runs(folders)
    if len(runs) == 1 and (runs[0].folder / "evals").is_dir():
        return summary_markdown(runs[0].folder)
    columns = columns_of(runs)
    lines = lines_of(columns)
    parts = [*(what_was_trained(item) for item in runs)]
    parts += [_paragraph(paragraph) for paragraph in summarise(columns, lines)]
    parts += [f"**{item.name}**\n\n{results_markdown(_ends(item))}" for item in runs]
    return "\n\n".join(parts)


def _ends(item: Run) -> list:
    ends = [item.first, item.last] if len(item.evaluations) > 1 else [item.last]
    return [evaluation.results for evaluation in ends]


def _paragraph(paragraph: Paragraph) -> str:
    lines = [f"- {sentence.text}" for sentence in paragraph.sentences]
    return f"**{paragraph.title}**\n\n" + "\n".join(lines)


def _show(written: Written, folders: Sequence[Path]) -> None:
    console = SafeConsole(highlight=False, soft_wrap=True)
    for text in written.trained:
        console.print(text, markup=False)
    for paragraph in written.paragraphs:
        console.print(f"\n{paragraph.title}", markup=False, style="bold")
        for sentence in paragraph.sentences:
            console.print(f"  {_MARKS[sentence.kind]} {sentence.text}", markup=False)
    if len(folders) == 1:
        console.print()
        console.print(results_table(list(written.results)))
        console.print(where_to_look(folders[0]), markup=False)
    console.print(f"report: {written.path} ({written.num_bytes / 1e6:.1f} MB)", markup=False)
    console.print(written.coverage, markup=False)


_MARKS = {"better": "▲", "worse": "▼", "changed": "◆", "noise": "≈", "warning": "⚠", "plain": "·"}


def _megabytes(text: str | None) -> float:
    if text is None:
        return MAX_MB
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise UserError(f"max_mb={text}: must be a number of megabytes, 1 or more")
    return value


def _check_folder(target: Path) -> None:
    if not target.parent.is_dir():
        raise UserError(f"out={target}: there is no folder {target.parent}; make it first")
