"""One chain: a part's command killed several times at random, finished, and compared with the undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.chain import ROOT, Inputs, Part, checkpoints, names_aside, result
from tests.faults.processes import Command, Member, wait_for

# No command takes so long, on a busy machine either.
COMMAND_SECONDS = 600.0
# From a kill of some processes to the end of all others: torchrun gives ranks 30 s before it kills them.
GONE_SECONDS = 90.0
_WHOLE_TREE = ("all", "writing", "renamed")


@dataclass
class Kill:
    """One kill -9: whom it hit, at which moment, and how long the next start took until it went on with the work."""

    target: str
    moment: str
    num_hit: int
    seconds: float
    gone_seconds: float
    resume_seconds: float | None = None


@dataclass
class Attempt:
    """What came of one chain; it survived where `faults` is empty."""

    part: str
    number: int
    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Undisturbed:
    """A part run without a fault: its result by file, how long it takes to the first work and to the end, and how many
    temporary names were seen meanwhile."""

    result: Mapping[str, str]
    first_seconds: float
    seconds: float
    num_aside: int = 0


def environment(folder: Path) -> dict[str, str]:
    """One thread a process, caches and temporary files within the folder, nothing of this process' launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "RANK", "LOCAL_"))}
    for name in ("tmp", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return kept | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "MIRAGE_CACHE": str(folder / "cache"),
        "TMPDIR": str(folder / "tmp"),
    }


def start(part: Part, inputs: Inputs, folder: Path, *, address: str, mark: str) -> Command:
    """Start the part's command in its folder."""
    environ = environment(folder) | dict(part.environ or {})
    return Command(part.arguments(inputs, address), mark, folder, environ, folder / "log.txt")


