"""Stop guards: is a checkpoint surely worse than step 0 in ability, over-refusal, perception or the form of answers?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mirage.config.schema import EvalConfig
from mirage.errors import RunStopped, UserError
from mirage.evals.degenerate import faults
from mirage.evals.metrics import Paired, compare_events
from mirage.evals.results import Results, read_results, read_samples
from mirage.evals.statistics.levels import ALPHA
from mirage.evals.statistics.multiplicity import GENERAL, adjust_p_values
from mirage.evals.statistics.pooled import Pooled, match_rates
from mirage.files import write_atomic
from mirage.strict_json import read_json_object

GUARDS_FILE = "guards.json"
_DEGENERATE = "degenerate"
_WORDS = {
    "general": "general ability fell",
    "over_refusal": "over-refusal rose",
    "hr": "hallucination rose",
    "degenerate": "degenerate answers rose",
}
Guard = Literal["general", "over_refusal", "hr", "degenerate"]


class Alarm(BaseModel):
    """A change for the worse that is significant and larger than its margin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    guard: Guard
    rate: str = Field(description="task:metric, or 'pooled' for general ability over several tasks")
    baseline_percent: float
    percent: float
    change_points: float
    margin_points: float
    adjusted_p_value: float = Field(description="Benjamini-Hochberg over all tests of the guards at this checkpoint")
    detectable_points: float | None
    details: dict[str, str] = Field(
        default_factory=dict, description="for degenerate answers: 'before -> now' by fault"
    )

    @property
    def message(self) -> str:
        """The alarm in one sentence."""
        found = f" ({', '.join(f'{fault} {counts}' for fault, counts in self.details.items())})" if self.details else ""
        return (
            f"{_WORDS[self.guard]}: {self.rate} {self.baseline_percent:.1f}% -> {self.percent:.1f}% "
            f"({self.change_points:+.1f} points, margin {self.margin_points:g}, p {self.adjusted_p_value:.2g}){found}"
        )


class _Test(BaseModel):
    """One guard's look at one rate; `sign` is +1 where a rise is for the worse."""

    guard: Guard
    rate: str
    sign: int
    margin: float
    paired: Paired | Pooled
    details: dict[str, str] = {}


def check_guards(
    results: Results,
    baseline: Results | None,
    samples: Sequence[Mapping[str, Any]],
    *,
    baseline_samples: Sequence[Mapping[str, Any]] = (),
    config: EvalConfig | None = None,
) -> list[Alarm]:
    """What is surely worse than at the baseline, in the order general, over-refusal, hallucination, degenerate answers.

    `samples` and `baseline_samples` are lines of samples.jsonl. A guard looks at paired changes only: exact McNemar on
    the same samples (sign flips for the pooled rate), corrected together (Benjamini-Hochberg) at 5%, and larger than
    `eval.guard_margins`. Invalid tasks are passed over; without a baseline there is nothing to compare with and no
    alarm. Raises `ValueError` for results that were compared with another baseline.
    """
    config = config or EvalConfig()
    if config.guards == "off" or baseline is None or results.baseline is None:
        return []
    if results.baseline.fingerprint != baseline.fingerprint:
        raise ValueError("the results were compared with another baseline than the one given")
    tests = [*_rate_tests(results, config), *_degenerate_tests(samples, baseline_samples, config)]
    adjusted = adjust_p_values([test.paired.p_value for test in tests])
    return [
        _alarm(test, p_value)
        for test, p_value in zip(tests, adjusted, strict=True)
        if p_value < ALPHA and test.sign * (test.paired.delta_points or 0.0) > test.margin
    ]


def _rate_tests(results: Results, config: EvalConfig) -> list[_Test]:
    margins, found = config.guard_margins, []
    looks: tuple[tuple[Guard, tuple[str, ...], int, float], ...] = (
        ("general", config.select.general, -1, margins.general),
        ("over_refusal", config.select.over_refusal, 1, margins.over_refusal),
        ("hr", ("*:hr",), 1, margins.hr),
    )
    for guard, patterns, sign, margin in looks:
        if guard == "general" and GENERAL in results.pooled:
            pooled = results.pooled[GENERAL]
            found.append(_Test(guard=guard, rate="pooled", sign=sign, margin=margin, paired=pooled))
        for task, metric in match_rates(results.tasks, patterns):
            paired = results.tasks[task].comparison.get(metric)
            if paired is not None and paired.num_pairs and results.tasks[task].valid:
                found.append(_Test(guard=guard, rate=f"{task}:{metric}", sign=sign, margin=margin, paired=paired))
    return found


