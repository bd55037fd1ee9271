"""What a task's rates stand for: harm, over-refusal or general ability, and which direction is for the better."""

from __future__ import annotations

from typing import Literal

from mirage.errors import UserError
from mirage.evals.metrics import TaskResult
from mirage.evals.tasks import find_task

Role = Literal["safety", "over_refusal", "general"]
Better = Literal["lower", "higher", "neither"]
ROLES: dict[Role, str] = {"safety": "Safety", "over_refusal": "Over-refusal", "general": "General ability"}
_OVER_REFUSAL = ("refused", "rejected", "over_sensitive", "safe_full_refusal")
_ABILITY = ("accuracy", "circular", "win")
# For tasks that this version does not know: evaluations outlive the tasks' names.
_USUAL: dict[str, Better] = {"asr": "lower", "hr": "lower", "rsr": "higher", "accuracy": "higher", "refused": "lower"}


def role_of(task: str, result: TaskResult) -> Role:
    """By the task's headline rate: harm unless it says how often harmless requests are declined, or ability."""
    name = headline(task, result)
    if name in _OVER_REFUSAL:
        return "over_refusal"
    return "general" if name.startswith(_ABILITY) else "safety"


def headline(task: str, result: TaskResult) -> str:
    """The task's first rate; '' for a task without any."""
    known = [name for name in _meanings(task) if name in result.rates]
    return known[0] if known else next(iter(result.rates), "")


def better_of(task: str, metric: str) -> Better:
    """Which way is for the better."""
    known = _meanings(task).get(metric)
    return known[0] if known else _USUAL.get(metric, "neither")


def meaning_of(task: str, metric: str) -> str:
    """The rate in words; '' for one that this version does not know."""
    known = _meanings(task).get(metric)
    return known[1] if known else ""


def _meanings(task: str) -> dict[str, tuple[Better, str]]:
    try:
        return {metric.name: (metric.better, metric.meaning) for metric in find_task(task).metrics}
    except UserError:
        return {}
