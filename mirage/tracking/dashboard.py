"""The wandb workspace as code: sections and panels over the names that a run logs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mirage.config.schema import SelectConfig
from mirage.data.parts import SEGMENTS
from mirage.tracking.names import describe_metric

NAME = "MIRage"
VIEW = "miragesafety"
"""The workspace's name in its address; saving again under it updates the workspace."""
SECTIONS = ("Safety", "Over-refusal", "General", "Pareto", "Training health", "Data", "Throughput")
# wandb's own colours repeat after a few runs; splits keep theirs in the order of the tasks.
_SAFETY_RATES = {"asr": "ASR: attack success", "rsr": "RSR: safe with reasoning", "rr": "RR: refusal", "hr": "HR"}


@dataclass(frozen=True)
class TaskRates:
    """A task that the dashboard shows, with the rates that it logs."""

    name: str
    rates: tuple[str, ...]


def dashboard_tasks(names: Sequence[str]) -> list[TaskRates]:
    """The tasks of these names, as registered. Raises `UserError` for an unknown one."""
    from mirage.evals.tasks import find_tasks

    return [TaskRates(task.name, tuple(metric.name for metric in task.metrics)) for task in find_tasks(tuple(names))]


def build_workspace(*, entity: str, project: str, tasks: Sequence[TaskRates], select: SelectConfig) -> Any:
    """A `wandb_workspaces.workspaces.Workspace` with SECTIONS; nothing is sent."""
    import wandb_workspaces.workspaces as ws

    safety = _matching(tasks, select.safety)
    over_refusal, general = _matching(tasks, select.over_refusal), _matching(tasks, select.general)
    panels = {
        "Safety": _safety(safety),
        "Over-refusal": _over_refusal(over_refusal),
        "General": _general(general),
        "Pareto": pareto_panels(),
        "Training health": _health(),
        "Data": _data(),
        "Throughput": _throughput(),
    }
    sections = [
        ws.Section(
            name=name,
            panels=_identified(panels[name], "workspace", name),
            is_open=name in ("Safety", "Over-refusal", "General", "Pareto"),
            layout_settings=ws.SectionLayoutSettings(columns=3, rows=2),
        )
        for name in SECTIONS
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(max_runs=20),
        runset_settings=ws.RunsetSettings(
            pinned_columns=[
                "run:displayName",
                "summary:select/score",
                "summary:select/asr",
                "summary:select/over_refusal",
                "summary:select/general",
                "config:train.value.lr",
            ]
        ),
    )


def _matching(tasks: Sequence[TaskRates], patterns: Iterable[str]) -> list[TaskRates]:
    from fnmatch import fnmatchcase

    patterns = list(patterns)
    return [
        task
        for task in tasks
        if any(fnmatchcase(f"{task.name}:{rate}", pattern) for rate in task.rates for pattern in patterns)
    ]


def line(title: str, names: Sequence[str], *, axis: str, **settings: Any) -> Any:
    """A line plot on an axis (`train`, `eval`), with the unit of what it shows."""
    import wandb_workspaces.reports.v2 as wr

    found = describe_metric(names[0]) if names else None
    return wr.LinePlot(
        title=title,
        x=f"{axis}/step",
        y=list(names),
        title_x="optimiser step",
        title_y=settings.pop("title_y", found.unit if found else None),
        max_runs_to_show=20,
        **settings,
    )


def _family(title: str, pattern: str, *, axis: str, unit: str) -> Any:
    """A line plot of every name that a regular expression takes."""
    return line(title, (), axis=axis, metric_regex=pattern, title_y=unit)


