"""The command line: `python -m data_gen make|run|status|diff|verify|export|review|accept|restyle`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

from rich import box
from rich.table import Table

from data_gen.build import make_dataset
from data_gen.settings import SIZES, settings_for
from data_gen.stages.export import SPLITS
from data_gen.store import MANIFEST_FILE, check_files, read_manifest
from data_gen.taxonomy.facts import load_taxonomy
from mirage.endpoint.failures import FailureKind
from mirage.errors import EXIT_INTERRUPTED, UserError
from mirage.tracking.console import MODES, Terminal, make_console

KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as every other command does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data_gen", description="Make multi-image safety data offline.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="write a dataset folder, or return at once if it is there")
    make.add_argument("--out", type=Path, required=True, help="folder to write")
    make.add_argument("--seed", type=_seed, default=0, help="root of every random choice (default: 0)")
    make.add_argument("--size", choices=sorted(SIZES), default="small", help="how much to make (default: small)")
    make.add_argument("--overwrite", action="store_true", help="replace another dataset in that folder")
    check = verbs.add_parser("verify", help="compare every file of a dataset folder with its manifest")
    check.add_argument("--out", type=Path, required=True, help="folder to check")
    _add_run_verbs(verbs)
    for verb in verbs.choices.values():
        verb.add_argument(
            "--console",
            choices=MODES,
            default="rich",
            help="rich (plain where there is no terminal), plain, quiet (errors only) or json (one object a line)",
        )
    return parser


def _add_run_verbs(verbs: argparse._SubParsersAction[_Parser]) -> None:
    run = verbs.add_parser("run", help="run a pipeline file: seeds through rules and models into a dataset folder")
    run.add_argument("pipeline", type=Path, metavar="PIPELINE.yaml")
    run.add_argument("--out", type=Path, required=True, help="folder to write; results are kept beside it")
    run.add_argument(
        "--retry-failed",
        type=_failure_kinds,
        nargs="?",
        const=KINDS,
        default=(),
        metavar="CLASS,...",
        help=f"ask again what failed, of these classes only ({', '.join(KINDS)}; all when none is named)",
    )
    run.add_argument("--overwrite", action="store_true", help="replace another dataset in that folder")
    run.add_argument("--ray", type=_seed, metavar="SHARDS", help="run the stages over Ray, in so many tasks")
    run.add_argument("--yes", action="store_true", help="call endpoints whose cost has no cap")
    status = verbs.add_parser("status", help="what is stored, failed and published for a dataset folder")
    status.add_argument("folder", type=Path)
    diff = verbs.add_parser("diff", help="rows added, removed and changed between two dataset folders")
    diff.add_argument("before", type=Path)
    diff.add_argument("after", type=Path)
    export = verbs.add_parser("export", help="write a dataset folder as Parquet with the pictures inside")
    export.add_argument("--out", type=Path, required=True, help="dataset folder to export")
    export.add_argument("--parquet", type=Path, required=True, help="folder to write")
    review = verbs.add_parser("review", help="write a page to read, accept and reject rows in a browser")
    review.add_argument("--out", type=Path, required=True, help="dataset folder to review")
    review.add_argument("--page", type=Path, required=True, help="folder to write the page into")
    review.add_argument("--split", action="append", metavar="NAME", help="only this split (may be repeated)")
    review.add_argument("--limit", type=_seed, help="show so many rows, spread evenly")
    accept = verbs.add_parser("accept", help="write a dataset folder without the rows that a review rejected")
    accept.add_argument("--out", type=Path, required=True, help="dataset folder that was reviewed")
    accept.add_argument("--decisions", type=Path, required=True, help="decisions.jsonl, as the page saved it")
    accept.add_argument("--to", type=Path, required=True, help="new folder")
    styles = verbs.add_parser("restyle", help="write a dataset folder with training pictures in other colours")
    styles.add_argument("--out", type=Path, required=True, help="dataset folder to start from")
    styles.add_argument("--to", type=Path, required=True, help="new folder")
    styles.add_argument("--share", type=float, default=0.3, help="share of the training pictures (default: 0.3)")
    styles.add_argument("--seed", type=_seed, default=0, help="root of every random choice (default: 0)")


def _failure_kinds(text: str) -> tuple[FailureKind, ...]:
    named = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in named if name not in KINDS]
    if unknown or not named:
        raise argparse.ArgumentTypeError(f"must name some of {', '.join(KINDS)}, found {text!r}")
    return tuple(kind for kind in KINDS if kind in named)


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 up, found {text!r}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. Raises UserError for what the user can correct."""
    arguments = _parser().parse_args(argv)
    verbs = {"make": _make, "run": _run, "status": _status, "diff": _diff, "verify": _verify}
    verbs |= {"review": _review, "accept": _accept, "export": _export, "restyle": _restyle}
    return verbs[arguments.verb](arguments)


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _console(arguments: argparse.Namespace) -> Terminal:
    return make_console(arguments.console)


def _make(arguments: argparse.Namespace) -> int:
    console = _console(arguments)
    outcome = make_dataset(
        _absolute(arguments.out),
        taxonomy=load_taxonomy(),
        settings=settings_for(seed=arguments.seed, size=arguments.size),
        overwrite=arguments.overwrite,
        progress=console.track,
    )
    counts = outcome.manifest["counts"]
    splits = ", ".join(f"{name} {counts['splits'][name]['rows']}" for name in SPLITS)
    state = "already complete" if outcome.was_complete else "written"
    console.summary(
        _split_table(counts["splits"]), what="make", **_dataset_facts(arguments.out, state, outcome.manifest)
    )
    if console.mode != "json":
        console.say(
            f"{arguments.out}: {state}; {counts['rows']} rows ({splits}), {counts['pictures']} pictures"
        )  # fmt: skip
    return 0


