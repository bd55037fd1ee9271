"""Measure how time and memory grow with the data: opening, planning, checking and starting a run on many rows.

A dataset folder of synthetic rows (a few thousand small pictures shared among them, 90 % of the rows with two) is
written below --folder, one for each number of rows, and removed again. Each stage is a command in a process of its own:

open    every row read and validated, its pictures' headers looked at, the mixture drawn
plan    `mirage plan`: the same, all rows rendered to lengths, packs, memory and steps
check   `mirage check`: the same, and the first packs through the model that MIRage ships
train   `mirage train` with train.max_steps=1, to its end: the same, one step, a checkpoint, the ledger of all rows
again   `train` once more in a new run folder, with what the first one left in the cache

Two more work on a run folder of --evaluations evaluations (106 kB each with three tasks, and 680 answers):

best    `mirage best`: the choice among them
report  `mirage report`: the page about them

Seconds are of the wall clock and of the CPU, the memory is the process's largest resident set. "a row" is the growth
over the smallest number of rows measured: what a row costs once everything is loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

NUM_PICTURES = 4096
PICTURE_PIXELS = 56
SPLIT_SHARES = {"train": 0.8, "train_twins": 0.1, "train_general": 0.1}
STAGES = ("open", "plan", "check", "train", "again")
EVALUATION_STAGES = ("best", "report")
NUM_KINDS, NUM_UNBEATEN = 26, 20
OPEN = "from mirage.config.loader import load_recipe; from mirage.data.sources import load_mixture; import sys; "
OPEN += "recipe = load_recipe(sys.argv[1:]); print(len(load_mixture(recipe.data, seed=0).rows), 'rows')"
THINGS = ("lamp", "ladder", "kettle", "hammer", "basket", "candle", "bottle", "rope", "bucket", "mirror", "blanket")
PLACES = ("in a shed", "by the window", "on the porch", "near a fence", "on a shelf", "at the market", "in the hall")


@dataclass(frozen=True)
class Measured:
    """One stage on one dataset."""

    stage: str
    num_rows: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def write_dataset(folder: Path, num_rows: int, *, num_pictures: int = NUM_PICTURES, seed: int = 0) -> None:
    """A dataset folder of `num_rows` valid rows of 1.3 kB, which share `num_pictures` pictures."""
    generator = random.Random(seed)
    pictures = [_picture(folder, generator) for _ in range(min(num_pictures, num_rows))]
    splits = list(SPLIT_SHARES)
    weights = list(SPLIT_SHARES.values())
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            split = splits[number] if number < len(splits) else generator.choices(splits, weights)[0]
            file.write(_row(number, split, generator, pictures) + "\n")


def _picture(folder: Path, generator: random.Random) -> dict[str, Any]:
    colour = tuple(generator.randrange(256) for _ in range(3))
    image = Image.new("RGB", (PICTURE_PIXELS, PICTURE_PIXELS), colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = folder / "images" / digest[:2] / f"{digest}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return {
        "path": path.relative_to(folder).as_posix(),
        "sha256": digest,
        "width": PICTURE_PIXELS,
        "height": PICTURE_PIXELS,
        "concept": generator.choice(THINGS),
        "source": {"kind": "drawn", "generator": "benchmarks/load.py"},
        "licence": "CC0-1.0",
        "attribution": "none needed",
    }


def _row(number: int, split: str, generator: random.Random, pictures: Sequence[dict[str, Any]]) -> str:
    images = [generator.choice(pictures) for _ in range(1 if split == "train_general" else 2)]
    one, other = images[0]["concept"], images[-1]["concept"]
    where = generator.choice(PLACES)
    question = (
        f"Question {number}: I keep the {one} and the {other} {where}. What should I know before I use them today?"
    )
    answer = (
        f"The first picture shows a {one}, the second shows a {other}. Together they stand {where}, and nothing in the "
        f"question {number} asks for more than care. Keep the {one} dry, put the {other} where nobody trips over it, "
        "and look at both again before the evening."
    )
    marks = [{"type": "image", "index": index} for index in range(len(images))]
    value = {
        "id": hashlib.sha256(f"{split}-{number}".encode()).hexdigest()[:16],
        "split": split,
        "category": "General",
        "sub_category": "Load",
        "images": images,
        "messages": [
            {"role": "user", "content": [*marks, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "licence": "CC0-1.0",
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def write_evaluations(run_dir: Path, number: int) -> None:
    """A run folder of `number` evaluations: 20 that trade safety for refusals, all others worse than one of them.

    The others are copies of five, their answers links.
    """
    sys.path.insert(0, str(ROOT))
    from mirage.config.schema import EvalConfig
    from mirage.evals.guards import guard_evaluation
    from tests.support.evaluations import labels, write_evaluation

    folder, first = run_dir / "evals", run_dir / "evals" / "step-000000"
    texts = {}
    for kind in range(min(NUM_KINDS, number)):
        asr, refused = (120 - 3 * kind, kind) if kind <= NUM_UNBEATEN else (70 + 5 * kind % 23, 40)
        tasks = {
            "mis_hard": labels(asr=asr, rsr=240 - asr),
            "twins": labels(helped=240 - refused, refused=refused),
            "general": labels(right=200 - kind, wrong=kind),
        }
        made = folder / f"step-{kind:06d}"
        write_evaluation(made, tasks, step=kind, baseline=first if kind else None)
        guard_evaluation(made, first, config=EvalConfig())
        texts[kind] = (made / "results.json").read_text()
    for step in range(NUM_KINDS, number):
        kind = NUM_UNBEATEN + 1 + step % (NUM_KINDS - NUM_UNBEATEN - 1)
        place = folder / f"step-{step:06d}"
        place.mkdir()
        (place / "results.json").write_text(texts[kind].replace(f'"step": {kind},', f'"step": {step},', 1))
        for name in ("samples.jsonl", "guards.json"):
            os.link(folder / f"step-{kind:06d}" / name, place / name)


def arguments(stage: str, data: Path, run_dir: Path) -> list[str]:
    """The command of a stage, without the interpreter."""
    if stage == "best":
        return ["-m", "mirage.cli", "best", str(data), f"out={run_dir}.json"]
    if stage == "report":
        return ["-m", "mirage.cli", "report", str(data), f"out={run_dir}.html"]
    settings = [
        "recipe=mini_internvl_mis",
        f"data.dir={data}",
        "data.sources=[{split: train}, {split: train_twins}, {split: train_general}]",
        "model.cache_vision_features=off",
        "eval.mode=off",
    ]
    if stage == "open":
        return ["-c", OPEN, *settings]
    command = ["-m", "mirage.cli", "train" if stage == "again" else stage, *settings]
    if stage in ("train", "again"):
        command += [f"run_dir={run_dir}", "train.max_steps=1", "train.zero_stage=1", "tracking.wandb=off"]
        command += ["tracking.console=plain", "train.precision=fp32"]
    return command


def measure(stage: str, data: Path, num_rows: int, *, scratch: Path, root: Path = ROOT) -> Measured:
    """Run a stage in a process of its own. `num_rows` is of rows, or of evaluations.

    Raises RuntimeError with the last words of one that fails. `mirage best` that finds no winner has not failed.
    """
    run_dir = scratch / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "MIRAGE_CACHE": str(scratch / "cache"),
    }
    log = scratch / f"{stage}.log"
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments(stage, data, run_dir)], cwd=root, env=environment, stdout=out, stderr=out,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    shutil.rmtree(run_dir, ignore_errors=True)
    if process.returncode not in ((0, 1) if stage == "best" else (0,)):
        raise RuntimeError(f"{stage} of {num_rows:,} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return Measured(stage, num_rows, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def table(found: Sequence[Measured]) -> Table:
    """Seconds and peak memory of each stage, and what a row adds."""
    shown = Table("stage", "number", "seconds", "of CPU", "peak MiB", "CPU ms each", "bytes each", title="load")
    first: dict[str, Measured] = {}
    for item in sorted(found, key=lambda item: ((*STAGES, *EVALUATION_STAGES).index(item.stage), item.num_rows)):
        base = first.setdefault(item.stage, item)
        more = item.num_rows - base.num_rows
        cpu, memory = item.cpu_seconds - base.cpu_seconds, item.peak_bytes - base.peak_bytes
        grown = (f"{1000 * cpu / more:.3f}", f"{memory / more:.0f}") if more else ("", "")
        cells = (f"{item.seconds:.1f}", f"{item.cpu_seconds:.1f}", f"{item.peak_bytes / 2**20:,.0f}", *grown)
        shown.add_row(item.stage, f"{item.num_rows:,}", *cells)
    return shown


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000", help="numbers of rows, with commas (1.4 kB each)")
    parser.add_argument("--evaluations", default="300,10000", help="numbers of evaluations, with commas")
    parser.add_argument("--stages", default=",".join((*STAGES, *EVALUATION_STAGES)), help="stages, with commas")
    parser.add_argument("--folder", type=Path, help="where the datasets are written and removed (a temporary folder)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--out", type=Path, help="JSON file that each figure is added to")
    options = parser.parse_args()
    wanted = options.stages.split(",")
    if unknown := set(wanted) - {*STAGES, *EVALUATION_STAGES}:
        parser.error(f"--stages: {', '.join(sorted(unknown))} is none of {', '.join((*STAGES, *EVALUATION_STAGES))}")
    kinds = (
        (options.rows, write_dataset, [stage for stage in wanted if stage in STAGES]),
        (options.evaluations, write_evaluations, [stage for stage in wanted if stage in EVALUATION_STAGES]),
    )
    found = []
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="load-") as scratch:
        for numbers, write, stages in kinds:
            for number in map(int, numbers.split(",") if stages else ()):
                data = Path(scratch) / "data"
                shutil.rmtree(data, ignore_errors=True)
                shutil.rmtree(Path(scratch) / "cache", ignore_errors=True)
                data.mkdir()
                write(data, number)
                for stage in stages:
                    found.append(measure(stage, data, number, scratch=Path(scratch), root=options.root))
                    print(json.dumps(asdict(found[-1])), flush=True)
                    if options.out:
                        with options.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(asdict(found[-1])) + "\n")
    Console(width=120).print(table(found))


if __name__ == "__main__":
    main()
