"""`make experiment`: the paper's comparison on tiny models, run after run, and then its results and page."""

from __future__ import annotations

import argparse
import shlex
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol

from rich.console import Console

from mirage.errors import UserError, run_main
from mirage.miniature.conditions import CONDITIONS, FAMILIES, SEEDS
from mirage.miniature.launcher import LOG_FILE, Launcher, last_words
from mirage.miniature.plan import DATA_DIR, Job, Options, commands, note_base, plan_jobs, quick, state
from mirage.tracking.console import make_console

OUT = Path("runs/experiment")
QUICK_OUT = Path("runs/experiment-quick")
# Seconds a run on two cores of a server CPU, until one has been timed here.
_GUESSED_SECONDS = 240.0


class Runs(Protocol):
    """What starts commands: `Launcher`, or a test's."""

    def run(self, command: Sequence[str], *, log: Path, one_core: bool) -> int: ...

    def stop(self) -> None: ...


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet, then write results and page; 1 where a run has failed. Raises `UserError`."""
    arguments = _parser().parse_args(argv)
    options = _options(arguments)
    jobs = plan_jobs(options)
    if arguments.dry_run:
        for job in jobs:
            print(shlex.join(commands(job, now=_state_or_open(job))))
        return 0
    # As Ctrl-C: the runs are ended too, and nothing goes on that holds their folders.
    signal.signal(signal.SIGTERM, _interrupt)
    console = make_console("rich")
    launcher = Launcher()
    make_data(options.data_dir, launcher, console)
    num_failed = run_jobs(jobs, launcher, lanes=options.lanes, console=console)
    if not arguments.no_page:
        _write_page(options, arguments, console)
    return 1 if num_failed else 0


def _interrupt(*_: object) -> None:
    """Raised here and not by SIGINT, which a shell lets its background jobs ignore."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mirage.miniature.experiment",
        description="Re-run the paper's comparison on tiny models; the same command again goes on where it was.",
    )
    parser.add_argument("--quick", action="store_true", help="one family, one seed, four conditions, few samples")
    parser.add_argument("--families", type=_words, default=FAMILIES, help=f"some of {','.join(FAMILIES)}")
    parser.add_argument("--seeds", type=_seeds, default=SEEDS, help="seeds of the training runs (default: 0,1,2)")
    parser.add_argument("--conditions", type=_words, default=tuple(CONDITIONS), help=f"some of {','.join(CONDITIONS)}")
    parser.add_argument("--out", type=Path, help=f"folder of the runs (default: {OUT})")
    parser.add_argument("--data", type=Path, default=DATA_DIR, help=f"dataset folder (default: {DATA_DIR})")
    parser.add_argument(
        "--lanes", type=int, choices=(1, 2), default=1, help="2: two runs side by side, each one process on one core"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the commands and start nothing")
    parser.add_argument("--no-page", action="store_true", help="leave results file and page as they are")
    parser.add_argument(
        "--docs", type=Path, help="folder for results file, figures and page (default: docs; --quick: the out folder)"
    )
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _seeds(text: str) -> tuple[int, ...]:
    if not all(part.isascii() and part.isdigit() for part in _words(text)) or not _words(text):
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, found {text!r}")
    return tuple(int(part) for part in _words(text))


def _options(arguments: argparse.Namespace) -> Options:
    unknown = [name for name in arguments.families if name not in FAMILIES]
    if unknown or not arguments.families:
        raise UserError(f"--families {','.join(arguments.families)}: must name some of {', '.join(FAMILIES)}")
    options = Options(
        out=arguments.out or (QUICK_OUT if arguments.quick else OUT),
        families=arguments.families,
        seeds=arguments.seeds,
        conditions=arguments.conditions,
        lanes=arguments.lanes,
        data_dir=arguments.data,
    )
    return quick(options) if arguments.quick else options


def _state_or_open(job: Job) -> str:
    try:
        found = state(job)
    except UserError:
        return "open"
    return "open" if found == "done" else found


def make_data(data_dir: Path, launcher: Runs, console: Console) -> None:
    """Write the dataset unless it is there. Raises `UserError` where that fails."""
    if (data_dir / "manifest.json").is_file():
        return
    console.print(f"making {data_dir} ...")
    log = data_dir.with_name(f"{data_dir.name}-{LOG_FILE}")
    command = ["python", "-m", "data_gen", "make", "--out", str(data_dir), "--size", "mini", "--seed", "0"]
    if launcher.run(command, log=log, one_core=False) != 0:
        raise UserError(f"{data_dir} could not be made: {last_words(log)} ({log})")


def run_jobs(jobs: Sequence[Job], launcher: Runs, *, lanes: int, console: Console) -> int:
    """Run each job that is not done, `lanes` at a time; returns how many failed. One failure stops no other run."""
    board = Board(jobs, lanes=lanes, console=console)
    pool = ThreadPoolExecutor(max_workers=lanes)
    waiting: dict[Future[str | None], Job] = {}
    try:
        for job in board.open_jobs():
            waiting[pool.submit(_run_job, job, launcher, board)] = job
        for done in as_completed(waiting):
            board.ended(waiting[done], failure=done.result())
    except KeyboardInterrupt:
        for future in waiting:
            future.cancel()
        launcher.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    board.say_end()
    return len(board.failures)


def _run_job(job: Job, launcher: Runs, board: Board) -> str | None:
    """Run one job to its end; what went wrong, or None."""
    board.started(job)
    log = job.folder / LOG_FILE
    try:
        now = state(job)
        if now == "open" and job.condition.recipe is not None:
            note_base(job)
        code = launcher.run(commands(job, now=now), log=log, one_core=job.options.lanes > 1)
        if now == "open" and state(job) == "measure":  # trained before, with fewer tasks
            code = launcher.run(commands(job, now="measure"), log=log, one_core=job.options.lanes > 1)
        if code == 0 and state(job) == "done":
            return None
    except UserError as error:
        return str(error)
    return f"exit code {code}: {last_words(log) or 'no result was written'} ({log})"


class Board:
    """Says what is done, what runs and about how long the rest takes."""

    def __init__(self, jobs: Sequence[Job], *, lanes: int, console: Console) -> None:
        self._jobs, self._lanes, self._console = list(jobs), lanes, console
        self._begun: dict[str, float] = {}
        self._seconds: list[float] = []
        self._num_done = 0
        self.failures: dict[str, str] = {}

    def open_jobs(self) -> list[Job]:
        """The jobs to run; those that are done are counted, and those whose folder holds something else have failed."""
        found = []
        for job in self._jobs:
            try:
                if state(job) == "done":
                    self._num_done += 1
                else:
                    found.append(job)
            except UserError as error:
                self.failures[job.name] = str(error)
                self._say(f"[bold red]{job.name} cannot run[/]: ", str(error))
        self._console.print(
            f"{len(self._jobs)} runs: {self._num_done} done, {len(found)} to do, about {self._left(len(found))}"
        )
        return found

    def started(self, job: Job) -> None:
        self._begun[job.name] = time.monotonic()
        self._console.print(f"  {job.name}: running, log in {job.folder / LOG_FILE}", soft_wrap=True)

    def ended(self, job: Job, *, failure: str | None) -> None:
        seconds = time.monotonic() - self._begun[job.name]
        if failure is not None:
            self.failures[job.name] = failure
            self._say(f"[bold red]{job.name} failed[/] after {_minutes(seconds)}: ", failure)
            return
        self._num_done += 1
        if job.seed is not None:
            self._seconds.append(seconds)
        left = len(self._jobs) - self._num_done - len(self.failures)
        self._console.print(
            f"  {job.name}: done in {_minutes(seconds)}; {self._num_done} of {len(self._jobs)}, "
            f"about {self._left(left)} left"
        )

    def say_end(self) -> None:
        """The last line: all is there, or what is missing and how to go on."""
        if not self.failures:
            self._console.print(f"all {len(self._jobs)} runs are done")
            return
        names = ", ".join(self.failures)
        self._console.print(
            f"{self._num_done} of {len(self._jobs)} runs are done, {len(self.failures)} failed ({names}); the same "
            "command tries these again",
            soft_wrap=True,
        )

    def _left(self, num_jobs: int) -> str:
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else _GUESSED_SECONDS * self._lanes
        return _minutes(num_jobs * mean / self._lanes)

    def _say(self, marked: str, text: str) -> None:
        self._console.print(marked, end="")
        self._console.print(text, markup=False, soft_wrap=True)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _write_page(options: Options, arguments: argparse.Namespace, console: Console) -> None:
    from mirage.miniature.page import write_page
    from mirage.miniature.results import collect, write_results_file

    docs = arguments.docs or (options.out / "docs" if arguments.quick else Path("docs"))
    found = collect(options.out, data_dir=options.data_dir)
    if not found["runs"]:
        console.print("no run is done, so there is no page to write")
        return
    file = write_results_file(found, docs / "experiment" / "results.json")
    written = write_page(file, docs=docs)
    console.print(f"results: {file}; page: {written}")


if __name__ == "__main__":
    run_main(main)