def _split_table(splits: Mapping[str, Any]) -> Table:
    """Rows by split and by what the right decision is."""
    decisions = sorted({name for split in splits.values() for name in split["decision"]})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("split", "rows", *decisions):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    for name in SPLITS:
        if splits[name]["rows"]:
            cells = [str(splits[name]["decision"].get(decision, 0)) for decision in decisions]
            table.add_row(name, str(splits[name]["rows"]), *cells)
    return table


def _dataset_facts(out: Path, state: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    counts = manifest["counts"]
    splits = {name: split["rows"] for name, split in counts["splits"].items()}
    facts = {"out": out, "state": state, "rows": counts["rows"], "splits": splits, "pictures": counts["pictures"]}
    return facts | {"content_sha256": manifest["content_sha256"]}


def _run(arguments: argparse.Namespace) -> int:
    # Imported here: `make` and `verify` need none of it, and it takes seconds.
    from data_gen.estimate import print_estimate
    from data_gen.pipeline import load_pipeline
    from data_gen.run import RunHooks, run_pipeline
    from data_gen.run_display import RunDisplay
    from data_gen.run_report import print_report

    console = _console(arguments)
    pipeline = load_pipeline(arguments.pipeline)
    with RunDisplay(console) as display:
        result = run_pipeline(
            pipeline,
            _absolute(arguments.out),
            taxonomy=load_taxonomy(),
            retry_failed=arguments.retry_failed,
            accept_unknown_cost=arguments.yes,
            overwrite=arguments.overwrite,
            num_shards=arguments.ray or None,
            hooks=RunHooks(
                lambda expected: print_estimate(expected, console), display.on_plan, display.on_result, console.track
            ),
        )
    print_report(result.report, console)
    if result.manifest is None:
        console.error(f"interrupted: every result is stored; the same command goes on ({result.report_path})")
        return EXIT_INTERRUPTED
    state, rows = "already complete" if result.was_complete else "written", result.manifest["counts"]["rows"]
    console.say(
        f"{arguments.out}: {state}; {rows} rows; each row's fate: {result.report_path}",
        event="done", out=arguments.out, state=state, rows=rows, report=result.report_path,
        content_sha256=result.manifest["content_sha256"],
    )  # fmt: skip
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from data_gen.status import print_status

    print_status(_absolute(arguments.folder), _console(arguments))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from data_gen.diff import diff_folders

    console = _console(arguments)
    found = diff_folders(_absolute(arguments.before), _absolute(arguments.after))
    if found.same:
        console.say(f"the same: {found.num_common} rows, every file")
        return 0
    for sign, names in (("+", found.added), ("-", found.removed)):
        for name in names:
            console.say(f"{sign} {name}")
    for row in found.changed:
        name = row.id_before if row.id_before == row.id_after else f"{row.id_before} -> {row.id_after}"
        console.say(f"~ {name}: {', '.join(row.fields)}")
    if found.description:
        console.say(f"made differently: {', '.join(found.description)}")
    console.say(
        f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed, "
        f"{found.num_common} the same"
    )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from data_gen.parquet import export_parquet

    console = _console(arguments)
    written = export_parquet(_absolute(arguments.out), _absolute(arguments.parquet))
    counts = ", ".join(f"{name} {count}" for name, count in written.counts.items())
    console.say(f"{arguments.parquet}: {sum(written.counts.values())} rows ({counts}), {len(written.files)} files")
    return 0


def _review(arguments: argparse.Namespace) -> int:
    from data_gen.review import PAGE_FILE, write_review

    console = _console(arguments)
    num_rows = write_review(
        _absolute(arguments.out), _absolute(arguments.page), splits=arguments.split, limit=arguments.limit
    )
    console.say(f"{num_rows} rows: open {arguments.page / PAGE_FILE} in a browser")
    return 0


def _accept(arguments: argparse.Namespace) -> int:
    from data_gen.reviewed import publish_reviewed

    out, decisions, target = (_absolute(path) for path in (arguments.out, arguments.decisions, arguments.to))
    console = _console(arguments)
    found = publish_reviewed(out, decisions, target, progress=console.track)
    console.say(
        f"{arguments.to}: written; {len(found.reviewed.kept)} rows, without {len(found.reviewed.rejected)} rejected "
        f"and {len(found.reviewed.orphaned)} of their siblings",
        event="done",
    )
    return 0


def _restyle(arguments: argparse.Namespace) -> int:
    from data_gen.restyled import publish_restyled

    console = _console(arguments)
    found = publish_restyled(
        _absolute(arguments.out), _absolute(arguments.to), share=arguments.share, seed=arguments.seed,
        progress=console.track,
    )  # fmt: skip
    console.say(
        f"{arguments.to}: written; {found.num_restyled} of {found.num_pictures} training pictures restyled",
        event="done",
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    console = _console(arguments)
    out = _absolute(arguments.out)
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(
            f"{out} is no dataset folder (no {MANIFEST_FILE}); write one with: python -m data_gen make --out {out}"
        )
    manifest = read_manifest(out)
    problems = check_files(out, manifest, texts_only=False)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{out} is damaged: {problems[0]}{more}; rebuild with --overwrite")
    console.say(f"{out}: all {len(manifest['files'])} files match")
    return 0
