"""The parts of the chain as commands that can be killed: what they read, what they leave, what they write aside."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Names of what a part writes before it has its last name.
_ASIDE = (".partial", ".tmp", ".merged", ".building", ".old")
# Of a metrics line: time, speed, memory and what follows from them (docs/dashboard.md, "Speed and time").
_MEASURED = ("second", "mfu", "hfu", "memory", "wait_share", "imbalance_measured")
# Bookkeeping with times or a machine's facts in it, and locks.
_TIMED = ("summary.json", "card.json", "usage.jsonl", "README.md", "report.html")


@dataclass(frozen=True)
class Inputs:
    """What all parts read: made once, never written to again."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def published(self) -> Path:
        return self.folder / "published"

    def run(self, name: str) -> Path:
        """A finished run that a part starts from."""
        return self.folder / "runs" / name


@dataclass(frozen=True)
class Part:
    """One part: its command, run in a folder of its own, whose whole content is its result.

    `arguments` gets the inputs and the address of the judges' server. `progress` counts work that is on disk and only
    grows; `problems` says what is torn at this moment. `template` is copied into the folder before the first start.
    `is_done`: a kill came too late to disturb a command that refuses to run again over what it has made.
    """

    name: str
    arguments: Callable[[Inputs, str], list[str]]
    targets: tuple[str, ...]
    share: float
    progress: Callable[[Path], int]
    problems: Callable[[Path], list[str]]
    environ: Mapping[str, str] | None = None
    template: Callable[[Inputs, Path], None] | None = None
    needs: tuple[str, ...] = ()
    is_done: Callable[[Path], bool] = lambda _folder: False


# Commands


