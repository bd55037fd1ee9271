"""The experiment's runs in their order: what each one's command is, and whether its folder already holds the result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mirage.config.loader import load_recipe, resolved_json, with_newer_options
from mirage.config.schema import Family, Recipe
from mirage.errors import UserError
from mirage.evals.results import RESULTS_FILE, SAMPLES_FILE
from mirage.files import file_sha256, write_atomic
from mirage.miniature.conditions import (
    BASE,
    CONDITIONS,
    CURVE_EVERY_STEPS,
    CURVE_MAX_SAMPLES,
    CURVE_TASKS,
    FAMILIES,
    MAIN,
    QUICK_CONDITIONS,
    QUICK_MAX_SAMPLES,
    QUICK_TASKS,
    SEEDS,
    Condition,
    family_overrides,
    find_conditions,
    shipped,
)
from mirage.strict_json import read_json_object

DATA_DIR = Path("data/mini")
ROWS_FILE = "rows.jsonl"
REPEAT_SUFFIX = "-again"
BASE_FILE = "base.json"
TRAIN_FILE = "mirage/train.py"
LAUNCH_CONFIG = "recipes/accelerate/cpu2.yaml"
# Sections that may differ between a finished run and the same command now: they change neither weights nor answers.
_FREE = ("tracking", "run_dir", "checkpoint", "name")


@dataclass(frozen=True)
class Options:
    """What of the experiment is run, and where."""

    out: Path
    families: tuple[Family, ...] = FAMILIES
    seeds: tuple[int, ...] = SEEDS
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    lanes: int = 1
    data_dir: Path = DATA_DIR
    tasks: tuple[str, ...] | None = None
    max_samples: int | None = None
    repeat: bool = True

    @property
    def num_processes(self) -> int:
        """Processes of one run: both cores for one run at a time, or one each for runs side by side."""
        return 2 if self.lanes == 1 else 1


def quick(options: Options) -> Options:
    """One family, one seed, the conditions that carry the finding, and few samples of the tasks that show it."""
    return Options(
        out=options.out,
        families=("internvl",),
        seeds=(0,),
        conditions=(BASE, *QUICK_CONDITIONS),
        lanes=options.lanes,
        data_dir=options.data_dir,
        tasks=QUICK_TASKS,
        max_samples=QUICK_MAX_SAMPLES,
        repeat=False,
    )


@dataclass(frozen=True)
class Job:
    """One run: a condition of a family with a seed, or the family's base, which has none."""

    family: Family
    condition: Condition
    seed: int | None
    folder: Path
    options: Options

    @property
    def name(self) -> str:
        """Family, condition and seed in a line."""
        seed = "" if self.seed is None else f" seed {self.seed}"
        return f"{self.family} {self.condition.key}{seed}{' again' if self.is_repeat else ''}"

    @property
    def is_repeat(self) -> bool:
        """Whether it does a run of another folder once more, measured on the way."""
        return self.folder.name.endswith(REPEAT_SUFFIX)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.condition.tasks if self.options.tasks is None else self.options.tasks

    def settings(self) -> list[str]:
        """`recipe=NAME key=value ...` of a trained condition."""
        found = [
            f"recipe={self.condition.recipe}",
            *family_overrides(self.family),
            f"run_dir={self.folder}",
            f"data.dir={self.options.data_dir}",
            f"train.seed={self.seed}",
            f"eval.tasks={','.join(CURVE_TASKS if self.is_repeat else self.tasks)}",
            "eval.at_start=false",
            "tracking.wandb=offline",
            "tracking.console=plain",
        ]
        if self.is_repeat:
            found += [f"checkpoint.every_steps={CURVE_EVERY_STEPS}", f"eval.smoke_samples={CURVE_MAX_SAMPLES}"]
        return found + ([f"eval.max_samples={self.options.max_samples}"] if self.options.max_samples else [])

    def recipe(self) -> Recipe:
        """The recipe as the run loads it. Raises `UserError`."""
        return _load(tuple(self.settings()))

    def measuring(self) -> list[str]:
        """`PATH key=value ...` of `mirage evaluate`: the base, or a trained checkpoint that lacks some task."""
        out_dir = result_folder(self)
        if self.condition.recipe is None:
            main = CONDITIONS[MAIN]
            like = Job(self.family, main, 0, self.folder, self.options).recipe().eval
            path = shipped(self.family)
        else:
            assert out_dir is not None, "the run has no last checkpoint"
            like, path = self.recipe().eval, str(self.folder / f"checkpoint-{out_dir.name.removeprefix('step-')}")
        found = [
            path,
            f"tasks={','.join(self.tasks)}",
            f"data_dir={self.options.data_dir}",
            f"out_dir={out_dir}",
            f"max_new_tokens={like.max_new_tokens}",
            f"batch_size={like.batch_size}",
            "at_start=false",
        ]
        return found + ([f"max_samples={self.options.max_samples}"] if self.options.max_samples else [])


@lru_cache(maxsize=256)
def _load(settings: tuple[str, ...]) -> Recipe:
    return load_recipe(settings)


