"""The names of a run's numbers: unit, what stands for the whole run, and what it means."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Summary = Literal["min", "max", "last"]


@dataclass(frozen=True)
class MetricName:
    """A name or a pattern of names (`*` stands for any letters)."""

    pattern: str
    unit: str
    summary: Summary
    meaning: str


def _of(pattern: str, unit: str, summary: Summary, meaning: str) -> MetricName:
    return MetricName(pattern, unit, summary, meaning)


# The first pattern that a name matches describes it.
METRICS: tuple[MetricName, ...] = (
    _of("train/loss", "nat a token", "min", "loss of the step over supervised tokens"),
    _of("train/loss_source/*", "nat a token", "min", "the same over one source of the mixture"),
    _of("train/loss_segment/*", "nat a token", "min", "the same over one part of the answer"),
    _of("train/token_accuracy", "0 to 1", "max", "supervised tokens that the model ranks first"),
    _of("train/token_accuracy_source/*", "0 to 1", "max", "the same over one source"),
    _of("train/token_accuracy_segment/*", "0 to 1", "max", "the same over one part of the answer"),
    _of("train/lr", "1", "last", "learning rate"),
    _of("train/lr_group/*", "1", "last", "learning rate of a part of the model"),
    _of("train/grad_norm", "1", "max", "gradient norm before clipping"),
    _of("train/epoch", "epochs", "last", "passes over the mixture"),
    _of("train/tokens", "tokens", "last", "tokens of the step"),
    _of("train/supervised_tokens", "tokens", "last", "supervised tokens of the step"),
    _of("train/peak_memory_bytes", "bytes", "max", "the most that a rank has held"),
    _of("train/*tokens_per_second", "1/s", "max", "tokens a second, over all ranks"),
    _of("train/samples_per_second", "1/s", "max", "samples a second, over all ranks"),
    _of("train/model_flops_per_second", "FLOP/s", "max", "the model's own work"),
    _of("train/*_seconds", "s", "last", "a part of the step's time"),
    _of("train/data_wait_share", "0 to 1", "last", "share of the step spent waiting for data"),
    _of("train/mfu", "0 to 1", "max", "share of what matrix products reach on these devices"),
    _of("train/hfu", "0 to 1", "max", "the same with recomputed layers counted"),
    _of("train/pack_fill", "0 to 1", "last", "tokens over the room in the step's packs"),
    _of("train/attention_padding_share", "0 to 1", "last", "padding in what attention computes on"),
    _of("train/imbalance_*", "1 and up", "last", "most over mean of the ranks' cost or time"),
    _of("eval/alarms", "count", "max", "changes for the worse against step 0 that the guards found"),
    _of("eval/select/general", "percent", "max", "mean of the rates of eval.select.general"),
    _of("eval/select/*", "percent", "min", "attack success, over-refusal, and the score of both and of lost ability"),
    _of("eval/*/n", "samples", "last", "judged samples"),
    _of("eval/*/unscored", "samples", "last", "samples without a verdict"),
    _of("eval/*/truncated", "samples", "last", "answers cut at eval.max_new_tokens"),
    _of("eval/*/valid", "0 or 1", "last", "1 unless too many samples are unscored"),
    _of("eval/*/*_ci_low", "percent", "last", "lower 95% limit (Wilson)"),
    _of("eval/*/*_ci_high", "percent", "last", "upper 95% limit (Wilson)"),
    _of("eval/*/*_change", "points", "last", "change against step 0 on the same samples"),
    _of("eval/*/*_change_p", "0 to 1", "last", "its p-value, exact McNemar, corrected over the evaluation"),
    _of("eval/*/category/*", "percent", "last", "a rate within one category"),
)
# Rates (the last part of eval/<task>/<rate>) by the direction that is better, as the tasks declare them.
_LOWER = (
    "asr", "asr_*", "hr", "refused", "neither", "no_option*", "no_answer", "harmful", "loss", "missed",
    "over_sensitive", "rejected", "safe_full_refusal", "safe_partial_refusal", "unsafe", "unsafe_full_compliance",
)  # fmt: skip
_HIGHER = (
    "rsr", "accuracy*", "circular*", "complied", "correct", "effective", "helped", "helped_right", "pair", "safe",
    "safe_complied", "safe_correct", "safe_effective", "safe_full_compliance", "safe_warned", "unsafe_aware",
    "unsafe_correct", "unsafe_full_refusal", "vanilla", "win",
)  # fmt: skip


def describe_metric(name: str) -> MetricName | None:
    """What a logged name is; None for one that nobody has described."""
    for metric in METRICS:
        if fnmatchcase(name, metric.pattern):
            return metric
    parts = name.split("/")
    if len(parts) == 3 and parts[0] == "eval":
        return MetricName("eval/<task>/<rate>", "percent", _direction(parts[2]), "share of judged samples")
    return None


def summary_of(name: str) -> Summary:
    """What of a metric stands for the run: its least, its most, or its last value (unknown names: the last)."""
    found = describe_metric(name)
    return found.summary if found else "last"


def _direction(rate: str) -> Summary:
    if any(fnmatchcase(rate, pattern) for pattern in _LOWER):
        return "min"
    return "max" if any(fnmatchcase(rate, pattern) for pattern in _HIGHER) else "last"
