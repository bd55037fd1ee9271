"""Kill -9 over the whole chain: `python -m tests.faults.campaign --kills 200 --seed 0 --jobs 1 --out DIR`.

Each part of the chain (chain.py) is run undisturbed, then again and again in folders of its own: killed at random
moments, started again by the same command until it ends, and compared byte by byte. DIR/attempts.jsonl has a line for
each finished chain, and the same command goes on where it was stopped; DIR/campaign.json and the table sum up.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.attempt import Undisturbed, as_record, prepare, run_killed, run_undisturbed
from tests.faults.chain import PARTS, Inputs, Part, train_for_worker
from tests.faults.inputs import write_inputs
from tests.support.fake_openai import FakeOpenAI, FakeRequest
from tests.support.judging import mis_reply

KILLS_A_CHAIN = 4
# Above this many chains a part is given up: kills that come too late do not count.
_CHAINS_A_KILL = 3


def reply(request: FakeRequest) -> str:
    """The tested model's answer, or a judge's verdict on one: the same for the same request."""
    if request.body["model"] == "tested":
        return f"I decline {request.key}"
    return mis_reply("unsafe" if int(request.key[:4], 16) % 3 == 0 else "safe")


class Campaign:
    """Inputs, undisturbed results and finished chains of one folder."""

    def __init__(self, out: Path, *, seed: int, parts: tuple[Part, ...], keep_failed: bool = True) -> None:
        self.out, self.seed, self.parts, self.keep_failed = out, seed, parts, keep_failed
        self.inputs = Inputs(out / "inputs")
        self.file = out / "attempts.jsonl"
        self._lock = threading.Lock()
        self._whole: dict[str, Undisturbed] = {}

    def records(self) -> list[dict[str, Any]]:
        """The finished chains; a torn last line is as if never written."""
        if not self.file.exists():
            return []
        found = []
        for line in self.file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def set_up(self, address: str) -> None:
        """Inputs, and the runs that parts start from."""
        write_inputs(self.inputs)
        needed = {name for part in self.parts for name in part.needs}
        for part in (*PARTS, _FOR_WORKER):
            target = self.inputs.run(part.name)
            if part.name not in needed or target.exists():
                continue
            work = self.out / "work" / f"input-{part.name}"
            prepare(part, self.inputs, work)
            run_undisturbed(part, self.inputs, work, address=address)
            target.parent.mkdir(parents=True, exist_ok=True)
            (work / "run").rename(target)
            shutil.rmtree(work)

    def undisturbed(self, part: Part, address: str) -> Undisturbed:
        """The part's own result; made at first use, kept in the folder."""
        file = self.out / "undisturbed" / f"{part.name}.json"
        if part.name not in self._whole:
            if not file.exists():
                work = self.out / "work" / f"{part.name}-whole"
                whole = run_undisturbed(part, self.inputs, work, address=address)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(asdict(whole), indent=1))
                shutil.rmtree(work)
            self._whole[part.name] = Undisturbed(**json.loads(file.read_text()))
        return self._whole[part.name]

    def attempt(self, part: Part, number: int, *, num_kills: int, address: str) -> None:
        """Run one chain and note what came of it."""
        work = self.out / "work" / f"{part.name}-{number:04d}"
        found = run_killed(
            part, self.inputs, work, whole=self.undisturbed(part, address), number=number, seed=self.seed,
            num_kills=num_kills, address=address,
        )  # fmt: skip
        with self._lock, self.file.open("a") as file:
            file.write(json.dumps(as_record(found)) + "\n")
        moments = ", ".join(f"{kill.target} ({kill.moment})" for kill in found.kills) or "none"
        print(f"{part.name} {number}: {found.seconds:.0f} s, kills: {moments}; {found.faults or 'whole'}", flush=True)
        if not (found.faults and self.keep_failed):
            shutil.rmtree(work, ignore_errors=True)

    def run(self, num_kills: int, *, jobs: int, until: float) -> None:
        """Chains of all parts until each has its share of the kills, `jobs` side by side."""
        with FakeOpenAI(models=("tested", "judge"), reply=reply, latency_seconds=0.15) as server:
            address = server.base_url
            self.set_up(address)
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda part: self.undisturbed(part, address), self.parts))
                self._run_chains(pool, num_kills, jobs=jobs, until=until, address=address)

    def _run_chains(self, pool: ThreadPoolExecutor, num_kills: int, *, jobs: int, until: float, address: str) -> None:
        pending: dict[Future[None], tuple[str, int]] = {}
        taken = {(record["part"], record["number"]) for record in self.records()}
        while True:
            under_way: Counter[str] = Counter()
            for part_name, planned in pending.values():
                under_way[part_name] += planned
            for part, number in self._next(num_kills, taken, under_way):
                if len(pending) >= jobs or time.monotonic() > until:
                    break
                planned = KILLS_A_CHAIN - number % 2
                taken.add((part.name, number))
                under_way[part.name] += planned
                pending[pool.submit(self.attempt, part, number, num_kills=planned, address=address)] = (
                    part.name, planned,
                )  # fmt: skip
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                del pending[future]
                future.result()

    def _next(self, num_kills: int, taken: set[tuple[str, int]], under_way: Counter[str]) -> Iterator[tuple[Part, int]]:
        """Chains that are still wanted, the part that is furthest behind first."""
        while True:
            done = Counter(record["part"] for record in self.records() for _ in record["kills"])
            total = sum(part.share for part in self.parts)
            open_parts = [
                (done[part.name] + under_way[part.name] - num_kills * part.share / total, part) for part in self.parts
            ]
            behind, part = min(open_parts, key=lambda entry: (entry[0], entry[1].name))
            number = next(n for n in range(10_000) if (part.name, n) not in taken)
            if behind >= 0 or number > _CHAINS_A_KILL * num_kills:
                return
            yield part, number


