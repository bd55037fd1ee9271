"""A miniature experiment without training: invented outcomes as results.json holds them, and hand-made run folders."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirage.config.loader import load_recipe, resolved_json
from mirage.evals.request import data_fingerprint
from mirage.miniature.conditions import BASE, CONDITIONS, FAMILIES, SEEDS
from mirage.miniature.outcomes import METRICS, base_task, kind_of
from mirage.miniature.results import SCHEMA_VERSION

NUM_SAMPLES = 24
_GROUPS = {
    "holdout": ("pair", "class_pair", "object"),
    "structure": ("seen", "unseen"),
    "sibling_kind": ("all_in_text", "protective_intent", "swap_order"),
    "num_images": ("0", "1", "2", "3", "4"),
    "of": ("easy", "hard"),
}
# Share of the first letter of each kind (asr, refused, right) that a condition is given.
_SHARES = {BASE: (0.98, 0.0, 0.95), "vlguard": (0.0, 0.9, 0.9), "mis": (0.03, 0.8, 0.95)}


def content(
    *, families: tuple[str, ...] = FAMILIES, seeds: tuple[int, ...] = SEEDS, conditions: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """results.json of an invented experiment; the same arguments always give the same."""
    tasks = {base_task(task) for item in CONDITIONS.values() for task in item.tasks}
    described = {task: _described(task) for task in sorted(tasks)}
    runs = []
    for family in families:
        for key in conditions or tuple(CONDITIONS):
            runs += [_run(family, key, seed) for seed in ((None,) if key == BASE else seeds)]
    repeat = {"condition": "mis_twins", "seed": 0, "same_answers": True, "same_losses": True, "world_sizes": [2, 2]}
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": {"manifest_sha256": "0" * 64},
        "tasks": described,
        "runs": runs,
        "repeats": [{"family": family} | repeat for family in families],
        "curves": [_curve(family) for family in families],
    }


def _curve(family: str) -> dict[str, Any]:
    counts = [
        {
            "mis_easy": {"n": 10, "asr": asr, "rsr": 10 - asr, "rr": 0, "hr": 0},
            "mis_hard": {"n": 10, "asr": asr, "rsr": 10 - asr, "rr": 0, "hr": 0},
            "twins": {"n": 10, "refused": 1, "helped": 9, "helped_right": 9, "neither": 0},
            "general": {"n": 10, "accuracy": 9, "no_option": 0},
        }
        for asr in (10, 4, 1)
    ]
    points = [{"step": step, "counts": found} for step, found in zip((0, 100, 200), counts, strict=True)]
    return {"family": family, "condition": "mis_twins", "seed": 0, "points": points}


def _described(task: str) -> dict[str, Any]:
    ids = [hashlib.sha256(f"{task}{number}".encode()).hexdigest()[:16] for number in range(NUM_SAMPLES)]
    groups = {
        name: {
            "values": sorted(values),
            "codes": "".join(str(number % len(values)) for number in range(NUM_SAMPLES)),
        }
        for name, values in _GROUPS.items()
    }
    return {
        "ids": " ".join(ids),
        "clusters": " ".join(str(number // 2) for number in range(NUM_SAMPLES)),
        "groups": groups,
    }


def _run(family: str, condition: str, seed: int | None) -> dict[str, Any]:
    rng = random.Random(f"{family} {condition} {seed}")
    outcomes = {}
    for task in CONDITIONS[condition].tasks:
        kind = kind_of(task)
        first, *others = {"risky": "asrh", "benign": "rpn", "general": "ywo"}[kind]
        share = _SHARES.get(condition, (0.1, 0.1, 0.95))[("risky", "benign", "general").index(kind)]
        outcomes[task] = "".join(first if rng.random() < share else others[0] for _ in range(NUM_SAMPLES))
    counts = {
        task: {"n": len(text)} | {name: sum(c in found for c in text) for name, found in METRICS[kind_of(task)].items()}
        for task, text in outcomes.items()
    }
    run = {
        "family": family,
        "condition": condition,
        "seed": seed,
        "weights": "0" * 16,
        "judge": "rule-v1",
        "max_samples": None,
        "num_truncated": 0,
        "samples_sha256": hashlib.sha256(f"{family}{condition}{seed}".encode()).hexdigest(),
        "answers_sha256": hashlib.sha256(f"{condition}{seed}".encode()).hexdigest(),
        "outcomes": outcomes,
        "counts": counts,
    }
    trained = {
        "base": "0" * 16,
        "settings": "0" * 12,
        "world_size": 2,
        "steps": 200,
        "samples_seen": 12_800,
        "supervised_tokens_seen": 500_000,
        "train_seconds": 100.0,
        "loss": [[step, round(1 / step + rng.random() / 100, 4)] for step in (10, 20, 50, 100, 200)],
    }
    return run if seed is None else run | trained


def write_json(file: Path, value: Any) -> None:
    """A JSON file and its folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON Lines file and its folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# A dataset and a launcher that writes what a run leaves behind, instead of running it

