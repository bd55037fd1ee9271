"""What an evaluation leaves behind: results.json (numbers), samples.jsonl (every answer), both written whole or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mirage.errors import UserError
from mirage.evals.endpoint_generation import EndpointDecoding, ServerSpec
from mirage.evals.generate import Decoding
from mirage.evals.interchange.origin import ForeignSpec, ImportedDecoding
from mirage.evals.metrics import TaskResult
from mirage.evals.statistics.pooled import Pooled
from mirage.evals.vllm_generation import VllmDecoding
from mirage.files import write_atomic
from mirage.models.adapter import PreprocessingSpec, ProcessorSpec
from mirage.strict_json import read_json_lines, read_json_object

RESULTS_FILE = "results.json"
SAMPLES_FILE = "samples.jsonl"
SCHEMA_VERSION = 2


class JudgeInfo(BaseModel):
    """Who scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str
    notice: str
    prompts: dict[str, str] = Field(default_factory=dict)
    """sha256 of the prompts that the judge was asked with, by rubric."""


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
    decoding: Decoding | EndpointDecoding | ImportedDecoding | VllmDecoding
    preprocessing: PreprocessingSpec | ProcessorSpec | ServerSpec | ForeignSpec
    max_samples: int | None
    data_sha256: str
    baseline: BaselineInfo | None
    tasks: dict[str, TaskResult]
    pooled: dict[str, Pooled] = Field(default_factory=dict)
    """Paired tests over several tasks: 'general' over the rates that eval.select.general names."""

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
            flat |= {f"{prefix}/{name}": value for name, value in result.averages.items()}
        return flat


def read_results(path: Path) -> Results:
    """The results in a file, or in `results.json` of a folder.

    Raises `UserError` for anything else; a file that another version wrote is told from a damaged one.
    """
    path = path / RESULTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no evaluation results at {path}")
    _check_version(read_json_object(path, remedy="run the evaluation again"), path)
    try:
        # Strict: a text is never taken for a number, and so "NaN" for none.
        return Results.model_validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is not a results file of this version ({where}: {first['msg']})") from error


def _check_version(fields: Mapping[str, Any], path: Path) -> None:
    version = fields.get("schema_version")
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has results of version {version} and this program reads version {SCHEMA_VERSION}; run the "
            "evaluation again into this folder: its answers are kept, so nothing is generated twice"
        )


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
    return [row for _, row in read_json_lines(path, remedy="run the evaluation again")]


def read_first(folder: Path, results: Results) -> Results | None:
    """The evaluation of step 0 beside `folder`, if it is the one that these results were compared with.

    Raises `UserError` if it is damaged.
    """
    path = folder.parent / "step-000000"
    if results.baseline is None or not (path / RESULTS_FILE).is_file():
        return None
    found = read_results(path)
    return found if found.fingerprint == results.baseline.fingerprint else None


def events_by_id(rows: Sequence[Mapping[str, Any]], task: str) -> dict[str, tuple[str, ...] | None]:
    """A task's verdict events by prompt identity; None for unscored samples."""
    return {
        f"{row['id']}:{row['prompt_sha256']}": None if row["events"] is None else tuple(row["events"])
        for row in rows
        if row["task"] == task
    }
