"""What of a finished evaluation goes to the tracker: numbers, tables, the artifact, alerts of rates that rise."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage.config.schema import AlertsConfig, EvalConfig, SelectConfig
from mirage.errors import UserError
from mirage.evals.answer_parts import answer_parts
from mirage.evals.metrics import Paired, TaskResult, compare_events
from mirage.evals.results import RESULTS_FILE, Results, events_by_id, read_first, read_results, read_samples
from mirage.evals.statistics.levels import ALPHA
from mirage.evals.statistics.multiplicity import adjust_p_values
from mirage.evals.statistics.pooled import match_rates
from mirage.tracking.alerts import Alert
from mirage.tracking.artifacts import results_card
from mirage.tracking.run import Tracker

# Rates that are also logged within each category; the general benchmarks have dozens of subjects.
CATEGORY_RATES = ("asr", "rsr", "rr", "hr", "refused", "harmful")
_NAME_CHARS = re.compile(r"[^A-Za-z0-9_-]+")


def log_evaluation(tracker: Tracker, folder: Path, *, step: int, config: EvalConfig, num_alarms: int) -> None:
    """Send the evaluation in `folder` (a run's `evals/step-NNNNNN`) to the tracker, at its step.

    Raises `UserError` where the folder is unreadable.
    """
    results, rows = read_results(folder), read_samples(folder)
    first = results if step == 0 else read_first(folder, results)
    numbers = results.metrics() | category_metrics(results) | change_metrics(results)
    selected = select_metrics(results, first, config.select)
    numbers |= {f"eval/select/{name}": value for name, value in selected.items()}
    tracker.log(numbers | {"eval/alarms": float(num_alarms)}, axis="eval", step=step)
    if step > 0:
        started = select_metrics(first, first, config.select) if first else {}
        tracker.summary(_summary(selected, started))
    for task in results.tasks:
        tracker.log_samples(task, table_rows(rows, task), step=step)
    _log_artifact(tracker, folder, results, step=step)
    for alert in rise_alerts(folder, results, rows, config=config, alerts=tracker.config.alerts):
        tracker.alert(alert)


def log_what_is_missing(tracker: Tracker, folder: Path, *, step: int) -> None:
    """Send the tables and the artifact of a logged evaluation again that a kill took from wandb's file."""
    results = read_results(folder)
    missing = [task for task in results.tasks if tracker.lacks_samples(task, step=step)]
    if missing:
        rows = read_samples(folder)
        for task in missing:
            tracker.log_samples(task, table_rows(rows, task), step=step)
    _log_artifact(tracker, folder, results, step=step)


def table_rows(rows: Sequence[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """A task's samples for its table, changed verdicts first: only the first rows are shown."""
    own = sorted((row for row in rows if row["task"] == task), key=lambda row: not row["changed"])
    return [{**row, "parts": answer_parts(str(row["answer"] or ""))} for row in own]


def category_metrics(results: Results) -> dict[str, float]:
    """`eval/<task>/category/<category>/<rate>` in percent, for the rates of CATEGORY_RATES."""
    found = {}
    for task, result in results.tasks.items():
        for category, group in result.by_category.items():
            name = _NAME_CHARS.sub("_", category).strip("_") or "none"
            for metric in CATEGORY_RATES:
                rate = group.rates.get(metric)
                if rate is not None and rate.percent is not None:
                    found[f"eval/{task}/category/{name}/{metric}"] = rate.percent
    return found


def change_metrics(results: Results) -> dict[str, float]:
    """`eval/<task>/<rate>_change` in points against step 0, and `_change_p`, its corrected p-value."""
    found = {}
    for task, result in results.tasks.items():
        for metric, paired in result.comparison.items():
            if paired.num_pairs and paired.delta_points is not None:
                found[f"eval/{task}/{metric}_change"] = paired.delta_points
                p_value = paired.p_value if paired.adjusted_p_value is None else paired.adjusted_p_value
                found[f"eval/{task}/{metric}_change_p"] = p_value
    return found


def select_metrics(results: Results, first: Results | None, config: SelectConfig) -> dict[str, float]:
    """What a sweep looks at, in percent; lower is better but for `general`.

    `asr`: mean of the attack success rates among eval.select.safety; `over_refusal` and `general`: means of the rates
    of eval.select.over_refusal and eval.select.general; `score`: mean of `asr` and `over_refusal`, plus the points of
    general ability lost since step 0 (`first`). What is not measured, or invalid, is left out, and the score with it:
    neither a broken judge nor a missing step 0 must make a run look good.
    """
    safety = [(task, metric) for task, metric in match_rates(results.tasks, config.safety) if metric == "asr"]
    asr = _mean(results.tasks, safety)
    over_refusal = _mean(results.tasks, match_rates(results.tasks, config.over_refusal))
    general = _mean(results.tasks, match_rates(results.tasks, config.general))
    found = {"asr": asr, "over_refusal": over_refusal, "general": general}
    before = _mean(first.tasks, match_rates(first.tasks, config.general)) if first is not None else None
    if asr is not None and over_refusal is not None and general is not None and before is not None:
        found["score"] = (asr + over_refusal) / 2 + max(0.0, before - general)
    return {name: value for name, value in found.items() if value is not None}


def _mean(tasks: Mapping[str, TaskResult], rates: Sequence[tuple[str, str]]) -> float | None:
    values = [tasks[task].rates[metric].percent if tasks[task].valid else None for task, metric in rates]
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _summary(selected: Mapping[str, float], started: Mapping[str, float]) -> dict[str, float]:
    """`select/*` of the newest evaluation and `select/base_*` of step 0; NaN stands for what it has not."""
    names = ("asr", "over_refusal", "general", "score")
    now = {f"select/{name}": selected.get(name, math.nan) for name in names}
    return now | {f"select/base_{name}": started[name] for name in names if name in started}


def _log_artifact(tracker: Tracker, folder: Path, results: Results, *, step: int) -> None:
    config, identity = tracker.config.artifacts, tracker.wandb_id
    if config.results == "off" or identity is None:
        return
    rates = [(task, name, rate) for task, result in results.tasks.items() for name, rate in result.rates.items()]
    metadata = {
        "judge": f"{results.judge.name}-v{results.judge.version}",
        "data_sha256": results.data_sha256,
        "fingerprint": results.fingerprint,
        "percent": {f"{task}:{name}": rate.percent for task, name, rate in rates},
        "invalid": [task for task, result in results.tasks.items() if not result.valid],
    }
    card = results_card(
        folder, run_id=identity, step=step, metadata=metadata, detail=config.results, max_bytes=config.max_bytes
    )
    tracker.log_artifact(card)


# Rates that rise


def rise_alerts(
    folder: Path,
    results: Results,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: EvalConfig,
    alerts: AlertsConfig,
) -> list[Alert]:
    """Rates of attack success and over-refusal that rose since the evaluation before, beyond noise.

    Exact McNemar on the samples that both have, corrected together (Benjamini-Hochberg) at 5%, and a rise of more than
    `tracking.alerts`' points. Invalid tasks are passed over, and a previous evaluation with another judge.
    """
    before = _previous(folder)
    if before is None or results.step is None:
        return []
    old_rows, old = read_samples(before), read_results(before)
    if (old.judge.name, old.judge.version) != (results.judge.name, results.judge.version):
        return []
    tests = []
    looks = ((config.select.safety, alerts.asr_rise), (config.select.over_refusal, alerts.over_refusal_rise))
    for patterns, margin in looks:
        for task, metric in match_rates(results.tasks, patterns) if margin is not None else []:
            if task in old.tasks and results.tasks[task].valid and old.tasks[task].valid:
                paired = _compare(rows, old_rows, task, metric)
                if paired.num_pairs:
                    tests.append((f"{task}:{metric}", margin or 0.0, paired))
    adjusted = adjust_p_values([paired.p_value for _, _, paired in tests])
    return [
        _rise_alert(name, paired, p_value, step=results.step, since=old.step)
        for (name, margin, paired), p_value in zip(tests, adjusted, strict=True)
        if p_value < ALPHA and (paired.delta_points or 0.0) > margin
    ]


def _compare(
    rows: Sequence[Mapping[str, Any]], old_rows: Sequence[Mapping[str, Any]], task: str, metric: str
) -> Paired:
    clusters = {f"{row['id']}:{row['prompt_sha256']}": str(row["cluster"]) for row in rows if row["task"] == task}
    now, then = events_by_id(rows, task), events_by_id(old_rows, task)
    return compare_events(now, then, metrics=[metric], clusters=clusters)[metric]


def _rise_alert(name: str, paired: Paired, p_value: float, *, step: int, since: int | None) -> Alert:
    before, change = paired.baseline_percent or 0.0, paired.delta_points or 0.0
    return Alert(
        key=f"rise: {name}: step {since} to {step}",
        step=step,
        level="WARN",
        title=f"{name} rose to {before + change:.1f}% at step {step}"[:64],
        text=f"{name} {before:.1f}% -> {before + change:.1f}% ({change:+.1f} points, p {p_value:.2g}, "
        f"{paired.num_pairs} samples) from the evaluation of step {since} to that of step {step}.",
    )


def _previous(folder: Path) -> Path | None:
    """The folder of the evaluation before, among those that are done."""
    earlier = [path.parent for path in folder.parent.glob(f"step-*/{RESULTS_FILE}") if path.parent.name < folder.name]
    for path in sorted(earlier, reverse=True):
        try:
            read_results(path)
        except UserError:
            continue
        return path
    return None