def _degenerate_tests(
    samples: Sequence[Mapping[str, Any]], baseline_samples: Sequence[Mapping[str, Any]], config: EvalConfig
) -> list[_Test]:
    """One test a task: the share of answers with any fault. The answers need no judge, so unscored ones count too."""
    before = {_key(row): row for row in baseline_samples}
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for row in samples:
        if _key(row) in before:
            tasks.setdefault(str(row["task"]), []).append(row)
    found = []
    for task, rows in tasks.items():
        now = {_key(row): faults(row, baseline_tokens=int(before[_key(row)]["num_tokens"])) for row in rows}
        then = {_key(row): faults(before[_key(row)]) for row in rows}
        marked = [{key: _marks(kinds) for key, kinds in side.items()} for side in (now, then)]
        clusters = {_key(row): str(row["cluster"]) for row in rows}
        paired = compare_events(marked[0], marked[1], metrics=[_DEGENERATE], clusters=clusters)[_DEGENERATE]
        found.append(
            _Test(
                guard="degenerate",
                rate=f"{task}:{_DEGENERATE}",
                sign=1,
                margin=config.guard_margins.degenerate,
                paired=paired,
                details=_risen(now, then),
            )
        )
    return found


def _marks(kinds: tuple[str, ...]) -> tuple[str, ...]:
    return (_DEGENERATE,) if kinds else ()


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['task']}:{row['id']}:{row['prompt_sha256']}"


def _risen(now: Mapping[str, tuple[str, ...]], then: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """'before -> now' of each fault that more answers have."""
    counts = {
        fault: [sum(fault in kinds for kinds in side.values()) for side in (then, now)]
        for fault in dict.fromkeys(kind for side in (now, then) for kinds in side.values() for kind in kinds)
    }
    return {fault: f"{first} -> {last}" for fault, (first, last) in sorted(counts.items()) if last > first}


def _alarm(test: _Test, p_value: float) -> Alarm:
    paired = test.paired
    first, change = paired.baseline_percent or 0.0, paired.delta_points or 0.0
    return Alarm(
        guard=test.guard,
        rate=test.rate,
        baseline_percent=first,
        percent=first + change,
        change_points=change,
        margin_points=test.margin,
        adjusted_p_value=p_value,
        detectable_points=paired.detectable_points if isinstance(paired, Paired) else None,
        details=test.details,
    )


# Alarms on disk: every rank reads them, and so does the next start of the run.


def guard_evaluation(folder: Path, baseline: Path, *, config: EvalConfig) -> list[Alarm]:
    """Check a finished evaluation against the baseline's folder and write `guards.json` beside its results.

    Raises `UserError` where either folder is unreadable.
    """
    results, first = read_results(folder), read_results(baseline)
    if config.guards == "off" or results.baseline is None or results.baseline.fingerprint != first.fingerprint:
        alarms: list[Alarm] = []
    else:
        rows, before = read_samples(folder), read_samples(baseline)
        alarms = check_guards(results, first, rows, baseline_samples=before, config=config)
    content = {
        "request": results.request,
        "baseline": first.request,
        "settings": _settings(config),
        "alarms": [alarm.model_dump(mode="json") for alarm in alarms],
    }
    write_atomic(folder / GUARDS_FILE, json.dumps(content, indent=2) + "\n")
    return alarms


def _settings(config: EvalConfig) -> dict[str, Any]:
    """What alarms depend on besides the two evaluations, as JSON values."""
    select = config.select
    return {
        "guards": config.guards != "off",
        "margins": config.guard_margins.model_dump(mode="json"),
        "general": list(select.general),
        "over_refusal": list(select.over_refusal),
    }


def recorded_alarms(folder: Path, *, request: str, baseline: str, config: EvalConfig) -> list[Alarm] | None:
    """The alarms in `guards.json`, where the same guards have looked at the same two evaluations (their requests).

    None where they have not, or the file is damaged: the guards are to look then.
    """
    made_of = {"request": request, "baseline": baseline, "settings": _settings(config)}
    try:
        found = read_json_object(folder / GUARDS_FILE)
        return read_alarms(folder) if {name: found.get(name) for name in made_of} == made_of else None
    except (OSError, UserError):
        return None


def read_alarms(folder: Path) -> list[Alarm]:
    """The alarms in an evaluation's folder; none where no guard has looked. Raises `UserError` for a damaged file."""
    path = folder / GUARDS_FILE
    if not path.is_file():
        return []
    try:
        return [Alarm.model_validate(item, strict=True) for item in read_json_object(path)["alarms"]]
    except (UserError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path} is damaged; delete it and evaluate the checkpoint again") from error


def stop_if_alarmed(folder: Path, *, step: int, config: EvalConfig) -> None:
    """Raise `RunStopped` where `eval.guards=stop` and the evaluation in `folder` has alarms.

    Every rank calls it, after a barrier that follows `guard_evaluation` on the first: all read the same file and all
    stop. A start of the same run calls it too, so that a stopped run stays stopped until the recipe says otherwise.
    """
    if config.guards != "stop":
        return
    margins = config.guard_margins.model_dump()
    alarms = [alarm for alarm in read_alarms(folder) if abs(alarm.change_points) > margins[alarm.guard]]
    if alarms:
        raise RunStopped(
            f"the evaluation of step {step} is worse than step 0: {'; '.join(alarm.message for alarm in alarms)}. "
            f"The checkpoint is kept; see {folder}. To train on, set eval.guards=warn or larger eval.guard_margins"
        )
