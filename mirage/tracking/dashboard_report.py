"""A wandb report that compares runs with step 0, with one another, and with the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mirage.miniature.paper import MODELS, TABLE_4, TABLE_6
from mirage.tracking.dashboard import TaskRates, line, pareto_panels, stable_id

TITLE = "MIRage: runs against the base model and the paper"
_CONDITIONS = {
    "base": "base model",
    "textual": "textual SFT",
    "vlguard_r": "VLGuard-R",
    "mis": "MIRage (MIS)",
    "mis_nogeneral": "MIRage, no general data",
}
_SPLITS = {"mis_easy": "easy", "mis_hard": "hard", "mis_real": "real"}
_RATES = ("ASR", "HR", "RSR", "RR")
_WIDTH, _HEIGHT = 8, 7


def build_report(*, entity: str, project: str, tasks: Sequence[TaskRates]) -> Any:
    """A `wandb_workspaces.reports.v2.Report`; nothing is sent."""
    import wandb_workspaces.reports.v2 as wr

    attacked = [task.name for task in tasks if "asr" in task.rates]
    blocks: list[Any] = [
        wr.TableOfContents(),
        wr.H1(text="What to read here"),
        wr.MarkdownBlock(text=_INTRODUCTION),
        wr.H1(text="The runs against step 0"),
        _grid("now", _against_base()),
        wr.H1(text="Safety by split"),
        _grid(
            "safety",
            [
                line("Attack success", [f"eval/{name}/asr" for name in attacked], axis="eval"),
                line("Change against step 0", [f"eval/{name}/asr_change" for name in attacked], axis="eval"),
                line("Its corrected p-value", [f"eval/{name}/asr_change_p" for name in attacked], axis="eval"),
            ]
            if attacked
            else [],
        ),
        wr.H1(text="What is traded"),
        _grid("pareto", pareto_panels()),
        wr.H1(text="The paper's numbers"),
        wr.MarkdownBlock(text=_PAPER_NOTE),
    ]
    for family, model in MODELS.items():
        blocks += [wr.H2(text=model), wr.MarkdownBlock(text=paper_table(family))]
    blocks += [
        wr.H1(text="Recipes side by side"),
        _grid("recipes", [wr.RunComparer(diff_only=True)]),
    ]
    return wr.Report(
        entity=entity,
        project=project,
        title=TITLE,
        description="Attack success, over-refusal and general ability of this project's runs.",
        blocks=[block for block in blocks if block is not None],
        width="fluid",
    )


_INTRODUCTION = (
    "Every number is the share of judged samples in percent; `n` and the 95% limits are logged beside each. Step 0 is "
    "the untouched model of the same run, on the same samples, with the same judge: changes are paired, and their "
    "p-values are exact McNemar tests, corrected over the whole evaluation. A rule judge describes the structure of "
    "answers and is no measure of how safe free text is; `select/score` is the mean of attack success and over-refusal "
    "plus the points of general ability lost since step 0."
)
_PAPER_NOTE = (
    "From arXiv 2501.18533 v3 (tables 4, 6 and 15): GPT-4o as judge on the published MIS test, full-size models. "
    "Compare a run with them only where it measured the published test with a judge of that kind; small models and the "
    "rule judge show directions, not levels."
)


def paper_table(family: str) -> str:
    """The paper's rates on the MIS test and its mean of general benchmarks, as a Markdown table in percent."""
    header = ["condition", *(f"{rate} {split}" for split in _SPLITS.values() for rate in _RATES), "general, mean of 5"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    general = {key: mean for key, (_, mean) in TABLE_6[family].items()}
    for key, label in _CONDITIONS.items():
        splits = TABLE_4[family].get(key, {})
        if not splits and key not in general:
            continue
        values = [value for task in _SPLITS for value in splits.get(task, (None,) * len(_RATES))]
        lines.append([label, *(_shown(value) for value in [*values, general.get(key)])])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _against_base() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    titles = {
        "asr": "Attack success: step 0 and now",
        "over_refusal": "Over-refusal: step 0 and now",
        "general": "General ability: step 0 and now",
        "score": "Score: step 0 and now",
    }
    return [
        wr.BarPlot(
            title=title,
            metrics=[wr.SummaryMetric(f"select/base_{name}"), wr.SummaryMetric(f"select/{name}")],
            title_x="percent",
            max_runs_to_show=20,
        )
        for name, title in titles.items()
    ]


def _grid(name: str, panels: list[Any]) -> Any:
    """Panels three in a row over the runs of the report's project; None without a panel."""
    import wandb_workspaces.reports.v2 as wr

    if not panels:
        return None
    for number, panel in enumerate(panels):
        panel._id = stable_id("report", name, str(number))
        column, row = number % 3, number // 3
        panel.layout = wr.Layout(x=column * _WIDTH, y=row * _HEIGHT, w=_WIDTH, h=_HEIGHT)
    # Without entity and project it is the report's own, and needs no server to be written down.
    runset = wr.Runset(name="Runs")
    runset._id = stable_id("runset", name)
    return wr.PanelGrid(runsets=[runset], panels=panels)
