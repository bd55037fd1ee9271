"""The report's drawings: harm against its price, training curves, and every task's rates over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mirage.data.parts import SEGMENTS
from mirage.evals.metrics import Rate, TaskResult
from mirage.evals.results import Results
from mirage.evals.statistics.pooled import match_rates
from mirage.report.charts import Point, Series, chart, thin_out
from mirage.report.comparison import select_patterns
from mirage.report.roles import Role, better_of, headline, role_of
from mirage.report.run_folder import Run

RateName = tuple[str, str]
_AXES: dict[Role, str] = {"safety": "harm", "over_refusal": "over-refusal", "general": "general ability"}
_TRAINING = (
    ("Training loss", "train/loss", "loss"),
    ("Learning rate", "train/lr", "lr"),
    ("Gradient norm", "train/grad_norm", "norm"),
    ("Token accuracy", "train/token_accuracy", "share"),
    ("Tokens a second", "train/tokens_per_second", "1/s"),
)


@dataclass(frozen=True)
class Mean:
    """The mean of several rates of one evaluation, percent."""

    percent: float
    low: float
    high: float


def pareto_charts(runs: Sequence[Run]) -> list[Markup]:
    """Harm against over-refusal and against general ability: one path a run, one point an evaluation."""
    harm = shared_rates(runs, "safety")
    found = []
    for role in ("over_refusal", "general"):
        price = shared_rates(runs, role)  # type: ignore[arg-type]
        if not harm or not price:
            continue
        series = [_path(run, harm, price, style=number, alone=len(runs) == 1) for number, run in enumerate(runs)]
        found.append(
            chart(
                f"{_AXES['safety'].capitalize()} ({_names(harm)}) against {_AXES[role]} ({_names(price)})",  # type: ignore[index]
                series,
                x_label=f"{_AXES[role]}, % ({'lower' if role == 'over_refusal' else 'higher'} is better)",  # type: ignore[index]
                y_label="harm, % (lower is better)",
                x_range=(-3, 103),
                y_range=(-3, 103),
            )
        )
    return found


def shared_rates(runs: Sequence[Run], role: Role) -> list[RateName]:
    """The rates of an axis that every evaluation of every run has and that are valid in all of them.

    Of harm only attack success counts where there is any: a checkpoint that answers nothing sensible has little of it
    and much hallucination, and a mean of both would hide either.
    """
    every = [item.results for run in runs for item in run.evaluations]
    first = every[0]
    names = match_rates(first.tasks, select_patterns(runs[0], role))
    if role == "safety":
        names = [name for name in names if name[1].startswith("asr")] or names
    names = [name for name in names if all(_usable(results, name) for results in every)]
    if names:
        return names
    fallback = [(task, headline(task, result)) for task, result in first.tasks.items() if role_of(task, result) == role]
    if role == "safety":
        fallback = [name for name in fallback if better_of(*name) == "lower"]
    return [name for name in fallback if all(_usable(results, name) for results in every)]


def _usable(results: Results, name: RateName) -> bool:
    task = results.tasks.get(name[0])
    return task is not None and task.valid and name[1] in task.rates and task.rates[name[1]].percent is not None


def mean_rate(results: Results, names: Sequence[RateName]) -> Mean:
    """Each task with equal weight; the interval from each rate's cluster interval, the tasks taken as independent.

    That is how the pooled test of general ability has it (mirage.evals.statistics.pooled).
    """
    rates = [results.tasks[task].rates[metric] for task, metric in names]
    percent = math.fsum(rate.percent or 0.0 for rate in rates) / len(rates)
    down = math.sqrt(math.fsum(((rate.percent or 0.0) - _limits(rate)[0]) ** 2 for rate in rates)) / len(rates)
    up = math.sqrt(math.fsum((_limits(rate)[1] - (rate.percent or 0.0)) ** 2 for rate in rates)) / len(rates)
    return Mean(percent, max(0.0, percent - down), min(100.0, percent + up))


def _limits(rate: Rate) -> tuple[float, float]:
    low = rate.ci_low if rate.cluster_low is None else rate.cluster_low
    high = rate.ci_high if rate.cluster_high is None else rate.cluster_high
    return low or 0.0, 100.0 if high is None else high


def _path(run: Run, harm: Sequence[RateName], price: Sequence[RateName], *, style: int, alone: bool) -> Series:
    points = []
    for number, evaluation in enumerate(run.evaluations):
        x, y = mean_rate(evaluation.results, price), mean_rate(evaluation.results, harm)
        is_end = number in (0, len(run.evaluations) - 1)
        points.append(
            Point(
                x.percent,
                y.percent,
                # Intervals of every point of a long path would hide the path.
                y.low if is_end else None,
                y.high if is_end else None,
                title=f"{run.name}, {evaluation.label}: harm {y.percent:.1f}% [{y.low:.1f}, {y.high:.1f}], "
                f"price {x.percent:.1f}% [{x.low:.1f}, {x.high:.1f}]",
                x_low=x.low if is_end else None,
                x_high=x.high if is_end else None,
                label=evaluation.label if alone and is_end else "",
            )
        )
    return Series(run.name, points, style)


def _names(rates: Sequence[RateName]) -> str:
    """'mis_easy asr', or 'mean of mis_easy, mis_hard asr'."""
    metrics = dict.fromkeys(metric for _, metric in rates)
    words = "; ".join(f"{', '.join(task for task, name in rates if name == metric)} {metric}" for metric in metrics)
    return words if len(rates) == 1 else f"mean of {words}"


def training_charts(runs: Sequence[Run]) -> list[Markup]:
    """Loss, learning rate, gradient norm and the like over steps; loss by segment and source for a single run."""
    found = []
    for title, name, unit in _TRAINING:
        series = [Series(run.name, thin_out(_values(run, name)), number) for number, run in enumerate(runs)]
        found.append(chart(title, series, x_label="step", y_label=unit, log=unit in ("loss", "norm")))
    if len(runs) == 1:
        run = runs[0]
        names = {key for record in run.training for key in record if key.startswith("train/loss_")}
        segments = [f"train/loss_segment/{name}" for name in SEGMENTS if f"train/loss_segment/{name}" in names]
        sources = sorted(name for name in names if name.startswith("train/loss_source/"))
        for title, keys in (("Loss by part of the answer", segments), ("Loss by source", sources)):
            series = [
                Series(key.rsplit("/", 1)[1], thin_out(_values(run, key)), number) for number, key in enumerate(keys)
            ]
            found.append(chart(title, series, x_label="step", y_label="loss", log=True))
    return [figure for figure in found if figure]


def _values(run: Run, name: str) -> list[Point]:
    records = (record for record in run.training if isinstance(record.get(name), int | float))
    return [Point(record["step"], float(record[name])) for record in records]


def evaluation_charts(runs: Sequence[Run]) -> list[Markup]:
    """Each task's rates over steps with 95% intervals: of one run all rates, of several the headline rate of each.

    Empty where no run has two evaluations.
    """
    if all(len(run.evaluations) < 2 for run in runs):
        return []
    tasks: dict[str, TaskResult] = {}
    for run in runs:
        for evaluation in run.evaluations:
            tasks |= {task: tasks.get(task, result) for task, result in evaluation.results.tasks.items()}
    found = []
    for task, result in tasks.items():
        metrics = list(result.rates) if len(runs) == 1 else [headline(task, result)]
        series = [
            Series(
                metric if len(runs) == 1 else run.name, _rates(run, task, metric), place if len(runs) == 1 else number
            )
            for number, run in enumerate(runs)
            for place, metric in enumerate(metrics)
        ]
        title = task if len(runs) == 1 else f"{task}: {metrics[0]}"
        found.append(chart(title, series, x_label="step", y_label="%", y_range=(-3, 103)))
    return [figure for figure in found if figure]


def _rates(run: Run, task: str, metric: str) -> list[Point]:
    found = []
    for evaluation in run.evaluations:
        result = evaluation.results.tasks.get(task)
        rate = result.rates.get(metric) if result is not None else None
        if result is None or not result.valid or rate is None or rate.percent is None:
            continue
        title = f"{evaluation.label}: {metric} {rate.percent:.1f}% [{rate.ci_low:.1f}, {rate.ci_high:.1f}], n {rate.n}"
        found.append(Point(evaluation.results.step or 0, rate.percent, rate.ci_low, rate.ci_high, title))
    return found
