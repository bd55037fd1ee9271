"""Measure how time and memory grow with the data: opening, planning, checking and starting a run on many rows.

A dataset folder of synthetic rows (a few thousand small pictures shared among them, 90 % of the rows with two) is
written below --folder, one for each number of rows, and removed again. Each stage is a command in a process of its own:

open    every row read and validated, its pictures' headers looked at, the mixture drawn
plan    `mirage plan`: the same, all rows rendered to lengths, packs, memory and steps
check   `mirage check`: the same, and the first packs through the model that MIRage ships
train   `mirage train` with train.max_steps=1, to its end: the same, one step, a checkpoint, the ledger of all rows

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
STAGES = ("open", "plan", "check", "train")
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


def arguments(stage: str, data: Path, run_dir: Path) -> list[str]:
    """The command of a stage, without the interpreter."""
    settings = [
        "recipe=mini_internvl_mis",
        f"data.dir={data}",
        "data.sources=[{split: train}, {split: train_twins}, {split: train_general}]",
        "model.cache_vision_features=off",
        "eval.mode=off",
    ]
    if stage == "open":
        return ["-c", OPEN, *settings]
    command = ["-m", "mirage.cli", stage, *settings]
    if stage == "train":
        command += [f"run_dir={run_dir}", "train.max_steps=1", "train.zero_stage=1", "tracking.wandb=off"]
        command += ["tracking.console=plain", "train.precision=fp32"]
    return command


def measure(stage: str, data: Path, num_rows: int, *, scratch: Path, root: Path = ROOT) -> Measured:
    """Run a stage in a process of its own. Raises RuntimeError with its last words where it fails."""
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
    if process.returncode != 0:
        raise RuntimeError(f"{stage} of {num_rows:,} rows ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return Measured(stage, num_rows, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def table(found: Sequence[Measured]) -> Table:
    """Seconds and peak memory of each stage, and what a row adds."""
    shown = Table("stage", "rows", "seconds", "of CPU", "peak MiB", "CPU ms a row", "bytes a row", title="load")
    first: dict[str, Measured] = {}
    for item in sorted(found, key=lambda item: (STAGES.index(item.stage), item.num_rows)):
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
    parser.add_argument("--stages", default=",".join(STAGES), help="stages, with commas")
    parser.add_argument("--folder", type=Path, help="where the datasets are written and removed (a temporary folder)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--out", type=Path, help="JSON file that each figure is added to")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="load-") as scratch:
        for num_rows in map(int, options.rows.split(",")):
            data = Path(scratch) / "data"
            shutil.rmtree(data, ignore_errors=True)
            data.mkdir()
            write_dataset(data, num_rows)
            for stage in options.stages.split(","):
                found.append(measure(stage, data, num_rows, scratch=Path(scratch), root=options.root))
                print(json.dumps(asdict(found[-1])), flush=True)
                if options.out:
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(found[-1])) + "\n")
    Console(width=120).print(table(found))


if __name__ == "__main__":
    main()
