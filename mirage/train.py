"""What `accelerate launch` runs: recipe, callbacks, fit. One process of this file is one rank."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# The launcher puts this file's folder at the head of the path, where `data` or `models` would shadow other packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from mirage.orphans import die_with_parent  # noqa: E402

if __name__ == "__main__" and "TORCHELASTIC_RUN_ID" in os.environ:
    # Before the seconds that imports take: a launcher that is killed would leave its ranks in the run folder.
    die_with_parent()

from mirage.config.loader import load_recipe  # noqa: E402
from mirage.errors import run_main  # noqa: E402
from mirage.tracking.json_lines import claim_stdout  # noqa: E402
from mirage.tracking.sweep import sweep_arguments  # noqa: E402


def main(args: list[str] | None = None) -> int:
    """Train as the arguments say: `recipe=NAME key=value ...` (a sweep's `--key=value` too), `--help`, `--dry-run`."""
    # DeepSpeed's launcher hands each process its local rank twice: here, and in LOCAL_RANK.
    args = [arg for arg in (sys.argv[1:] if args is None else args) if not arg.startswith("--local_rank=")]
    if not args or {"-h", "--help"} & set(args):
        from mirage.config.describe import print_schema

        print_schema()
        return 0
    dry_run = "--dry-run" in args
    recipe = load_recipe(sweep_arguments([arg for arg in args if arg != "--dry-run"], environ=os.environ))
    if recipe.tracking.console == "json":
        claim_stdout()
    if dry_run:
        from mirage.training.plan import print_plan

        print_plan(recipe)
        return 0

    from mirage.training.launch import prepare_process

    prepare_process(recipe)

    from mirage.evals.hook import EvalCallback
    from mirage.report.callback import ReportCallback
    from mirage.tracking.callback import TrackingCallback
    from mirage.tracking.run_console import ConsoleCallback
    from mirage.training.export_callback import ExportCallback
    from mirage.training.ledger import LedgerCallback
    from mirage.training.signals import Terminated
    from mirage.training.trainer import Trainer

    callbacks = [ConsoleCallback(), TrackingCallback(), LedgerCallback(), EvalCallback(), ExportCallback()]
    # SIGTERM: what could be saved is saved, and the same command goes on.
    with suppress(Terminated):
        Trainer(recipe, [*callbacks, ReportCallback()]).fit()
    return 0


def leave(code: int) -> NoReturn:
    """End a rank whose work is done: exit functions run, the back ends' threads are not taken down.

    Taking them down aborts a rank now and then (std::terminate, after the last checkpoint and all logging), and the
    launcher then calls a finished run failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_main(lambda: leave(main()))
