"""Which checkpoint of a run is best: the Pareto front over safety, over-refusal and general ability, and a rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mirage.config.schema import SelectConfig
from mirage.errors import UserError
from mirage.evals.evaluations import Evaluation
from mirage.evals.statistics.pooled import match_names

Axis = Literal["safety", "over_refusal", "general"]
AXES: tuple[Axis, ...] = ("safety", "over_refusal", "general")
_NAMES = {
    "safety": "attack success and hallucination, upper limit",
    "over_refusal": "over-refusal, upper limit",
    "general": "general ability, lower limit",
}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(_Record):
    """One evaluation with its three limits in percent; None where none of the axis's rates was measured."""

    name: str
    step: int | None
    limits: dict[Axis, float | None]
    rates: dict[Axis, tuple[str, ...]] = Field(description="the task:metric rates that each limit is the mean of")
    excluded: str | None = Field(default=None, description="why it cannot win; null: it is on the Pareto front")


class Selection(_Record):
    """What the rule decided, and why."""

    best: str | None
    step: int | None
    reason: str
    rule: str
    candidates: tuple[Candidate, ...]


def rule_text(config: SelectConfig) -> str:
    """The rule in words, with its numbers."""
    return (
        "Each rate is taken at the limit that is worse for the model: the widest of the Wilson, cluster and outer 95% "
        "limits, so that small samples, clusters and unscored answers count against it; an axis is the mean of its "
        "rates' limits. Out are evaluations that are invalid, lack a rate that another one has, or were made with "
        "other samples or judges than most; those that another one beats or equals on every axis and beats on one; and "
        f"those more than {config.max_over_refusal_rise:g} points above step 0 in over-refusal or more than "
        f"{config.max_general_drop:g} points below it in general ability. Of the rest wins the lowest attack success "
        f"and hallucination; within {config.tie_points:g} points of that the lowest over-refusal; within "
        f"{config.tie_points:g} points of that the highest general ability; then the earlier step."
    )


def select_best(
    evaluations: Mapping[str, Evaluation],
    *,
    config: SelectConfig,
    unreadable: Mapping[str, str] | None = None,
    alarm_of: Callable[[str], str | None] | None = None,
) -> Selection:
    """Apply `rule_text`. `unreadable` says of an evaluation's name why it cannot win; so does `alarm_of`, or nothing.

    `alarm_of` is asked about those that no other one beats, as answers are read for it: among many evaluations that are
    few. One with an alarm beats nobody.
    Raises `UserError` where a pattern is no `task:metric`, or no evaluation has a rate of attack success.
    """
    every = [_candidate(name, evaluation, config) for name, evaluation in evaluations.items()]
    if all(candidate.limits["safety"] is None for candidate in every) and every:
        raise UserError(
            f"no evaluation has a rate of eval.select.safety ({', '.join(config.safety)}); its tasks are "
            f"{', '.join(sorted({task for evaluation in evaluations.values() for task, _ in evaluation.sizes}))}"
        )
    start = next((item for item in every if item.step == 0), None)
    usual = _usual_kind(evaluations, every)
    judged = [
        _excluded(
            candidate,
            _invalid(evaluations[candidate.name], candidate)
            or _other_kind(candidate, evaluations[candidate.name], usual),
        )
        for candidate in every
    ]
    judged = _drop_dominated(judged, alarm_of or (lambda name: None))
    usable = start is not None and not _invalid(evaluations[start.name], start)
    baseline = start if usable and start is not None and _kind(evaluations[start.name], start) == usual else None
    judged = [_excluded(item, _beyond_limits(item, baseline, config)) for item in judged]
    broken = [
        Candidate(name=name, step=None, limits=dict.fromkeys(AXES), rates=dict.fromkeys(AXES, ()), excluded=text)
        for name, text in (unreadable or {}).items()
    ]
    winner, reason = _decide([item for item in judged if item.excluded is None], config, baseline=baseline)
    ordered = sorted([*judged, *broken], key=lambda item: (item.step is None, item.step or 0, item.name))
    return Selection(
        best=winner.name if winner else None,
        step=winner.step if winner else None,
        reason=reason,
        rule=rule_text(config),
        candidates=tuple(ordered),
    )


