"""Many damaged documents through every reader, on several processes, with a table of what became of them.

    python -m tests.fuzz.campaign --cases 100000 --seed 0 --out DIR [--readers rows,recipe] [--jobs 8]

A case is a number: the same number, seed and reader make the same bytes. Each case has its own time limit (the table
shows processor time). Peak memory is traced (`tracemalloc`) on one case in fifty, and the growth of the process's
resident size is taken over all. The bytes of a failing case are written to DIR/failures/READER-NUMBER, beside them what
was raised. Finished shares of the cases are kept in DIR/shares: the same command goes on where it was stopped, and with
more cases it does the rest. A reader whose packages are missing is skipped and said to be. Exit status 1 if any case
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from mirage.files import write_atomic

# Of the processor, which a busy machine does not stretch, and of the clock, for what waits and does nothing.
CASE_SECONDS, CASE_WALL_SECONDS = 10.0, 60.0
# Traced memory of one case: a constant, and so much for each byte of the document.
MEMORY_BYTES, MEMORY_PER_BYTE = 64 * 1024**2, 100
TRACE_EVERY = 50
MAX_MESSAGE_CHARS = 8_000
MAX_SAVED = 20
SHARE_CASES = 10_000
# What the processes of the shares find loaded.
LIBRARIES = ["torch", "transformers", "datasets", "tests.fuzz.readers"]
# Writing a file over on a disk takes longer than most readers.
MEMORY_FOLDER = "/dev/shm"


class Hang(BaseException):
    """A case took longer than it may. No Exception, so that no reader catches it."""


@dataclass
class Tally:
    """What became of a reader's cases."""

    reader: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    slowest_seconds: float = 0.0
    slowest_case: int = -1
    peak_traced_bytes: int = 0
    grown_resident_bytes: int = 0
    seconds: float = 0.0
    skipped: str = ""
    """Why the reader was left out: a package that this machine does not have."""
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in another share of the same reader's cases."""
        for name in ("cases", "accepted", "refused", "failed", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.slowest_seconds > self.slowest_seconds:
            self.slowest_seconds, self.slowest_case = other.slowest_seconds, other.slowest_case
        self.peak_traced_bytes = max(self.peak_traced_bytes, other.peak_traced_bytes)
        self.grown_resident_bytes = max(self.grown_resident_bytes, other.grown_resident_bytes)
        self.skipped = self.skipped or other.skipped
        self.failures += other.failures


class Bench:
    """One reader with a folder of its own to damage, again and again."""

    def __init__(self, name: str, root: Path) -> None:
        from tests.fuzz.readers import READERS

        self.reader = READERS[name]
        self.folder = root / name / "folder"
        # Readers that unpack pictures keep them in the cache.
        os.environ["MIRAGE_CACHE"] = str(root / name / "cache")
        self.reader.make(self.folder)
        self.path = self.folder / self.reader.file
        self.good = self.path.read_bytes()
        self._before = self._files()

    def _files(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if path.is_file()}

    def case(self, seed: int, number: int) -> bytes:
        """The document of a case; 0 is the good one."""
        from tests.fuzz.mutate import mutate

        if number == 0:
            return self.good
        return mutate(Random(f"{seed} {self.reader.name} {number}"), self.good, self.reader.kind)

    def read(self, content: bytes) -> str | None:
        """Write and read a document: 'accepted', 'refused', or raise what a reader must not raise."""
        from mirage.errors import UserError

        self.path.write_bytes(content)
        try:
            self.reader.read(self.folder)
        except UserError as error:
            self._check_message(str(error))
            return "refused"
        except self.reader.refusals as error:
            assert not isinstance(error, UserError) and str(error).encode("utf-8")
            return "refused"
        return "accepted"

    def _check_message(self, message: str) -> None:
        message.encode("utf-8")
        assert 0 < len(message) <= MAX_MESSAGE_CHARS, f"a message of {len(message)} characters"
        known = (str(self.folder), self.path.name, self.path.stem)
        if self.reader.names_file:
            assert any(name in message for name in known), f"does not name the file: {message[:300]}"

    def clean(self) -> None:
        """Remove what reading has written beside the document."""
        shutil.rmtree(os.environ["MIRAGE_CACHE"], ignore_errors=True)
        for path in self._files() - self._before:
            path.unlink()


@contextlib.contextmanager
def time_limit(seconds: float, *, wall_seconds: float) -> Iterator[None]:
    """Raise `Hang` in the block after so much processor time, or so much time at all."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise Hang

    limits = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, wall_seconds))
    before = [signal.signal(signum, ring) for signum, _, _ in limits]
    for _, timer, limit in limits:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (signum, timer, _), handler in zip(limits, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(signum, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Readers may warn and log; afterwards both are as they were."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def run_share(name: str, seed: int, numbers: range, out: str) -> Tally:
    """These cases of one reader, in this process."""
    tally = Tally(name)
    scratch = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
    with _quiet(), tempfile.TemporaryDirectory(dir=scratch) as root:
        try:
            bench = Bench(name, Path(root).resolve())
            # What is loaded at first use is no case's memory.
            bench.read(bench.good)
        except ImportError as error:
            tally.skipped = str(error)
            return tally
        except Exception as error:
            tally.cases = tally.failed = 1
            tally.failures.append({"case": 0, "raised": f"the good document is not read: {error!r}"})
            return tally
        resident = _resident_bytes()
        began = time.perf_counter()
        for number in numbers:
            content = bench.case(seed, number)
            _run_case(bench, number, content, tally, Path(out))
            if number % 500 == 0:
                bench.clean()
        tally.seconds = time.perf_counter() - began
        tally.grown_resident_bytes = max(0, _resident_bytes() - resident)
    return tally


def _run_case(bench: Bench, number: int, content: bytes, tally: Tally, out: Path) -> None:
    traced = number % TRACE_EVERY == 0
    peak = 0
    began = time.process_time()
    try:
        with time_limit(CASE_SECONDS, wall_seconds=CASE_WALL_SECONDS):
            if traced:
                tracemalloc.start()
            ended = bench.read(content)
        if number == 0:
            assert ended == "accepted", "the good document is refused"
    except (Exception, Hang):
        ended = "failed"
        _save(bench, number, content, tally, out)
    took = time.process_time() - began
    if traced:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if ended != "failed" and peak > MEMORY_BYTES + MEMORY_PER_BYTE * len(content):
            ended = "failed"
            tally.failures.append({"case": number, "raised": f"{peak} bytes for a document of {len(content)}"})
    tally.cases += 1
    setattr(tally, str(ended), getattr(tally, str(ended)) + 1)
    tally.peak_traced_bytes = max(tally.peak_traced_bytes, peak)
    if took > tally.slowest_seconds:
        tally.slowest_seconds, tally.slowest_case = took, number


def _save(bench: Bench, number: int, content: bytes, tally: Tally, out: Path) -> None:
    text = traceback.format_exc()
    last = text.strip().splitlines()[-1]
    if len(tally.failures) < MAX_SAVED:
        folder = out / "failures"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{bench.reader.name}-{number}").write_bytes(content)
        (folder / f"{bench.reader.name}-{number}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
        tally.failures.append({"case": number, "raised": last[:500]})


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Share = tuple[str, int, range]


def run(names: Sequence[str], *, cases: int, seed: int, jobs: int, out: Path) -> list[Tally]:
    """The campaign; shares of a reader's cases go to processes of their own, `jobs` at a time."""
    starts = range(0, cases, SHARE_CASES)
    shares = [(name, seed, range(start, min(start + SHARE_CASES, cases))) for name in names for start in starts]
    tallies = {name: Tally(name) for name in names}
    for tally in _alone(shares, out) if jobs == 1 else _in_processes(shares, jobs, out):
        tallies[tally.reader].add(tally)
        if jobs > 1:
            print(f"{tally.reader}: {tallies[tally.reader].cases} of {cases}", file=sys.stderr, flush=True)
    return list(tallies.values())


def _file(share: Share, out: Path) -> Path:
    name, seed, numbers = share
    return out / "shares" / f"{name}-seed-{seed}-{numbers.start}-{numbers.stop}.json"


def _finished(share: Share, out: Path) -> Tally | None:
    """What became of a share that is done; one with failures is run again."""
    file = _file(share, out)
    tally = Tally(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    return None if tally is None or tally.failed or tally.skipped else tally


def _run_into(share: Share, out: Path) -> None:
    file = _file(share, out)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(asdict(run_share(*share, str(out)))))


def _alone(shares: Sequence[Share], out: Path) -> Iterator[Tally]:
    for share in shares:
        if _finished(share, out) is None:
            _run_into(share, out)
        yield Tally(**json.loads(_file(share, out).read_text(encoding="utf-8")))


def _in_processes(shares: Sequence[Share], jobs: int, out: Path) -> Iterator[Tally]:
    """The shares' tallies as they come. A process that dies, by a fault in a library's own code say, is a failure."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    waiting, running = [], {}
    for share in shares:
        found = _finished(share, out)
        if found is not None:
            yield found
        else:
            waiting.insert(0, share)
    while waiting or running:
        while waiting and len(running) < jobs:
            share = waiting.pop()
            process = context.Process(target=_run_into, args=(share, out))
            process.start()
            running[process] = share
        multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [process for process in running if process.exitcode is not None]:
            share = running.pop(process)
            if process.exitcode == 0:
                yield Tally(**json.loads(_file(share, out).read_text(encoding="utf-8")))
            else:
                ended = f"a process ended with {process.exitcode}; its cases: {share[2]}"
                yield Tally(share[0], cases=1, failed=1, failures=[{"case": -1, "raised": ended}])


def table(tallies: Sequence[Tally]) -> str:
    """The results, a line a reader."""
    lines = [
        f"{'reader':<28}{'cases':>9}{'accepted':>10}{'refused':>9}{'failed':>8}{'us/case':>9}{'slowest s':>11}"
        f"{'traced MiB':>12}{'grown MiB':>11}"
    ]
    for tally in tallies:
        each = tally.seconds / max(1, tally.cases) * 1e6
        if tally.skipped:
            lines.append(f"{tally.reader:<28}skipped: {tally.skipped}")
            continue
        lines.append(
            f"{tally.reader:<28}{tally.cases:>9}{tally.accepted:>10}{tally.refused:>9}{tally.failed:>8}{each:>9.0f}"
            f"{tally.slowest_seconds:>11.3f}{tally.peak_traced_bytes / 2**20:>12.1f}"
            f"{tally.grown_resident_bytes / 2**20:>11.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print, write `campaign.json`."""
    parser = argparse.ArgumentParser(description="fuzz every reader of outside bytes")
    parser.add_argument("--cases", type=int, default=100_000, help="cases a reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default="", help="names, comma-separated; all if left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results and failing documents")
    given = parser.parse_args(arguments)
    from tests.fuzz.readers import READERS

    names = [name for name in given.readers.split(",") if name] or list(READERS)
    unknown = [name for name in names if name not in READERS]
    if unknown:
        parser.error(f"no reader {', '.join(unknown)}; there are {', '.join(READERS)}")
    tallies = run(names, cases=given.cases, seed=given.seed, jobs=given.jobs, out=given.out)
    given.out.mkdir(parents=True, exist_ok=True)
    result = {"cases": given.cases, "seed": given.seed, "readers": [asdict(tally) for tally in tallies]}
    (given.out / "campaign.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(tallies))
    for tally in tallies:
        for failure in tally.failures[:5]:
            print(f"{tally.reader} case {failure['case']}: {failure['raised']}")
    return 1 if any(tally.failed for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
