"""One paired test over several benchmarks: did the average of their rates change, each benchmark with equal weight?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mirage.errors import UserError
from mirage.evals.metrics import Paired, TaskResult, mcnemar_p_value
from mirage.evals.statistics.levels import CONFIDENCE

NUM_FLIPS = 400_000


class Pooled(BaseModel):
    """Several tasks' rates together, against the same samples at the baseline."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rates: tuple[str, ...] = Field(description="task:metric of each rate in it")
    num_pairs: int
    baseline_percent: float = Field(description="mean of the tasks' baseline rates over their pairs")
    delta_points: float = Field(description="mean of the tasks' changes, percentage points")
    delta_low: float = Field(description="95% interval; each task's cluster interval gives its standard error")
    delta_high: float
    gained: int
    lost: int
    p_value: float = Field(description="macro: sign-flip test of the mean change, two-sided")
    micro_p_value: float = Field(description="exact McNemar test of all pairs together, each pair with equal weight")
    adjusted_p_value: float | None = Field(default=None, description="Benjamini-Hochberg over the whole comparison")


def pool_paired(comparisons: Mapping[str, Paired]) -> Pooled | None:
    """Pool comparisons by the name of their rate; those without a pair are left out, None where fewer than two remain.

    Without a change each discordant pair is as likely gained as lost, so a task's (gained - lost) / n is a sum of fair
    signs; `NUM_FLIPS` draws of the tasks' mean give the p-value, with one added to both counts (Phipson and Smyth 2010,
    "Permutation p-values should never be zero"). The draws are seeded by the counts.
    """
    used = {task: paired for task, paired in sorted(comparisons.items()) if paired.num_pairs}
    if len(used) < 2:
        return None
    pairs = list(used.values())
    deltas = [paired.delta_points or 0.0 for paired in pairs]
    delta = math.fsum(deltas) / len(pairs)
    spread = _standard_error(pairs) * _normal_quantile()
    gained, lost = sum(paired.gained for paired in pairs), sum(paired.lost for paired in pairs)
    return Pooled(
        rates=tuple(used),
        num_pairs=sum(paired.num_pairs for paired in pairs),
        baseline_percent=math.fsum(paired.baseline_percent or 0.0 for paired in pairs) / len(pairs),
        delta_points=delta,
        delta_low=max(-100.0, delta - spread),
        delta_high=min(100.0, delta + spread),
        gained=gained,
        lost=lost,
        p_value=_sign_flip_p_value(pairs),
        micro_p_value=mcnemar_p_value(gained, lost),
    )


def _standard_error(pairs: list[Paired]) -> float:
    """Of the mean change, from the width of each task's interval, as the tasks are independent."""
    widths = [(paired.delta_high or 0.0) - (paired.delta_low or 0.0) for paired in pairs]
    errors = [width / (2 * _normal_quantile()) for width in widths]
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(pairs)


def _normal_quantile() -> float:
    from scipy.stats import norm

    return float(norm.ppf((1 + CONFIDENCE) / 2))


def _sign_flip_p_value(pairs: list[Paired]) -> float:
    observed = sum((paired.gained - paired.lost) / paired.num_pairs for paired in pairs)
    content = ";".join(f"{paired.gained},{paired.lost},{paired.num_pairs}" for paired in pairs)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big"))
    drawn = np.zeros(NUM_FLIPS)
    for paired in pairs:
        flips = paired.gained + paired.lost
        drawn += (2 * rng.binomial(flips, 0.5, size=NUM_FLIPS) - flips) / paired.num_pairs
    # A hair's breadth for sums that are equal but for rounding.
    extreme = int(np.sum(np.abs(drawn) >= abs(observed) - 1e-12))
    return (extreme + 1) / (NUM_FLIPS + 1)


def match_rates(tasks: Mapping[str, TaskResult], patterns: Sequence[str]) -> list[tuple[str, str]]:
    """(task, metric) of the rates that a `task:metric` pattern names, in the tasks' order; `*` stands for any letters.

    Raises `UserError` for a pattern without a colon.
    """
    return match_names([(task, metric) for task, result in tasks.items() for metric in result.rates], patterns)


def match_names(rates: Sequence[tuple[str, str]], patterns: Sequence[str]) -> list[tuple[str, str]]:
    """As `match_rates`, of the (task, metric) of all rates."""
    for pattern in patterns:
        if pattern.count(":") != 1:
            raise UserError(f"eval.select: {pattern!r} is no task:metric, such as 'mis_hard:asr' or 'mis_*:asr'")
    return [
        (task, metric)
        for task, metric in rates
        if any(fnmatchcase(f"{task}:{metric}", pattern) for pattern in patterns)
    ]