def _module(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def _training(inputs: Inputs, recipe: str, *more: str, max_steps: int = 4) -> list[str]:
    config = ROOT / "recipes/accelerate/cpu2.yaml"
    launch = _module("accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0")
    settings = [
        f"recipe={ROOT}/recipes/{recipe}.yaml", "run_dir=run", f"data.dir={inputs.data}", "model.tiny=null",
        f"model.path={inputs.base}", "preprocessing.image_size=56", "preprocessing.max_tiles=4",
        "data.pack_tokens=512", "train.batch_samples=8", f"train.max_steps={max_steps}", "train.precision=fp32",
        "checkpoint.every_steps=1", "tracking.wandb=off", "tracking.console=plain",
    ]  # fmt: skip
    return [*launch, str(ROOT / "mirage/train.py"), *settings, *more]


EVALUATION = ("eval.tasks=mis_hard,twins", "eval.max_samples=2", "eval.max_new_tokens=6", "eval.max_unscored=0.9")


def _train_full(inputs: Inputs, _: str) -> list[str]:
    # One worker process a rank decodes pictures, to be killed as well.
    return _training(inputs, "tiny_internvl_mis", "eval.mode=off", "data.num_workers=1", "checkpoint.keep_last=9")


def _train_lora(inputs: Inputs, _: str) -> list[str]:
    return _training(inputs, "tiny_internvl_mis_lora", "eval.mode=off", "checkpoint.keep_last=2")


def _train_measured(inputs: Inputs, _: str) -> list[str]:
    return _training(
        inputs, "tiny_internvl_mis", "eval.mode=inline", "checkpoint.keep_last=1", *EVALUATION, max_steps=2,
    )  # fmt: skip


def train_for_worker(inputs: Inputs, _: str) -> list[str]:
    """Leaves a run whose checkpoints wait to be measured."""
    return _training(
        inputs, "tiny_internvl_mis", "eval.mode=worker", "checkpoint.keep_last=1", *EVALUATION, max_steps=2,
    )  # fmt: skip


def _worker(_inputs: Inputs, _: str) -> list[str]:
    return _module("mirage.cli", "worker", "run", "device=cpu", "console=plain")


def _evaluate(inputs: Inputs, _: str) -> list[str]:
    return _module(
        "mirage.cli", "evaluate", str(inputs.base), "out_dir=out", "device=cpu", "console=plain", "batch_size=1",
        f"data_dir={inputs.data}", "tasks=mis_easy,mis_hard,twins,general", "max_new_tokens=24", "max_unscored=0.9",
    )  # fmt: skip


def _judge(inputs: Inputs, address: str) -> list[str]:
    servers = [f"endpoint.base_url={address}", "endpoint.model=tested", "endpoint.concurrency=2", "judge=endpoint"]
    servers += [f"judge_endpoint.base_url={address}", "judge_endpoint.model=judge", "judge_endpoint.concurrency=2"]
    tasks = "tasks=mis_easy,mis_hard,mis_real,twins"
    return _module("mirage.cli", "evaluate", *servers, "out_dir=out", f"data_dir={inputs.data}", tasks, "console=plain")


def _convert(inputs: Inputs, _: str) -> list[str]:
    return _module(
        "mirage.cli", "convert", str(inputs.published), "native", "--layout", "native", "--check",
        "--max-shard-gb", "0.0002",
    )  # fmt: skip


def _export(inputs: Inputs, _: str) -> list[str]:
    return _module("mirage.cli", "export", str(inputs.run("train-lora")), "merged", "--merge")


def _make(_inputs: Inputs, _: str) -> list[str]:
    return _module("tests.faults.tiny_make", "make", "--out", "mis", "--size", "small", "--console", "plain")


def _pipeline(inputs: Inputs, _: str) -> list[str]:
    return _module("tests.faults.tiny_pipeline", str(inputs.folder / "pipeline" / "pipeline.yaml"), "made")


def _parquet(inputs: Inputs, _: str) -> list[str]:
    return _module("data_gen", "export", "--out", str(inputs.folder / "made"), "--parquet", "parquet")


# Progress and wholeness


def _num_lines(folder: Path, *patterns: str) -> int:
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    total = 0
    for path in found:
        with contextlib.suppress(FileNotFoundError):
            total += path.read_bytes().count(b"\n")
    return total


def _lines_of(*patterns: str) -> Callable[[Path], int]:
    return lambda folder: _num_lines(folder, *patterns)


def _num_bytes(*patterns: str) -> Callable[[Path], int]:
    def count(folder: Path) -> int:
        sizes = 0
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            with contextlib.suppress(FileNotFoundError):
                sizes += path.stat().st_size
        return sizes

    return count


def _torn_checkpoints(folder: Path) -> list[str]:
    """READY markers that are not JSON, or whose files are missing or other ones."""
    problems = []
    for ready in folder.glob("run/checkpoint-*/READY"):
        try:
            files = json.loads(ready.read_bytes())["files"]
        except (ValueError, KeyError):
            problems.append(f"{ready.parent.name}: READY is torn")
            continue
        for name, digest in files.items():
            path = ready.parent / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                problems.append(f"{ready.parent.name}: {name} is not the file that READY names")
    return problems


def _torn_json(*patterns: str) -> Callable[[Path], list[str]]:
    """Files that are written whole or not at all, and are no JSON."""

    def look(folder: Path) -> list[str]:
        problems = []
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            try:
                json.loads(path.read_bytes())
            except ValueError:
                problems.append(f"{path.relative_to(folder)} is torn")
            except FileNotFoundError:
                continue
        return problems

    return look


def _torn_run(folder: Path) -> list[str]:
    states = _torn_json("run/*.json", "run/export/export.json", "run/evals/*/state.json", "run/evals/*/results.json")
    return [*_torn_checkpoints(folder), *states(folder)]


def _torn_dataset(name: str) -> Callable[[Path], list[str]]:
    """A dataset folder under its last name with a file missing or altered."""

    def look(folder: Path) -> list[str]:
        from data_gen.store import MANIFEST_FILE, check_files, read_manifest

        if not (folder / name / MANIFEST_FILE).exists():
            return [f"{name} has no manifest"] if (folder / name).exists() else []
        return check_files(folder / name, read_manifest(folder / name), texts_only=False)

    return look


def _torn_weights(name: str) -> Callable[[Path], list[str]]:
    """A model folder under its last name that lacks what the finished one has."""

    def look(folder: Path) -> list[str]:
        target = folder / name
        if not target.exists():
            return []
        return [] if list(target.glob("*.safetensors")) and (target / "config.json").exists() else [f"{name} is torn"]

    return look


# Templates


def _run_to_measure(inputs: Inputs, folder: Path) -> None:
    shutil.copytree(inputs.run("train-for-worker"), folder / "run", symlinks=True)


_TRAIN_TARGETS = ("rank", "ranks", "launcher", "all", "writing", "renamed")
PARTS: tuple[Part, ...] = (
    Part("make", _make, ("command", "child", "all", "writing"), 0.20, _num_bytes(".mis.building/.pictures.jsonl"),
         _torn_dataset("mis")),
    Part("pipeline", _pipeline, ("command", "writing"), 0.15, _lines_of(".made.work/stages/*.jsonl"),
         _torn_dataset("made")),
    Part("parquet", _parquet, ("command", "writing"), 0.05, _num_bytes("*parquet*/**/*"), lambda _: [],
         is_done=lambda folder: (folder / "parquet").exists()),
    Part("train", _train_full, (*_TRAIN_TARGETS, "child"), 0.14, _lines_of("run/metrics*.jsonl"), _torn_run),
    Part("train-lora", _train_lora, _TRAIN_TARGETS, 0.07, _lines_of("run/metrics*.jsonl"), _torn_run),
    Part("train-measured", _train_measured, _TRAIN_TARGETS, 0.04,
         _lines_of("run/metrics*.jsonl", "run/evals/*/answers-*.jsonl"), _torn_run),
    Part("convert", _convert, ("command", "writing"), 0.08, _num_bytes("native.partial/*"), _torn_weights("native"),
         is_done=lambda folder: (folder / "native").exists()),
    Part("export", _export, ("command", "writing"), 0.05, _num_bytes("merged.*/*"), _torn_weights("merged"),
         needs=("train-lora",), is_done=lambda folder: (folder / "merged").exists()),
    Part("evaluate", _evaluate, ("command", "writing"), 0.08, _lines_of("out/answers-*.jsonl"),
         _torn_json("out/results.json")),
    Part("judge", _judge, ("command", "writing"), 0.08, _lines_of("out/answers-*.jsonl", "out/verdicts.jsonl"),
         _torn_json("out/results.json")),
    Part("worker", _worker, ("command", "writing"), 0.06, _lines_of("run/evals/*/answers-*.jsonl"), _torn_run,
         template=_run_to_measure, needs=("train-for-worker",)),
)  # fmt: skip


# Results


def names_aside(folder: Path) -> list[str]:
    """What lies in the folder under a temporary name."""
    found = []
    for parent, folders, files in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in ("tmp", "cache")]
        for name in [*folders, *files]:
            if name.endswith(_ASIDE) or (name.startswith(".") and name.endswith(_ASIDE)):
                found.append(str(Path(parent, name).relative_to(folder)))
    return found


