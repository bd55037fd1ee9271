"""The command line: `python -m data_gen make --out DIR --seed N --size small|paper`, and `verify --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_gen.build import Item, check_files, make_dataset
from data_gen.settings import SIZES, settings_for
from data_gen.stages.export import SPLITS
from data_gen.store import MANIFEST_FILE, read_manifest
from data_gen.taxonomy.facts import load_taxonomy
from mirage.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_gen", description="Make multi-image safety data offline.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="write a dataset folder, or return at once if it is there")
    make.add_argument("--out", type=Path, required=True, help="folder to write")
    make.add_argument("--seed", type=_seed, default=0, help="root of every random choice (default: 0)")
    make.add_argument("--size", choices=sorted(SIZES), default="small", help="how much to make (default: small)")
    make.add_argument("--overwrite", action="store_true", help="replace another dataset in that folder")
    check = verbs.add_parser("verify", help="compare every file of a dataset folder with its manifest")
    check.add_argument("--out", type=Path, required=True, help="folder to check")
    return parser


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 up, found {text!r}")
    return value


def show_progress(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """The items, with a bar on a terminal and one line elsewhere."""
    if not sys.stderr.isatty():
        if total:
            print(f"{description}: {total}", file=sys.stderr, flush=True)
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            bar.advance(task)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. Raises UserError for what the user can correct."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out.expanduser().absolute()
    if arguments.verb == "verify":
        return _verify(out)
    outcome = make_dataset(
        out,
        taxonomy=load_taxonomy(),
        settings=settings_for(seed=arguments.seed, size=arguments.size),
        overwrite=arguments.overwrite,
        progress=show_progress,
    )
    counts = outcome.manifest["counts"]
    splits = ", ".join(f"{name} {counts['splits'][name]['rows']}" for name in SPLITS)
    state = "already complete" if outcome.was_complete else "written"
    print(f"{arguments.out}: {state}; {counts['rows']} rows ({splits}), {counts['pictures']} pictures")
    return 0


def _verify(out: Path) -> int:
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(
            f"{out} is no dataset folder (no {MANIFEST_FILE}); write one with: python -m data_gen make --out {out}"
        )
    manifest = read_manifest(out)
    problems = check_files(out, manifest, texts_only=False)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{out} is damaged: {problems[0]}{more}; rebuild with --overwrite")
    print(f"{out}: all {len(manifest['files'])} files match")
    return 0