def _candidate(name: str, evaluation: Evaluation, config: SelectConfig) -> Candidate:
    patterns: dict[Axis, tuple[str, ...]] = {
        "safety": config.safety,
        "over_refusal": config.over_refusal,
        "general": config.general,
    }
    found = {axis: _axis_rates(evaluation.rates, tuple(patterns[axis])) for axis in AXES}
    return Candidate(
        name=name,
        step=evaluation.step,
        limits={axis: _axis_limit(evaluation, places, axis) for axis, (places, _) in found.items()},
        rates={axis: names for axis, (_, names) in found.items()},
    )


@lru_cache(maxsize=1024)
def _axis_rates(
    rates: tuple[tuple[str, str], ...], patterns: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Places and names of the rates that an axis is the mean of."""
    matched = match_names(rates, patterns)
    return tuple(map(rates.index, matched)), tuple(f"{task}:{metric}" for task, metric in matched)


def _axis_limit(evaluation: Evaluation, places: Sequence[int], axis: Axis) -> float | None:
    found = evaluation.limits[list(places), int(axis == "general")].tolist()
    return math.fsum(found) / len(found) if found and not any(map(math.isnan, found)) else None


def _excluded(candidate: Candidate, reason: str | None) -> Candidate:
    return candidate if candidate.excluded or not reason else candidate.model_copy(update={"excluded": reason})


def _invalid(evaluation: Evaluation, candidate: Candidate) -> str | None:
    """Too many unscored answers, or a rate without a judged sample, in a task that the rule looks at."""
    if evaluation.invalid:
        for name in sorted({rate.partition(":")[0] for axis in AXES for rate in candidate.rates[axis]}):
            if name in evaluation.invalid:
                return f"{name} is invalid: {evaluation.invalid[name]}"
    empty = [_NAMES[axis] for axis in AXES if candidate.rates[axis] and candidate.limits[axis] is None]
    return f"no judged sample for {', '.join(empty)}" if empty else None


# What must be the same for two evaluations' numbers to be comparable.
_Kind = tuple[tuple[tuple[str, int], ...], tuple[str, str], str]


def _kind(evaluation: Evaluation, candidate: Candidate) -> _Kind:
    rates = sorted(rate for axis in AXES for rate in candidate.rates[axis])
    num_samples = dict(evaluation.sizes)
    sizes = tuple((rate, num_samples[rate.partition(":")[0]]) for rate in rates)
    return sizes, evaluation.judge, evaluation.data_sha256


def _usual_kind(evaluations: Mapping[str, Evaluation], every: Sequence[Candidate]) -> _Kind | None:
    """The kind with the most samples; of equals the one that most evaluations have, then the later one."""
    kinds = [_kind(evaluations[item.name], item) for item in every]
    counts = Counter(kinds)
    ranks = [(sum(size for _, size in kind[0]), counts[kind], place) for place, kind in enumerate(kinds)]
    return kinds[max(ranks)[2]] if ranks else None


def _other_kind(candidate: Candidate, evaluation: Evaluation, usual: _Kind | None) -> str | None:
    kind = _kind(evaluation, candidate)
    if usual is None or kind == usual:
        return None
    if kind[1] != usual[1]:
        return f"scored by judge {'-v'.join(kind[1])}, the others by {'-v'.join(usual[1])}"
    missing = sorted({rate for rate, _ in usual[0]} - {rate for rate, _ in kind[0]})
    if missing:
        return f"lacks {', '.join(missing)}, which others have"
    sizes = sum(size for _, size in kind[0]), sum(size for _, size in usual[0])
    return f"measured on other samples ({sizes[0]} counted over its rates, {sizes[1]} in the fullest evaluation)"


def _drop_dominated(candidates: Sequence[Candidate], alarm_of: Callable[[str], str | None]) -> list[Candidate]:
    """Exclude what another candidate is no worse than on all axes and better than on one; ties keep both.

    Those that are left and have an alarm are out, and no longer beat others.
    """
    judged, quiet = list(candidates), set[str]()
    while True:
        found = _beaten(judged)
        asked = [number for number, item in enumerate(found) if item.excluded is None and item.name not in quiet]
        if not asked:
            return found
        for number in asked:
            judged[number] = _excluded(judged[number], alarm_of(judged[number].name))
            quiet.add(judged[number].name)


def _beaten(candidates: Sequence[Candidate]) -> list[Candidate]:
    standing = [item for item in candidates if item.excluded is None]
    costs = np.array([_costs(item) for item in standing])
    found = []
    for item in candidates:
        better = None
        if item.excluded is None:
            own = np.array(_costs(item))
            dominating = (costs <= own).all(axis=1) & (costs < own).any(axis=1)
            better = standing[int(dominating.argmax())] if dominating.any() else None
        found.append(_excluded(item, f"{better.name} is as good or better on every axis" if better else None))
    return found


def _costs(candidate: Candidate) -> tuple[float, ...]:
    """Lower is better; an axis that nobody has measured costs nothing."""
    limits = candidate.limits
    return limits["safety"] or 0.0, limits["over_refusal"] or 0.0, -(limits["general"] or 0.0)


def _beyond_limits(candidate: Candidate, baseline: Candidate | None, config: SelectConfig) -> str | None:
    if baseline is None:
        return None
    refusal, general = candidate.limits["over_refusal"], candidate.limits["general"]
    first_refusal, first_general = baseline.limits["over_refusal"], baseline.limits["general"]
    if refusal is not None and first_refusal is not None and refusal - first_refusal > config.max_over_refusal_rise:
        return (
            f"over-refusal up to {refusal:.1f}%, {refusal - first_refusal:.1f} points above step 0 "
            f"(allowed {config.max_over_refusal_rise:g})"
        )
    if general is not None and first_general is not None and first_general - general > config.max_general_drop:
        return (
            f"general ability down to {general:.1f}%, {first_general - general:.1f} points below step 0 "
            f"(allowed {config.max_general_drop:g})"
        )
    return None


def _decide(
    standing: Sequence[Candidate], config: SelectConfig, *, baseline: Candidate | None
) -> tuple[Candidate | None, str]:
    if not standing:
        return None, "No checkpoint is left: see why each one is out. Nothing is chosen rather than the least bad."
    words = (
        [] if baseline is not None else ["No comparable evaluation of step 0, so the limits against it are not used."]
    )
    left = list(standing)
    for place, axis in enumerate(AXES):
        if left[0].limits[axis] is None:
            words.append(f"Nothing measures {_NAMES[axis].partition(',')[0]}.")
            continue
        best = min(_costs(item)[place] for item in left)
        near = [item for item in left if _costs(item)[place] <= best + config.tie_points]
        if len(near) < len(left):
            words.append(f"{_NAMES[axis]} {abs(best):.1f}% leaves {_listed(near)} of {_listed(left)}.")
        left = near
    winner = min(left, key=lambda item: (item.step is None, item.step or 0, item.name))
    if len(left) > 1:
        words.append(f"{_listed(left)} are level within {config.tie_points:g} points on all axes; the earliest wins.")
    elif len(standing) == 1:
        words.append(f"{winner.name} is the only one left.")
    return winner, " ".join(words)


def _listed(candidates: Sequence[Candidate]) -> str:
    names = [item.name for item in candidates]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def selection_markdown(selection: Selection) -> str:
    """The decision, the candidates with their limits, and the rule."""
    chosen = f"**Best: {selection.best}.**" if selection.best else "**No checkpoint qualifies.**"
    lines = [
        ["evaluation", *(f"{_NAMES[axis]}, %" for axis in AXES), "verdict"],
        ["---", "---:", "---:", "---:", "---"],
    ]
    for item in selection.candidates:
        limits = [item.limits[axis] for axis in AXES]
        verdict = (
            "best" if item.name == selection.best else f"out: {item.excluded}" if item.excluded else "on the front"
        )
        cells = ["-" if limit is None else f"{limit:.1f}" for limit in limits]
        lines.append([item.name, *cells, verdict.replace("|", "\\|")])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{chosen} {selection.reason}\n\n{table}\n\nThe rule. {selection.rule}\n"
