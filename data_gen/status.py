"""Where a run stands, from its work folder alone: stored results by stage, the last report, and what is published."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from data_gen.row_store import LOCK_FILE, read_results
from data_gen.run import work_folder
from data_gen.run_report import REPORT_FILE, dollars
from data_gen.store import MANIFEST_FILE, read_manifest
from mirage.endpoint.failures import Usage
from mirage.errors import UserError
from mirage.strict_json import read_json_lines


def print_status(target: Path, console: Console) -> None:
    """Print what is stored for the dataset folder `target`. Raises UserError if nothing was ever run for it."""
    work = work_folder(target)
    published = (target / MANIFEST_FILE).is_file()
    if not work.is_dir() and not published:
        raise UserError(f"nothing was made at {target} yet; start with: python -m data_gen run PIPELINE.yaml --out DIR")
    if work.is_dir():
        _print_stages(work, console)
        _print_report(work / REPORT_FILE, console)
        if is_running(work):
            console.print("a run is going on")
    if published:
        manifest = read_manifest(target)
        console.print(
            f"published: {manifest['counts']['rows']} rows, manifest {manifest['content_sha256'][:12]}", highlight=False
        )
    else:
        console.print("not published yet: run the same command again to go on")


def _print_stages(work: Path, console: Console) -> None:
    table = Table(title=None, box=None, pad_edge=False)
    for name in ("stage", "done", "dropped", "failed", "calls", "tokens in", "out", "USD"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for name, records in read_results(work).items():
        status = Counter(record.status for record in records)
        kinds = Counter(record.kind for record in records if record.kind is not None)
        failed = ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items()))
        usage = sum((record.usage for record in records), Usage())
        table.add_row(
            name,
            str(status["done"]),
            str(status["dropped"]),
            failed or "0",
            str(usage.calls),
            str(usage.prompt_tokens),
            str(usage.completion_tokens),
            dollars(usage),
        )
    console.print(table)


def _print_report(path: Path, console: Console) -> None:
    if not path.is_file():
        return
    ended = Counter(value.get("status") for _, value in read_json_lines(path) if isinstance(value, dict))
    console.print(
        f"last run: {ended['done']} rows done, {ended['dropped']} dropped, {ended['failed']} failed; each in {path}",
        highlight=False,
    )


def is_running(work: Path) -> bool:
    """Whether a process holds the work folder."""
    lock = FileLock(work / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False
