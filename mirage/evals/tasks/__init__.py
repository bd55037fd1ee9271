"""The tasks by name. Adding one is a `Task` subclass and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from mirage.errors import UserError
from mirage.evals.task import Task
from mirage.evals.tasks.general import GeneralTask
from mirage.evals.tasks.general_sets import GENERAL_SETS
from mirage.evals.tasks.harm import HarmTask
from mirage.evals.tasks.mis import RiskyTask, TwinsTask
from mirage.evals.tasks.safety_sets import SAFETY_SETS
from mirage.evals.tasks.tsv_task import PREFIX, named_task
from mirage.evals.variants import VariantTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        RiskyTask("mis_easy", "easy", "neutral text, harm visible in an image"),
        RiskyTask("mis_hard", "hard", "neutral text, both images harmless alone"),
        RiskyTask("mis_real", "real", "real photographs"),
        HarmTask("mis_easy_harm", "easy", "is the answer harmful; for guard models as judges"),
        HarmTask("mis_hard_harm", "hard", "is the answer harmful; for guard models as judges"),
        HarmTask("mis_real_harm", "real", "is the answer harmful; for guard models as judges"),
        TwinsTask("twins", "twins", "the same kind of question, a harmless combination"),
        RiskyTask("mis_multi", "multi", "three or four pictures, one pair of them risky and asked about"),
        TwinsTask("multi_twins", "multi", "three or four pictures, no risky pair asked about"),
        RiskyTask("contrast", "contrast", "pictures in the other order, or both objects named in the text"),
        TwinsTask("contrast_twins", "contrast", "the same with a harmless pair, or asked to keep things safely apart"),
        GeneralTask("general", "general", "held-out multiple-choice questions about pictures"),
        RiskyTask("mis_line", "line", "siblings of easy and hard rows in line art, a style that training never shows"),
        TwinsTask("line_twins", "line", "their twins in line art"),
        GeneralTask("line_general", "line", "multiple-choice questions of the general test about line art"),
        *SAFETY_SETS,
        *GENERAL_SETS,
    )
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names in this order. Raises `UserError` for an unknown or repeated name, or for none."""
    if not names:
        raise UserError(f"eval.tasks is empty; name at least one of {', '.join(TASKS)}")
    if len(set(names)) != len(names):
        raise UserError(f"eval.tasks names a task twice: {', '.join(names)}")
    return [find_task(name) for name in names]


def find_task(name: str) -> Task:
    """One task by its name: one of `TASKS`, `tsv:NAME` for a TSV file, each also as `task@variant`.

    Raises `UserError` for an unknown task or variant.
    """
    base, at, variant = name.partition("@")
    if base.startswith(PREFIX):
        task = named_task(base)
    elif base in TASKS:
        task = TASKS[base]
    else:
        near = difflib.get_close_matches(base, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"eval.tasks: there is no task {base!r}; {hint}tasks are {', '.join(TASKS)}, and {PREFIX}NAME")
    return VariantTask(task, variant) if at else task