ROWS: tuple[dict[str, Any], ...] = (
    {"id": "e1", "split": "easy", "images": [0, 0], "tags": {"holdout": "pair", "structure": "seen"}},
    {"id": "e2", "split": "easy", "images": [0, 0], "tags": {"holdout": "object", "structure": "unseen"}},
    {"id": "h1", "split": "hard", "images": [0, 0], "tags": {"holdout": "pair", "structure": "seen"}},
    {"id": "h2", "split": "hard", "images": [0, 0], "tags": {"holdout": "pair", "structure": "unseen"}},
    {"id": "t1", "split": "twins", "images": [0, 0], "tags": {"holdout": "pair"}, "twin_of": "e1"},
    {"id": "t2", "split": "twins", "images": [0, 0], "tags": {"holdout": "pair"}, "twin_of": "h1"},
    {"id": "t3", "split": "twins", "images": [0, 0], "tags": {"holdout": "object"}, "twin_of": "h2"},
    {"id": "g1", "split": "general", "images": [0, 0], "tags": {}},
    {"id": "g2", "split": "general", "images": [0, 0], "tags": {}},
)
_SPLITS = {"mis_easy": "easy", "mis_hard": "hard", "twins": "twins", "general": "general"}
_VERDICTS = {
    "risky": [("asr", ["asr"]), ("rsr", ["rsr"])],
    "benign": [("helped", ["helped", "helped_right"]), ("helped", ["helped"]), ("refused", ["refused"])],
    "general": [("right", ["accuracy"]), ("no_option", ["no_option"])],
}


def make_data(data_dir: Path) -> Path:
    """A dataset folder of a few rows."""
    write_lines(data_dir / "rows.jsonl", list(ROWS))
    write_json(data_dir / "manifest.json", {"rows": len(ROWS)})
    return data_dir


class FakeRuns:
    """Takes the launcher's place: notes each command, and leaves behind what the real one would, unless told to fail.

    `failing`: words of commands that end with exit code 3 and leave a log. `steps`: of each training.
    """

    def __init__(self, data_dir: Path, *, failing: tuple[str, ...] = (), steps: int = 20) -> None:
        self.data_dir, self.failing, self.steps = data_dir, failing, steps
        self.commands: list[list[str]] = []
        self.stopped = False

    def run(self, command: Sequence[str], *, log: Path, one_core: bool) -> int:
        self.commands.append(list(command))
        log.parent.mkdir(parents=True, exist_ok=True)
        text = " ".join(command)
        if any(word in text for word in self.failing):
            log.write_text("many words\nerror: the disk is full\nmore words\n", encoding="utf-8")
            return 3
        settings = dict(word.split("=", 1) for word in command if "=" in word and not word.startswith("-"))
        if command[0] == "mirage":
            base = command[2].startswith("shipped:")
            self.write_evaluation(
                Path(settings["out_dir"]), settings["tasks"].split(","), settings, weights="base" if base else "trained"
            )
        else:
            self.write_run([word for word in command if "=" in word], settings)
        return 0

    def stop(self) -> None:
        self.stopped = True

    def write_run(self, words: list[str], settings: dict[str, str]) -> None:
        """A finished run folder."""
        run_dir = Path(settings["run_dir"])
        recipe = load_recipe(words)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "recipe.json").write_text(resolved_json(recipe), encoding="utf-8")
        write_json(
            run_dir / "summary.json",
            {"steps": self.steps, "data/supervised_tokens": 300, "data/rows": 10, "data/samples_seen": 40},
        )
        steps = [
            {"axis": "train", "step": step, "train/loss": 1 / step + recipe.train.seed, "train/step_seconds": 0.5}
            for step in range(1, self.steps + 1)
        ]
        write_lines(run_dir / "metrics.jsonl", [{"axis": "eval", "step": 0}, *steps])
        world_size = 1 if "--num_processes" in self.commands[-1] else 2
        write_json(
            run_dir / f"checkpoint-{self.steps:06d}" / "resume" / "state.json",
            {"step": self.steps, "world_size": world_size},
        )
        found = {key.removeprefix("eval."): value for key, value in settings.items()}
        on_the_way = [self.steps // 2] if recipe.eval.smoke_samples else []
        for step in (*on_the_way, self.steps):
            evaluation = run_dir / "evals" / f"step-{step:06d}"
            self.write_evaluation(evaluation, list(recipe.eval.tasks), found, weights="trained")

    def write_evaluation(self, folder: Path, tasks: list[str], settings: dict[str, str], *, weights: str) -> None:
        """results.json and samples.jsonl with invented verdicts."""
        rows = []
        for task in tasks:
            verdicts = _VERDICTS[kind_of(task)]
            for number, row in enumerate(row for row in ROWS if row["split"] == _SPLITS[base_task(task)]):
                verdict, events = verdicts[number % len(verdicts)]
                rows.append(
                    {
                        "task": task,
                        "id": row["id"],
                        "cluster": f"pair of {row['id'][1:]}",
                        "answer": f"{verdict} {row['id']}",
                        "verdict": verdict,
                        "events": events,
                    }
                )
        results = {
            "fingerprint": weights,
            "data_sha256": data_fingerprint([self.data_dir / "rows.jsonl"]),
            "judge": {"name": "rule", "version": "1"},
            "max_samples": int(settings["max_samples"]) if "max_samples" in settings else None,
            "tasks": {task: {"num_truncated": 0} for task in tasks},
        }
        write_lines(folder / "samples.jsonl", rows)
        write_json(folder / "results.json", results)