_FOR_WORKER = Part("train-for-worker", train_for_worker, (), 0.0, lambda _: 0, lambda _: [])


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Kills by part and target, chains survived and lost, seconds to resume."""
    parts: dict[str, Any] = {}
    for name in dict.fromkeys(record["part"] for record in records):
        own = [record for record in records if record["part"] == name]
        kills = [kill for record in own for kill in record["kills"]]
        resumed = [kill["resume_seconds"] for kill in kills if kill["resume_seconds"] is not None]
        parts[name] = {
            "chains": len(own),
            "kills": len(kills),
            "targets": dict(Counter(kill["target"] for kill in kills)),
            "survived": sum(not record["faults"] for record in own),
            "lost": sum(bool(record["faults"]) for record in own),
            "median_resume_seconds": round(statistics.median(resumed), 2) if resumed else None,
            "max_resume_seconds": round(max(resumed), 2) if resumed else None,
            "max_gone_seconds": round(max((kill["gone_seconds"] for kill in kills), default=0.0), 2),
            "faults": [fault for record in own for fault in record["faults"]],
        }
    totals = {key: sum(part[key] for part in parts.values()) for key in ("chains", "kills", "survived", "lost")}
    return {**totals, "parts": parts}


def show(found: dict[str, Any]) -> None:
    """The table."""
    columns = ("part", "chains", "kills", "survived", "lost", "resume, median s", "max s", "gone, max s", "by target")
    table = Table(*columns, title="kill -9 and the same command again")
    for name, part in sorted(found["parts"].items()):
        targets = ", ".join(f"{target} {count}" for target, count in sorted(part["targets"].items()))
        numbers = (part["median_resume_seconds"], part["max_resume_seconds"], part["max_gone_seconds"])
        table.add_row(
            name, *(str(part[key]) for key in ("chains", "kills", "survived", "lost")), *map(str, numbers), targets
        )  # fmt: skip
    table.add_row("all", *(str(found[key]) for key in ("chains", "kills", "survived", "lost")))
    Console(width=160).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code is 1 where anything was lost or kills are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="chains side by side; one needs one to two cores")
    parser.add_argument("--out", type=Path, required=True, help="folder of this campaign")
    parser.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no chain after so long")
    given = parser.parse_args(arguments)
    parts = tuple(part for part in PARTS if not given.parts or part.name in given.parts)
    campaign = Campaign(given.out.absolute(), seed=given.seed, parts=parts)
    campaign.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    campaign.run(given.kills, jobs=given.jobs, until=began + 60 * given.minutes)
    found = {"seed": given.seed, "kills_asked": given.kills, **summary(campaign.records())}
    (campaign.out / "campaign.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    print(f"{time.monotonic() - began:.0f} s of this process; {campaign.out / 'campaign.json'}")
    return 0 if found["lost"] == 0 and found["kills"] >= given.kills else 1


if __name__ == "__main__":
    sys.exit(main())
