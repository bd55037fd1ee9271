"""The evaluations of a run as the choice among them needs them: 2 kB each, so that ten thousand are held at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np

from mirage.errors import UserError
from mirage.evals.metrics import Rate
from mirage.evals.results import RESULTS_FILE, Results, read_results

_T = TypeVar("_T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the rule looks at in one evaluation's results; without categories, tables and comparisons."""

    request: str
    step: int | None
    fingerprint: str
    baseline: str | None
    """Fingerprint of the weights that the paired tests compare with."""
    judge: tuple[str, str]
    """Name and version."""
    data_sha256: str
    rates: tuple[tuple[str, str], ...]
    """(task, metric) of each rate, in the order of the results."""
    limits: np.ndarray
    """[rates, 2] float64, percent: the limit that counts against the model where lower is better, and where higher is.
    NaN without a judged sample."""
    sizes: tuple[tuple[str, int], ...]
    """(task, samples)."""
    invalid: Mapping[str, str]
    """Why a task is invalid, by its name."""

    @classmethod
    def of(cls, results: Results) -> Evaluation:
        """The part of `results` that the rule needs."""
        rates = [rate for task in results.tasks.values() for rate in task.rates.values()]
        limits = [[worse_limit(rate, better="lower"), worse_limit(rate, better="higher")] for rate in rates]
        return cls(
            request=results.request,
            step=results.step,
            fingerprint=results.fingerprint,
            baseline=results.baseline.fingerprint if results.baseline is not None else None,
            judge=_shared((results.judge.name, results.judge.version)),
            data_sha256=_shared(results.data_sha256),
            rates=_shared(tuple((name, metric) for name, task in results.tasks.items() for metric in task.rates)),
            limits=np.array(limits, np.float64).reshape(len(rates), 2),
            sizes=_shared(tuple((name, task.num_samples) for name, task in results.tasks.items())),
            invalid={name: task.invalid_reason or "" for name, task in results.tasks.items() if not task.valid},
        )


def _shared(value: _T) -> _T:
    """The first value equal to this one: the evaluations of a run have the same names."""
    return cast(_T, _first(value))


@lru_cache(maxsize=4096)
def _first(value: Hashable) -> Hashable:
    return value


def worse_limit(rate: Rate, *, better: Literal["lower", "higher"]) -> float | None:
    """The limit of a rate that counts against the model, in percent; None without a judged sample."""
    if rate.percent is None:
        return None
    if better == "lower":
        return max(limit for limit in (rate.ci_high, rate.cluster_high, rate.outer_high) if limit is not None)
    return min(limit for limit in (rate.ci_low, rate.cluster_low, rate.outer_low) if limit is not None)


def run_evaluations(run_dir: Path) -> tuple[dict[str, Evaluation], dict[str, str]]:
    """The run's evaluations by folder name, and why others cannot be read. Raises `UserError` if there are none."""
    found: dict[str, Evaluation] = {}
    unreadable: dict[str, str] = {}
    for path in sorted((run_dir / "evals").glob(f"step-*/{RESULTS_FILE}")):
        try:
            found[path.parent.name] = Evaluation.of(read_results(path))
        except UserError as error:
            unreadable[path.parent.name] = str(error)
    if not found and not unreadable:
        raise UserError(
            f"{run_dir} holds no evaluations (evals/step-*/{RESULTS_FILE}); evaluate one: mirage evaluate {run_dir}"
        )
    return found, unreadable
