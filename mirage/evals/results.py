"""What an evaluation leaves behind: results.json (numbers), samples.jsonl (every answer), both written whole or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mirage.errors import UserError
from mirage.evals.generate import Decoding
from mirage.evals.metrics import TaskResult
from mirage.files import write_atomic
from mirage.models.adapter import PreprocessingSpec, ProcessorSpec

RESULTS_FILE = "results.json"
SAMPLES_FILE = "samples.jsonl"
SCHEMA_VERSION = 1


class JudgeInfo(BaseModel):
    """Who scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str
    notice: str


class BaselineInfo(BaseModel):
    """What the paired tests compare with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int | None
    fingerprint: str


class Results(BaseModel):
    """One checkpoint's numbers with all that they depend on. Percentages are 0..100."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    request: str
    """Hash of weights, data, settings and judge: an evaluation with the same request is not run again."""
    checkpoint: str
    step: int | None
    fingerprint: str
    judge: JudgeInfo
    decoding: Decoding
    preprocessing: PreprocessingSpec | ProcessorSpec
    max_samples: int | None
    data_sha256: str
    baseline: BaselineInfo | None
    tasks: dict[str, TaskResult]

    def metrics(self) -> dict[str, float]:
        """Flat numbers for tracking: `eval/<task>/<metric>` in percent, its interval, `n`, `unscored`, `valid`.

        Rates without a judged sample are left out.
        """
        flat: dict[str, float] = {}
        for task, result in self.tasks.items():
            prefix = f"eval/{task}"
            flat[f"{prefix}/n"] = result.num_samples - result.num_unscored
            flat[f"{prefix}/unscored"] = result.num_unscored
            flat[f"{prefix}/truncated"] = result.num_truncated
            flat[f"{prefix}/valid"] = float(result.valid)
            for name, rate in result.rates.items():
                if rate.percent is None or rate.ci_low is None or rate.ci_high is None:
                    continue
                flat[f"{prefix}/{name}"] = rate.percent
                flat[f"{prefix}/{name}_ci_low"] = rate.ci_low
                flat[f"{prefix}/{name}_ci_high"] = rate.ci_high
        return flat


def read_results(path: Path) -> Results:
    """The results in a file, or in `results.json` of a folder. Raises `UserError` for anything else."""
    path = path / RESULTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no evaluation results at {path}")
    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is not a results file of this version ({where}: {first['msg']})") from error


def write_results(folder: Path, results: Results) -> None:
    """Write `results.json`; after a crash the file is the old one or the new one, never half of one."""
    write_atomic(folder / RESULTS_FILE, results.model_dump_json(indent=2) + "\n")


def write_samples(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `samples.jsonl`, one answer with its verdict a line."""
    write_atomic(
        folder / SAMPLES_FILE, "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    )


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of `samples.jsonl`. Raises `UserError` if it is missing or damaged."""
    path = folder / SAMPLES_FILE
    if not path.is_file():
        raise UserError(f"no {SAMPLES_FILE} in {folder}; run the evaluation again")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is damaged ({error.msg}); run the evaluation again") from error
    return rows


def events_by_id(rows: Sequence[Mapping[str, Any]], task: str) -> dict[str, tuple[str, ...] | None]:
    """A task's verdict events by prompt identity; None for unscored samples."""
    return {
        f"{row['id']}:{row['prompt_sha256']}": None if row["events"] is None else tuple(row["events"])
        for row in rows
        if row["task"] == task
    }
