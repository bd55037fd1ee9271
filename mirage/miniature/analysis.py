"""Rates, intervals and paired tests of the experiment, from results.json alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from mirage.evals.metrics import mcnemar_p_value, wilson
from mirage.evals.statistics.bootstrap import MIN_CLUSTERS, cluster_interval
from mirage.evals.statistics.levels import CONFIDENCE
from mirage.evals.statistics.multiplicity import adjust_p_values
from mirage.miniature.outcomes import METRICS, NOT_ASKED, UNSCORED, base_task, kind_of
from mirage.miniature.results import decode

Run = Mapping[str, Any]
# `group=value` conditions on samples, e.g. {"holdout": "pair"}.
Where = Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """A rate over one or several seeds, in percent."""

    percent: float
    """Mean of the seeds' rates."""
    by_seed: tuple[float, ...]
    low: float
    high: float
    """95% interval over samples: object pairs are drawn anew, seeds are not."""
    spread: float | None
    """Half of the 95% t interval over seeds, which are drawn anew while the samples stay; None with one seed."""
    num_samples: int
    num_clusters: int


@dataclass(frozen=True)
class Change:
    """A rate of one condition minus another's on the same samples and seeds, in percentage points."""

    points: float
    low: float
    high: float
    """95% interval over samples (object pairs)."""
    spread: float | None
    p_value: float
    """Exact McNemar test, two-sided: the largest p of any seed, so it is small only if every seed shows the change."""
    num_seeds: int
    adjusted: float | None = None
    """Benjamini-Hochberg over all comparisons of the page."""


@dataclass(frozen=True)
class Question:
    """What a rate is of: tasks taken together, a metric, and which of their samples."""

    tasks: tuple[str, ...]
    metric: str
    where: tuple[tuple[str, str], ...] = ()


def ask(tasks: str | Sequence[str], metric: str, **where: str) -> Question:
    """`Question` in short."""
    return Question((tasks,) if isinstance(tasks, str) else tuple(tasks), metric, tuple(sorted(where.items())))


class Experiment:
    """The content of results.json, asked for rates."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.tasks: Mapping[str, Any] = content["tasks"]
        self.runs: Sequence[Run] = content["runs"]
        self.curves: Sequence[Mapping[str, Any]] = content["curves"]

    @cached_property
    def families(self) -> tuple[str, ...]:
        """Families with at least one run, in the file's order."""
        return tuple(dict.fromkeys(run["family"] for run in self.runs))

    def find(self, family: str, condition: str) -> list[Run]:
        """The condition's runs by seed; one for the base, none where it was not run."""
        return [run for run in self.runs if run["family"] == family and run["condition"] == condition]

    def cell(self, family: str, condition: str, question: Question) -> Cell | None:
        """The rate; None where no run has measured it."""
        runs = [run for run in self.find(family, condition) if set(question.tasks) <= set(run["outcomes"])]
        return self._cell(runs, question) if runs else None

    def _cell(self, runs: Sequence[Run], question: Question) -> Cell | None:
        per_run = [self.samples(run, question) for run in runs]
        counts = [(sum(hits.values()), len(hits)) for hits in per_run]
        if not all(n for _, n in counts):
            return None
        rates = tuple(100 * hits / n for hits, n in counts)
        num_samples = len({key for hits in per_run for key in hits})
        values, sizes = _cluster_totals(per_run, self.clusters(question))
        low, high = _rate_interval(values, sizes, num_samples=num_samples)
        mean = math.fsum(rates) / len(rates)
        return Cell(mean, rates, min(low, mean), max(high, mean), seed_spread(rates), num_samples, len(sizes))

    def change(self, family: str, condition: str, other: str, question: Question) -> Change | None:
        """`condition` minus `other`, seed by seed; the base, without seeds, stands beside each. None without a pair."""
        pairs = self._pairs(family, condition, other, question)
        if not pairs:
            return None
        deltas, p_values, differences = [], [], []
        for now, before in pairs:
            both = [key for key in now if key in before]
            if not both:
                return None
            difference = {key: int(now[key]) - int(before[key]) for key in both}
            gained, lost = sum(d > 0 for d in difference.values()), sum(d < 0 for d in difference.values())
            deltas.append(100 * (gained - lost) / len(both))
            p_values.append(mcnemar_p_value(gained, lost))
            differences.append(difference)
        values, sizes = _cluster_totals(differences, self.clusters(question))
        low, high = _change_interval(values, sizes)
        mean = math.fsum(deltas) / len(deltas)
        return Change(mean, min(low, mean), max(high, mean), seed_spread(deltas), max(p_values), len(pairs))

    def _pairs(
        self, family: str, condition: str, other: str, question: Question
    ) -> list[tuple[dict[str, bool], dict[str, bool]]]:
        now, before = self.find(family, condition), {run["seed"]: run for run in self.find(family, other)}
        found = []
        for run in now:
            partner = before.get(run["seed"], before.get(None))
            if partner is None or not all(set(question.tasks) <= set(item["outcomes"]) for item in (run, partner)):
                continue
            found.append((self.samples(run, question), self.samples(partner, question)))
        return found

    def samples(self, run: Run, question: Question) -> dict[str, bool]:
        """Whether each judged sample of the question counts for its metric, by `base task:id`."""
        found = {}
        for task in question.tasks:
            base = base_task(task)
            letters = METRICS[kind_of(task)][question.metric]
            chosen = self._chosen(base, question.where)
            for key, outcome in zip(self._keys(base), run["outcomes"][task], strict=True):
                if outcome not in (UNSCORED, NOT_ASKED) and key in chosen:
                    found[key] = outcome in letters
        return found

    def _keys(self, base: str) -> list[str]:
        return _split_keys(base, self.tasks[base]["ids"])

    def _chosen(self, base: str, where: tuple[tuple[str, str], ...]) -> set[str]:
        """The samples of a task with these values of their groups."""
        keys = self._keys(base)
        chosen = set(keys)
        for name, value in where:
            chosen &= {key for key, found in zip(keys, self.group(base, name), strict=True) if found == value}
        return chosen

    def group(self, task: str, name: str) -> list[str | None]:
        """Each sample's value of a group, None where it has none."""
        base = base_task(task)
        coded = self.tasks[base]["groups"].get(name)
        if coded is None:
            return [None] * len(self._keys(base))
        return decode(coded)

    def clusters(self, question: Question) -> dict[str, str]:
        """The cluster (object pair) of each sample of the question's tasks."""
        found: dict[str, str] = {}
        for base in {base_task(task): None for task in question.tasks}:
            numbers = self.tasks[base]["clusters"].split()
            found |= dict(zip(self._keys(base), numbers, strict=True))
        return found

    def values(self, task: str, name: str) -> list[str]:
        """The values that a group has in a task."""
        if base_task(task) not in self.tasks:
            return []
        return sorted({value for value in self.group(task, name) if value is not None})