def prepare(part: Part, inputs: Inputs, folder: Path) -> None:
    """A new folder for the part."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if part.template is not None:
        part.template(inputs, folder)


def run_undisturbed(part: Part, inputs: Inputs, folder: Path, *, address: str) -> Undisturbed:
    """Run the part once without a fault."""
    prepare(part, inputs, folder)
    command = start(part, inputs, folder, address=address, mark=f"{folder}-whole")
    before = part.progress(folder)
    first: list[float] = []
    aside: set[str] = set()

    def is_over() -> bool:
        aside.update(names_aside(folder))
        if not first and part.progress(folder) > before:
            first.append(command.seconds)
        return command.is_over()

    if not wait_for(is_over, timeout_seconds=COMMAND_SECONDS, step_seconds=0.005):
        command.kill_all()
        raise AssertionError(f"{part.name} did not end by itself in {COMMAND_SECONDS:.0f} s: {_last_words(folder)}")
    seconds = command.seconds
    orphans = command.wait_until_gone(GONE_SECONDS)
    assert command.process.returncode == 0 and not orphans, f"{part.name} fails undisturbed: {_last_words(folder)}"
    return Undisturbed(result(folder), first[0] if first else seconds, seconds, len(aside))


def run_killed(
    part: Part,
    inputs: Inputs,
    folder: Path,
    *,
    whole: Undisturbed,
    number: int,
    seed: int,
    num_kills: int,
    address: str,
    target: str | None = None,
) -> Attempt:
    """Run the part with at most `num_kills` kills, then to its end.

    `target` takes the place of random ones, and is hit as soon as there is work on disk.
    """
    began, chance = time.monotonic(), random.Random(f"{seed} {part.name} {number}")
    attempt = Attempt(part.name, number)
    prepare(part, inputs, folder)
    done = 0
    while not attempt.faults:
        mark = f"{folder}-{done}"
        command = start(part, inputs, folder, address=address, mark=mark)
        try:
            if len(attempt.kills) < num_kills:
                aim = target or chance.choice(part.targets)
                over = _hit(command, part, folder, aim, chance, whole=whole, attempt=attempt, at_once=bool(target))
            else:
                over = _finish(command, part, folder, attempt)
        finally:
            command.kill_all()
        done += 1
        if over:
            break
    if not attempt.faults:
        attempt.faults += _differences(whole.result, result(folder))
        attempt.faults += [f"{name} is left over" for name in names_aside(folder)]
    attempt.seconds = time.monotonic() - began
    return attempt


def _hit(
    command: Command, part: Part, folder: Path, aim: str, chance: random.Random, *, whole: Undisturbed,
    attempt: Attempt, at_once: bool,
) -> bool:  # fmt: skip
    """One start that is to be killed; True where the command ended well before its moment came."""
    before = part.progress(folder)
    last = attempt.kills[-1] if attempt.kills else None
    if at_once:
        _first_work(command, part, folder, before=before, last=last)
        moment = "first work"
    else:
        moment = _wait_for_moment(command, part, folder, aim, chance, whole=whole, before=before, last=last)
    if command.is_over():
        _note_end(command, last)
        return _judge_end(command, folder, attempt)
    hit = _victims(command.members(), aim, chance)
    num_hit, seconds, killed_at = command.kill(hit), command.seconds, time.monotonic()
    orphans = command.wait_until_gone(GONE_SECONDS)
    code = command.process.returncode
    if code == 0 and not orphans:
        # What was killed had done its part already.
        return True
    attempt.kills.append(Kill(aim, moment, num_hit, seconds, time.monotonic() - killed_at))
    attempt.faults += [f"orphan after {aim} was killed: {member.role} {member.text[:160]}" for member in orphans]
    attempt.faults += [f"after {aim} was killed: {problem}" for problem in part.problems(folder)]
    return part.is_done(folder)


def _wait_for_moment(
    command: Command,
    part: Part,
    folder: Path,
    aim: str,
    chance: random.Random,
    *,
    whole: Undisturbed,
    before: int,
    last: Kill | None,
) -> str:
    """Until the moment drawn has come or the command is over; says which moment it is. Notes when work went on."""
    if aim == "renamed" or (aim == "writing" and whole.num_aside):
        look = names_aside if aim == "writing" else checkpoints
        known = set(look(folder))
        # The first, second or third name that comes, and up to 50 ms more to be in the middle of the writing.
        wanted, seen = chance.randint(1, min(3, whole.num_aside or 1)), set(known)
        delay = 0.0 if aim == "renamed" else chance.choice([0.0, chance.uniform(0.0, 0.05)])

        def reached() -> bool:
            seen.update(look(folder))
            if last is None or last.resume_seconds is not None:
                pass
            elif part.progress(folder) > before:
                last.resume_seconds = command.seconds
            return command.is_over() or len(seen - known) >= wanted

        wait_for(reached, timeout_seconds=COMMAND_SECONDS, step_seconds=0.001)
        time.sleep(delay)
        return f"{aim} {wanted}"
    if chance.random() < 0.25:
        limit = chance.uniform(0.0, 0.9 * whole.seconds)
        wait_for(lambda: command.is_over() or command.seconds > limit, timeout_seconds=COMMAND_SECONDS)
        _note_work(command, part, folder, before=before, last=last)
        return f"{limit:.2f} s"
    if _first_work(command, part, folder, before=before, last=last) is None:
        return "end"
    limit = command.seconds + chance.uniform(0.0, 0.8 * (whole.seconds - whole.first_seconds))
    wait_for(lambda: command.is_over() or command.seconds > limit, timeout_seconds=COMMAND_SECONDS)
    return "at work"


def _first_work(command: Command, part: Part, folder: Path, *, before: int, last: Kill | None = None) -> float | None:
    """Seconds from the start to the first work on disk; None where the command ended without any."""
    found: list[float] = []

    def reached() -> bool:
        if part.progress(folder) > before:
            found.append(command.seconds)
            return True
        return command.is_over()

    wait_for(reached, timeout_seconds=COMMAND_SECONDS, step_seconds=0.005)
    if found and last is not None and last.resume_seconds is None:
        last.resume_seconds = found[0]
    return found[0] if found else None


def _note_work(command: Command, part: Part, folder: Path, *, before: int, last: Kill | None) -> None:
    if last is not None and last.resume_seconds is None and part.progress(folder) > before:
        last.resume_seconds = command.seconds


def _victims(members: list[Member], aim: str, chance: random.Random) -> list[int]:
    """Process ids to be killed; where there is none of the role, the whole tree."""
    everybody = [member.pid for member in members]
    if aim in _WHOLE_TREE:
        return everybody
    if aim in ("command", "launcher"):
        return [member.pid for member in members if member.role == "command"]
    fitting = [member.pid for member in members if member.role == ("rank" if aim in ("rank", "ranks") else "child")]
    if not fitting:
        return everybody
    return fitting if aim == "ranks" else [chance.choice(fitting)]


def _finish(command: Command, part: Part, folder: Path, attempt: Attempt) -> bool:
    """The last start, which nobody disturbs."""
    last = attempt.kills[-1] if attempt.kills else None
    _first_work(command, part, folder, before=part.progress(folder), last=last)
    wait_for(command.is_over, timeout_seconds=COMMAND_SECONDS, step_seconds=0.01)
    _note_end(command, last)
    return _judge_end(command, folder, attempt)


def _note_end(command: Command, last: Kill | None) -> None:
    """Where nothing was left to do but to end."""
    if last is not None and last.resume_seconds is None and command.is_over():
        last.resume_seconds = command.seconds


def _judge_end(command: Command, folder: Path, attempt: Attempt) -> bool:
    code = command.process.poll()
    if code != 0:
        attempt.faults.append(f"the same command ended with {code}: {_last_words(folder)}")
    orphans = command.wait_until_gone(GONE_SECONDS)
    attempt.faults += [f"orphan after the end: {member.role} {member.text[:160]}" for member in orphans]
    return True


def _differences(whole: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Files that the undisturbed result has otherwise."""
    missing = [f"{name} is missing" for name in whole if name not in found]
    more = [f"{name} is not in the undisturbed result" for name in found if name not in whole]
    other = [f"{name} has other bytes" for name in whole if name in found and found[name] != whole[name]]
    return [*missing, *more, *other]


def _last_words(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    return " | ".join(lines[-8:])[-1200:]


def as_record(attempt: Attempt) -> dict[str, object]:
    """For JSON."""
    return asdict(attempt)
