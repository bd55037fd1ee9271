"""From run folders to one small file, docs/experiment/results.json: all that analysis and page need, and no more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage.errors import UserError
from mirage.evals.results import RESULTS_FILE, SAMPLES_FILE, read_samples
from mirage.files import file_sha256, write_atomic
from mirage.miniature.conditions import BASE, CONDITIONS, CURVE_TASKS, FAMILIES
from mirage.miniature.outcomes import METRICS, NOT_ASKED, base_task, count, kind_of, letter
from mirage.miniature.plan import (
    REPEAT_SUFFIX,
    ROWS_FILE,
    last_evaluation,
    manifest_sha256,
    read_base,
    rows_fingerprint,
    settings_hash,
)
from mirage.strict_json import read_json_lines, read_json_object

SCHEMA_VERSION = 2
# What samples are grouped by: tags of their rows, and two things that follow from the row.
GROUPS = ("holdout", "structure", "sibling_kind", "num_images", "of")
_LOSS_POINTS = 40
_CODES = "0123456789abcdefghijklmnopqrstuvwxyz"


def collect(out: Path, *, data_dir: Path) -> dict[str, Any]:
    """The content of results.json from the runs below `out` that are done; the others are left out.

    Raises `UserError` where runs were measured on different rows, or on other rows than `data_dir` holds.
    """
    runs: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    asked: dict[str, dict[str, str]] = {}
    rows_sha256 = set()
    for family, condition, seed, folder in _folders(out):
        run, samples, data_sha256 = _read_run(family, condition, seed, folder)
        rows_sha256.add(data_sha256)
        runs.append((run, samples))
        for row in samples:
            asked.setdefault(base_task(row["task"]), {})[row["id"]] = row["cluster"]
    if rows_sha256 - {rows_fingerprint(data_dir)}:
        raise UserError(
            f"runs in {out} were measured on other rows than {data_dir} holds, so they cannot be compared; remove the "
            "run folders and run them again"
        )
    for family in FAMILIES:
        bases = {run["base"] for run, _ in runs if run["family"] == family and run["seed"] is not None}
        bases |= {run["weights"] for run, _ in runs if run["family"] == family and run["condition"] == BASE}
        if len(bases - {None}) > 1:
            raise UserError(
                f"runs of {family} in {out} start from different base weights; remove those of the old base"
            )
    tasks = _describe_samples(asked, data_dir) if asked else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": {"manifest_sha256": manifest_sha256(data_dir)} if runs else {},
        "tasks": tasks,
        "runs": [run | _outcomes(samples, tasks) for run, samples in runs],
        "repeats": list(_repeats(out)),
        "curves": list(_curves(out)),
    }


def _folders(out: Path) -> Iterator[tuple[str, str, int | None, Path]]:
    """(family, condition, seed, evaluation's folder) of each run that is done, in the experiment's order."""
    for family in FAMILIES:
        for condition in CONDITIONS:
            home = out / family / condition
            if condition == BASE:
                if (home / RESULTS_FILE).is_file():
                    yield family, condition, None, home
                continue
            found = {seed: path for path in home.glob("seed-*") if (seed := _seed(path)) is not None}
            for seed, run_dir in sorted(found.items()):
                evaluation = last_evaluation(run_dir)
                if evaluation is not None and (evaluation / RESULTS_FILE).is_file():
                    yield family, condition, seed, run_dir


def _repeats(out: Path) -> Iterator[dict[str, Any]]:
    """What a run that was done twice with one seed has in common with its first time."""
    for again in sorted(out.glob(f"*/*/seed-*{REPEAT_SUFFIX}")):
        first = again.with_name(again.name.removesuffix(REPEAT_SUFFIX))
        both = [last_evaluation(folder) for folder in (first, again)]
        if any(item is None or not (item / RESULTS_FILE).is_file() for item in both):
            continue
        answers = [answers_sha256(read_samples(item)) for item in both if item is not None]
        trained = [_training(folder) for folder in (first, again)]
        yield {
            "family": again.parent.parent.name,
            "condition": again.parent.name,
            "seed": _seed(first),
            "same_answers": answers[0] == answers[1],
            "same_losses": _losses(first) == _losses(again),
            "world_sizes": [item["world_size"] for item in trained],
        }


def _curves(out: Path) -> Iterator[dict[str, Any]]:
    """What the runs that are measured on the way have found at each step, on the samples that every step was asked.

    Step 0 is the family's base.
    """
    for run_dir in sorted(out.glob(f"*/*/seed-*{REPEAT_SUFFIX}")):
        base = run_dir.parents[1] / BASE
        if last_evaluation(run_dir) is None or not (base / SAMPLES_FILE).is_file():
            continue
        folders = {0: base} | {
            int(file.parent.name.removeprefix("step-")): file.parent
            for file in sorted(run_dir.glob(f"evals/step-*/{SAMPLES_FILE}"))
        }
        asked = {
            step: {(row["task"], row["id"]): letter(row["task"], row) for row in read_samples(folder)}
            for step, folder in folders.items()
        }
        shared = sorted(set.intersection(*(set(letters) for letters in asked.values())))
        yield {
            "family": run_dir.parents[1].name,
            "condition": run_dir.parent.name,
            "seed": _seed(run_dir.with_name(run_dir.name.removesuffix(REPEAT_SUFFIX))),
            "points": [
                {"step": step, "counts": _counts_by_task({key: letters[key] for key in shared})}
                for step, letters in sorted(asked.items())
            ],
        }


def _counts_by_task(letters: Mapping[tuple[str, str], str]) -> dict[str, dict[str, int]]:
    texts = {task: [found for (name, _), found in letters.items() if name == task] for task in CURVE_TASKS}
    return {task: _counts(task, text) for task, text in texts.items() if text}


def _counts(task: str, outcomes: Sequence[str]) -> dict[str, int]:
    """How many samples were judged, and how many of them count for each metric."""
    metrics = METRICS[kind_of(task)]
    return {"n": count(outcomes, "")[1]} | {name: count(outcomes, found)[0] for name, found in metrics.items()}


def _losses(run_dir: Path) -> list[tuple[int, float]]:
    """Every logged loss, all digits."""
    lines = _lines(run_dir / "metrics.jsonl")
    return [(line["step"], line["train/loss"]) for line in lines if line.get("axis") == "train"]


def _seed(path: Path) -> int | None:
    text = path.name.removeprefix("seed-")
    return int(text) if text.isascii() and text.isdigit() else None


def _read_run(
    family: str, condition: str, seed: int | None, folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """What is kept of a run without its outcomes, its samples, and the hash of the rows it was measured on."""
    evaluation = folder if seed is None else last_evaluation(folder)
    assert evaluation is not None
    results = read_json_object(evaluation / RESULTS_FILE)
    samples = read_samples(evaluation)
    run = {
        "family": family,
        "condition": condition,
        "seed": seed,
        "weights": results["fingerprint"],
        "judge": f"{results['judge']['name']}-v{results['judge']['version']}",
        "max_samples": results["max_samples"],
        "num_truncated": sum(task.get("num_truncated", 0) for task in results["tasks"].values()),
        "samples_sha256": file_sha256(evaluation / SAMPLES_FILE),
        "answers_sha256": answers_sha256(samples),
    }
    return run | ({} if seed is None else _training(folder)), samples, results["data_sha256"]


def answers_sha256(samples: Sequence[Mapping[str, Any]]) -> str:
    """sha256 over task, id, answer and verdict of each sample, sorted: the same answers on any machine.

    samples.jsonl itself also names the pictures' folders, which differ from machine to machine.
    """
    lines = sorted(json.dumps([row[key] for key in ("task", "id", "answer", "verdict")]) for row in samples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _training(run_dir: Path) -> dict[str, Any]:
    """Steps, tokens, seconds and loss of a run that has ended. Raises `UserError` where its files do not say."""
    summary, recipe = read_json_object(run_dir / "summary.json"), read_json_object(run_dir / "recipe.json")
    steps = summary["steps"]
    logged = [line for line in _lines(run_dir / "metrics.jsonl") if line.get("axis") == "train"]
    if not logged:
        raise UserError(f"{run_dir / 'metrics.jsonl'} has no training step; the run folder is damaged")
    seconds = [line["train/step_seconds"] for line in logged]
    per_row = summary["data/supervised_tokens"] / summary["data/rows"]
    return {
        "base": read_base(run_dir),
        "settings": settings_hash(recipe),
        "world_size": _world_size(run_dir, steps),
        "steps": steps,
        "samples_seen": summary["data/samples_seen"],
        # Exact where each row is seen equally often; otherwise off by what the last, partial pass happened to draw.
        "supervised_tokens_seen": round(per_row * summary["data/samples_seen"]),
        "train_seconds": round(steps * sum(seconds) / len(seconds), 1),
        "loss": [[line["step"], round(line["train/loss"], 4)] for line in _thinned(logged)],
    }


def _lines(file: Path) -> list[dict[str, Any]]:
    return [value for _, value in read_json_lines(file)]


def _world_size(run_dir: Path, steps: int) -> int:
    file = run_dir / f"checkpoint-{steps:06d}" / "resume" / "state.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; it says how many processes trained. Remove {run_dir} to run it again")
    return int(read_json_object(file)["world_size"])


def _thinned(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `_LOSS_POINTS` of them, evenly spread, the last among them."""
    if len(items) <= _LOSS_POINTS:
        return list(items)
    places = [round(number * (len(items) - 1) / (_LOSS_POINTS - 1)) for number in range(_LOSS_POINTS)]
    return [items[place] for place in places]


# Samples


def _describe_samples(asked: Mapping[str, Mapping[str, str]], data_dir: Path) -> dict[str, Any]:
    """Each task's sample ids in file order, their clusters (object pairs) as numbers, and what they are grouped by."""
    rows = {row["id"]: row for row in _lines(data_dir / ROWS_FILE)}
    numbers: dict[str, int] = {}  # one numbering for all tasks: a pair may be in several
    found = {}
    for task, clusters in sorted(asked.items()):
        ids = [identity for identity in rows if identity in clusters]
        if len(ids) != len(clusters):
            raise UserError(f"{data_dir / ROWS_FILE} lacks {len(clusters) - len(ids)} samples of task {task}")
        for identity in ids:
            numbers.setdefault(clusters[identity], len(numbers))
        found[task] = {
            "ids": " ".join(ids),
            "clusters": " ".join(str(numbers[clusters[identity]]) for identity in ids),
            "groups": {
                name: coded
                for name in GROUPS
                if (coded := _coded([_group(name, rows[identity], rows) for identity in ids])) is not None
            },
        }
    return found


def _group(name: str, row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    if name == "num_images":
        return str(len(row["images"]))
    if name == "of":
        mirrored = rows.get(row.get("twin_of") or "")
        return mirrored["split"] if mirrored is not None else None
    return row["tags"].get(name)


def _coded(values: Sequence[str | None]) -> dict[str, Any] | None:
    """The values as letters with a list of what they mean; None where no sample has one."""
    known = sorted({value for value in values if value is not None})
    if not known:
        return None
    codes = {value: _CODES[number] for number, value in enumerate(known)}
    return {"values": known, "codes": "".join(NOT_ASKED if value is None else codes[value] for value in values)}


def decode(coded: Mapping[str, Any]) -> list[str | None]:
    """The value of each sample, from what `collect` has written of a group."""
    known: Sequence[str] = coded["values"]
    return [None if code == NOT_ASKED else known[_CODES.index(code)] for code in coded["codes"]]


def _outcomes(samples: Sequence[Mapping[str, Any]], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """One letter a sample for each task and variant, in the order of the task's ids, and their counts."""
    by_task: dict[str, dict[str, str]] = {}
    for row in samples:
        by_task.setdefault(row["task"], {})[row["id"]] = letter(row["task"], row)
    outcomes, counts = {}, {}
    for task, letters in sorted(by_task.items()):
        text = "".join(letters.get(identity, NOT_ASKED) for identity in tasks[base_task(task)]["ids"].split())
        outcomes[task] = text
        counts[task] = _counts(task, text)
    return {"outcomes": outcomes, "counts": counts}


# The file


def write_results_file(found: Mapping[str, Any], file: Path) -> Path:
    """Write the content of results.json: sorted keys, one line for each run and each task; returns the file."""
    lines = ["{"]
    lines.append(f' "dataset": {_json(found["dataset"])},')
    lines += [' "runs": [', ",\n".join(f"  {_json(run)}" for run in found["runs"]), " ],"]
    lines.append(f' "schema_version": {found["schema_version"]},')
    lines.insert(1, f' "curves": {_json(found["curves"])},')
    lines.insert(3, f' "repeats": {_json(found["repeats"])},')
    tasks = [f"  {_json(name)}: {_json(task)}" for name, task in sorted(found["tasks"].items())]
    lines += [' "tasks": {', ",\n".join(tasks), " }", "}"]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "\n".join(lines) + "\n")
    return file


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def read_results_file(file: Path) -> dict[str, Any]:
    """The content of a results.json. Raises `UserError` for another file or version."""
    if not file.is_file():
        raise UserError(f"there is no {file}; `make experiment` writes it")
    found = read_json_object(file, remedy="run `make experiment`")
    if found.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{file} is no results file of version {SCHEMA_VERSION}; run `make experiment`")
    return found
