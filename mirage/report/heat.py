"""Rates by category, task beside task: numbers with n and interval first, the shade only repeats them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mirage.evals.metrics import Group, Rate
from mirage.report.comparison import Column
from mirage.report.roles import better_of, headline

NUM_SHADES = 10


@dataclass(frozen=True)
class HeatCell:
    """One category of one task. `shade` is 0 (good) to 10 (bad), None where there is nothing to shade."""

    rate: Rate
    before: float | None
    """The reference's percentage."""
    shade: int | None


@dataclass(frozen=True)
class HeatMap:
    """The headline rates of one column's tasks, by category and then sub-category."""

    label: str
    heads: tuple[tuple[str, str], ...]
    """Task and metric of each column of cells."""
    rows: tuple[tuple[str, bool, tuple[HeatCell | None, ...]], ...]
    """Name, whether it is a sub-category, cells."""


def heat_map(column: Column, reference: Column, *, with_subs: bool = True) -> HeatMap:
    """Of the tasks that have more than one category; `with_subs` adds sub-categories."""
    results, first = column.evaluation.results, reference.evaluation.results
    tasks = [task for task, result in results.tasks.items() if len(result.by_category) > 1 and result.rates]
    heads = tuple((task, headline(task, results.tasks[task])) for task in tasks)
    categories = sorted({name for task in tasks for name in results.tasks[task].by_category})
    subs = sorted({name for task in tasks for name in results.tasks[task].by_sub_category})
    rows = []
    for category in categories:
        own = [sub for sub in subs if sub.startswith(f"{category} / ")]
        # A category's only sub-category would repeat its line.
        names = [(category, False), *((sub, True) for sub in own if with_subs and len(own) > 1)]
        for name, is_sub in names:
            cells = []
            for task, metric in heads:
                old = first.tasks.get(task) if column is not reference else None
                groups = results.tasks[task].by_sub_category if is_sub else results.tasks[task].by_category
                earlier = (old.by_sub_category if is_sub else old.by_category) if old is not None else {}
                cells.append(_cell(task, metric, groups.get(name), earlier.get(name)))
            rows.append((name.removeprefix(f"{category} / ") if is_sub else name, is_sub, tuple(cells)))
    return HeatMap(column.label, heads, tuple(rows))


def _cell(task: str, metric: str, group: Group | None, before: Group | None) -> HeatCell | None:
    rate = group.rates.get(metric) if group is not None else None
    if rate is None or rate.percent is None:
        return None
    old = before.rates.get(metric) if before is not None else None
    better = better_of(task, metric)
    bad = rate.percent if better == "lower" else 100 - rate.percent
    return HeatCell(
        rate, old.percent if old is not None else None, None if better == "neither" else round(bad / 100 * NUM_SHADES)
    )


def heat_maps(columns: Sequence[Column]) -> list[HeatMap]:
    """Of every column but a reference that others are compared with; sub-categories where there is one map."""
    shown = columns[1:] if len(columns) > 1 else columns
    found = [heat_map(column, columns[0], with_subs=len(shown) == 1) for column in shown]
    return [item for item in found if item.heads and item.rows]