def plan_jobs(options: Options) -> list[Job]:
    """All runs: a family's base, then all conditions of a seed before the next seed, one family after the other.

    A family ends with one run that has been there before, in a folder of its own: one seed must give one result, also
    where the run is measured on the way.
    Raises `UserError` for an unknown condition.
    """
    jobs = []
    conditions = find_conditions(options.conditions)
    for family in options.families:
        home = options.out / family
        jobs += [Job(family, item, None, home / BASE, options) for item in conditions if item.recipe is None]
        for seed in options.seeds:
            jobs += [
                Job(family, item, seed, home / item.key / f"seed-{seed}", options)
                for item in conditions
                if item.recipe is not None
            ]
        main = [item for item in conditions if item.key == MAIN]
        for seed in options.seeds[:1] if options.repeat else ():
            jobs += [Job(family, item, seed, home / item.key / f"seed-{seed}{REPEAT_SUFFIX}", options) for item in main]
    return jobs


# What a folder holds


def result_folder(job: Job) -> Path | None:
    """Where the evaluation of the base or of the last step lies; None before the training has ended."""
    if job.condition.recipe is None:
        return job.folder
    return last_evaluation(job.folder)


def last_evaluation(run_dir: Path) -> Path | None:
    """The evaluation folder of a run's last step, which the run writes down when it ends; None before."""
    summary = run_dir / "summary.json"
    if not summary.is_file():
        return None
    steps = read_json_object(summary).get("steps")
    return None if steps is None else run_dir / "evals" / f"step-{steps:06d}"


@lru_cache(maxsize=8)
def base_fingerprint(family: Family) -> str:
    """Identity of the shipped base's weights. Raises `UserError` where there are none."""
    from mirage.evals.request import weights_fingerprint
    from mirage.models.registry import find_weights

    return weights_fingerprint(find_weights(shipped(family)))


def note_base(job: Job) -> None:
    """Write down which base a training starts from, once; a later base of the same name is another one."""
    file = job.folder / BASE_FILE
    if not file.is_file():
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"fingerprint": base_fingerprint(job.family)}) + "\n")


def read_base(run_dir: Path) -> str | None:
    """The fingerprint of the base that a run has started from; None where it has not started."""
    file = run_dir / BASE_FILE
    return read_json_object(file)["fingerprint"] if file.is_file() else None


def state(job: Job) -> str:
    """`done`, `measure` (trained, and a task is missing) or `open`.

    Raises `UserError` where the folder holds a run of other settings or an evaluation of other data: neither is
    thrown away here, nor taken for this run.
    """
    trained = job.condition.recipe is not None
    if trained and read_base(job.folder) not in (None, base_fingerprint(job.family)):
        raise UserError(f"{job.folder} was trained from other weights than {shipped(job.family)} now has; remove it")
    found = result_folder(job)
    if found is None:
        return "open"
    if trained:
        _check_settings(job)
    if not (found / RESULTS_FILE).is_file() or not (found / SAMPLES_FILE).is_file():
        return "open"
    results = read_json_object(found / RESULTS_FILE)
    expected = rows_fingerprint(job.options.data_dir)
    if results["data_sha256"] != expected:
        raise UserError(
            f"{found}: was measured on other rows than {job.options.data_dir} now holds; remove {job.folder} to run it "
            "again, or give --out another folder"
        )
    same = results["max_samples"] == job.options.max_samples and set(job.tasks) <= set(results["tasks"])
    if same and (trained or results["fingerprint"] == base_fingerprint(job.family)):
        return "done"
    return "measure" if trained else "open"


def rows_fingerprint(data_dir: Path) -> str:
    """What results.json names as `data_sha256` for tasks of this dataset folder; '' where there is none."""
    from mirage.evals.request import data_fingerprint

    file = data_dir / ROWS_FILE
    return data_fingerprint([file]) if file.is_file() else ""


def _check_settings(job: Job) -> None:
    file = job.folder / "recipe.json"
    if not file.is_file():
        raise UserError(f"{job.folder} has a summary and no recipe.json; remove it to run it again")
    before = read_json_object(file)
    now = json.loads(resolved_json(job.recipe()))
    changed = list(_differences(_comparable(before), _comparable(now)))
    if changed:
        raise UserError(
            f"{job.folder} holds a run with other settings ({'; '.join(changed[:3])}); remove it to run it again, or "
            "give --out another folder"
        )


def _comparable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What decides weights and answers; which tasks are measured is compared with the results themselves."""
    whole = with_newer_options(recipe)
    kept = {key: value for key, value in whole.items() if key not in _FREE}
    kept["eval"] = {key: whole["eval"].get(key) for key in ("max_new_tokens", "judge")}
    return kept


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {json.dumps(old)} and is {json.dumps(new)}"


def settings_hash(recipe: Mapping[str, Any]) -> str:
    """First 12 hex digits of the sha256 of what a run's recipe.json says that decides weights and answers."""
    import hashlib

    text = json.dumps(_comparable(recipe), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def manifest_sha256(data_dir: Path) -> str:
    """sha256 of the dataset's manifest. Raises `UserError` without one."""
    file = data_dir / "manifest.json"
    if not file.is_file():
        raise UserError(f"{data_dir} is no dataset folder (no manifest.json); `make experiment` writes it")
    return file_sha256(file)


def commands(job: Job, *, now: str) -> Sequence[str]:
    """The command for a job in state `now` (`open` or `measure`), as it would be typed in the project's folder."""
    if job.condition.recipe is None or now == "measure":
        return ["mirage", "evaluate", *job.measuring()]
    processes = [] if job.options.num_processes == 2 else ["--num_processes", str(job.options.num_processes)]
    return ["accelerate", "launch", "--config_file", LAUNCH_CONFIG, *processes, TRAIN_FILE, *job.settings()]