def checkpoints(folder: Path) -> list[str]:
    """Checkpoints that have their last name, READY or not yet."""
    return [path.name for path in folder.glob("run/checkpoint-*")]


def result(folder: Path) -> dict[str, str]:
    """Every file of the folder -> sha256 of what is durable of it, 'present' for what holds times by its nature.

    Locks, the command's own cache and its temporary folder are left out; links are what they point to.
    """
    found = {}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in ("tmp", "cache")]
        for name in [*(n for n in folders if Path(parent, n).is_symlink()), *sorted(files)]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            # What was repeated after a kill is kept aside, and alerts tell of it: both are there after faults only.
            if name.endswith(".lock") or name in ("log.txt", "metrics.rewound.jsonl", "alerts.jsonl"):
                continue
            found[relative] = str(path.readlink()) if path.is_symlink() else _digest(path)
    return found


def _digest(path: Path) -> str:
    if path.name in _TIMED:
        return "present"
    content = path.read_bytes()
    if path.name == "metrics.jsonl":
        lines = [_without_measured(json.loads(line)) for line in content.splitlines()]
        content = "\n".join(sorted(json.dumps(line, sort_keys=True) for line in lines)).encode()
    elif path.name.startswith(("answers-", "verdicts")) or path.parent.name == "stages":
        # In order of arrival, which several calls at a time leave open.
        content = b"\n".join(sorted(content.splitlines()))
    return hashlib.sha256(content).hexdigest()


def _without_measured(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not any(word in key for word in _MEASURED)}