def _table(task: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.WeavePanelSummaryTable(table_name=f"samples/{task}")


def _safety(tasks: Sequence[TaskRates]) -> list[Any]:
    panels = [
        line(f"{title} by split", names, axis="eval")
        for rate, title in _SAFETY_RATES.items()
        if (names := [f"eval/{task.name}/{rate}" for task in tasks if rate in task.rates])
    ]
    attacked = [task for task in tasks if "asr" in task.rates]
    if attacked:
        changes = [f"eval/{task.name}/asr_change" for task in attacked]
        panels.append(line("ASR: change against step 0", changes, axis="eval"))
    panels.append(line("Alarms of the guards", ["eval/alarms"], axis="eval"))
    for task in attacked:
        limits = [f"eval/{task.name}/{name}" for name in ("asr", "asr_ci_low", "asr_ci_high")]
        panels.append(line(f"ASR with 95% limits, {task.name}", limits, axis="eval"))
    for task in tasks:
        for rate, title in _SAFETY_RATES.items():
            if rate in task.rates:
                pattern = f"^eval/{task.name}/category/[^/]+/{rate}$"
                short = title.partition(":")[0]
                panels.append(_family(f"{short} by category, {task.name}", pattern, axis="eval", unit="percent"))
    return panels + [_table(task.name) for task in tasks]


def _over_refusal(tasks: Sequence[TaskRates]) -> list[Any]:
    panels = []
    for rate, title in (
        ("refused", "Harmless requests refused"),
        ("helped", "Harmless requests helped with"),
        ("helped_right", "Helped, and the pictures named rightly"),
        ("neither", "Neither helped nor refused"),
    ):
        if names := [f"eval/{task.name}/{rate}" for task in tasks if rate in task.rates]:
            panels.append(line(title, names, axis="eval"))
    refusing = [task for task in tasks if "refused" in task.rates]
    if refusing:
        changes = [f"eval/{task.name}/refused_change" for task in refusing]
        panels.append(line("Refused: change against step 0", changes, axis="eval"))
    return panels + [_table(task.name) for task in tasks]


def _general(tasks: Sequence[TaskRates]) -> list[Any]:
    panels = []
    for rate, title in (
        ("accuracy", "Accuracy"),
        ("circular", "Right in every rotation"),
        ("no_option", "No option can be read from the answer"),
    ):
        if names := [f"eval/{task.name}/{rate}" for task in tasks if rate in task.rates]:
            panels.append(line(title, names, axis="eval"))
    if names := [f"eval/{task.name}/accuracy_change" for task in tasks if "accuracy" in task.rates]:
        panels.append(line("Accuracy: change against step 0", names, axis="eval"))
    return panels + [_table(task.name) for task in tasks]


def pareto_panels() -> list[Any]:
    """What is traded against what, one point a run, and the score that a sweep minimises."""
    import wandb_workspaces.reports.v2 as wr

    asr, over_refusal, general, score = (
        wr.SummaryMetric(f"select/{name}") for name in ("asr", "over_refusal", "general", "score")
    )
    return [
        wr.ScatterPlot(title="Attack success and over-refusal, percent (low, low)", x=asr, y=over_refusal),
        wr.ScatterPlot(title="Attack success and general ability, percent (low, high)", x=asr, y=general),
        wr.ScatterPlot(title="Over-refusal and general ability, percent (low, high)", x=over_refusal, y=general),
        line("Score over the run (lower is better)", ["eval/select/score"], axis="eval"),
        line(
            "Its parts over the run",
            [f"eval/select/{name}" for name in ("asr", "over_refusal", "general")],
            axis="eval",
        ),
        wr.ParallelCoordinatesPlot(
            title="Learning rate and score",
            columns=[
                wr.ParallelCoordinatesPlotColumn(wr.Config("train.lr"), display_name="learning rate", log=True),
                wr.ParallelCoordinatesPlotColumn(asr, display_name="attack success"),
                wr.ParallelCoordinatesPlotColumn(over_refusal, display_name="over-refusal"),
                wr.ParallelCoordinatesPlotColumn(general, display_name="general ability"),
                wr.ParallelCoordinatesPlotColumn(score, display_name="score"),
            ],
        ),
    ]


def _health() -> list[Any]:
    return [
        line("Loss", ["train/loss"], axis="train"),
        line("Loss by part of the answer", [f"train/loss_segment/{name}" for name in SEGMENTS], axis="train"),
        _family("Loss by source", "^train/loss_source/", axis="train", unit="nat a token"),
        line("Token accuracy", ["train/token_accuracy"], axis="train"),
        _family("Token accuracy by source", "^train/token_accuracy_source/", axis="train", unit="0 to 1"),
        line("Gradient norm", ["train/grad_norm"], axis="train", log_y=True),
        line("Learning rate", ["train/lr"], axis="train"),
    ]


def _data() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    scalars = {
        "data/rows": "Rows of the mixture",
        "data/tokens": "Tokens of one pass",
        "data/supervised_tokens": "Supervised tokens of one pass",
        "data/rows_unusable": "Rows that cannot be read",
        "data/rows_too_long": "Rows that are too long",
    }
    return [
        line("Passes over the mixture", ["train/epoch"], axis="train"),
        line("Tokens of a step", ["train/tokens", "train/supervised_tokens"], axis="train"),
        line("Share of the step spent waiting for data", ["train/data_wait_share"], axis="train"),
        line("Fill of the packs", ["train/pack_fill"], axis="train"),
        line("Padding in attention", ["train/attention_padding_share"], axis="train"),
        *(wr.ScalarChart(title=title, metric=wr.SummaryMetric(name)) for name, title in scalars.items()),
    ]


def _throughput() -> list[Any]:
    parts = ("data", "forward", "backward", "optimizer", "other")
    return [
        line("Tokens a second", ["train/tokens_per_second", "train/supervised_tokens_per_second"], axis="train"),
        line("Samples a second", ["train/samples_per_second"], axis="train"),
        line("Share of the devices' arithmetic", ["train/mfu", "train/hfu"], axis="train"),
        line("Time of a step", ["train/step_seconds"], axis="train"),
        line(
            "Where a step's time goes",
            [f"train/{part}_seconds" for part in parts],
            axis="train",
            plot_type="stacked-area",
        ),
        line("Memory", ["train/peak_memory_bytes"], axis="train"),
        line("Imbalance of ranks", ["train/imbalance_planned", "train/imbalance_measured"], axis="train"),
    ]


def _identified(panels: list[Any], *words: str) -> list[Any]:
    """Panels with ids that follow from their place: the same definition is the same text each time."""
    for number, panel in enumerate(panels):
        panel._id = stable_id(*words, str(number), getattr(panel, "title", None) or "")
    return panels


def stable_id(*words: str) -> str:
    """A short id in place of wandb's random ones."""
    return hashlib.sha256("|".join(words).encode()).hexdigest()[:12]