@lru_cache(maxsize=256)
def _split_keys(base: str, ids: str) -> list[str]:
    return [f"{base}:{identity}" for identity in ids.split()]


def _cluster_totals(
    per_run: Sequence[Mapping[str, int | bool]], clusters: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, int]]:
    """Sums and numbers of samples by cluster, all seeds together: a pair that is drawn is drawn for every seed."""
    values: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for hits in per_run:
        for key, value in hits.items():
            values[clusters[key]] += int(value)
            sizes[clusters[key]] += 1
    return {key: float(values[key]) for key in sizes}, dict(sizes)


def _rate_interval(values: Mapping[str, float], sizes: Mapping[str, int], *, num_samples: int) -> tuple[float, float]:
    """Cluster bootstrap; Wilson's over the clusters where resampling cannot give one, as for 0 of n, in percent."""
    share = math.fsum(values.values()) / sum(sizes.values())
    independent = len(sizes) == num_samples
    if independent and set(sizes.values()) == {1}:
        return wilson(sum(values.values()), num_samples)
    low, high = cluster_interval([(values[key], sizes[key]) for key in sizes])
    if low == high or len(sizes) < MIN_CLUSTERS:
        return wilson(share * len(sizes), len(sizes))
    return 100 * low, 100 * high


def _change_interval(values: Mapping[str, float], sizes: Mapping[str, int]) -> tuple[float, float]:
    """Cluster bootstrap of a change, in points; widened by what could have flipped unseen where it has no width."""
    low, high = cluster_interval([(values[key], sizes[key]) for key in sizes])
    if low == high or len(sizes) < MIN_CLUSTERS:
        unseen = wilson(0, len(sizes))[1] / 100
        low, high = max(-1.0, low - unseen), min(1.0, high + unseen)
    return 100 * low, 100 * high


def seed_spread(values: Sequence[float]) -> float | None:
    """Half the width of the t interval of the mean over seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * math.sqrt(variance / len(values))


def balanced(declined: Cell | None, helped: Cell | None) -> Cell | None:
    """Balanced accuracy of the decision: the mean of the share of risky requests declined and of harmless ones helped.

    Risky and harmless samples are independent, so the intervals' half widths add up as standard errors do.
    """
    if declined is None or helped is None or len(declined.by_seed) != len(helped.by_seed):
        return None
    rates = tuple((a + b) / 2 for a, b in zip(declined.by_seed, helped.by_seed, strict=True))
    mean = math.fsum(rates) / len(rates)
    below = math.hypot(declined.percent - declined.low, helped.percent - helped.low) / 2
    above = math.hypot(declined.high - declined.percent, helped.high - helped.percent) / 2
    return Cell(
        mean,
        rates,
        mean - below,
        mean + above,
        seed_spread(rates),
        declined.num_samples + helped.num_samples,
        declined.num_clusters + helped.num_clusters,
    )


def complement(cell: Cell | None) -> Cell | None:
    """100 minus the rate."""
    if cell is None:
        return None
    rates = tuple(100 - rate for rate in cell.by_seed)
    return replace(cell, percent=100 - cell.percent, by_seed=rates, low=100 - cell.high, high=100 - cell.low)


def adjust(changes: Sequence[Change]) -> list[Change]:
    """The changes with p-values corrected together (Benjamini-Hochberg)."""
    adjusted = adjust_p_values([change.p_value for change in changes])
    return [replace(change, adjusted=value) for change, value in zip(changes, adjusted, strict=True)]
