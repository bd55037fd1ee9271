"""The experiment's figures: rates by condition for the top of the README, and learning curves; SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage.errors import UserError
from mirage.evals.metrics import wilson
from mirage.miniature.analysis import Experiment, Question, ask
from mirage.miniature.bars import RISKY
from mirage.miniature.conditions import CONDITIONS, FAMILY_TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVERVIEW, CURVES, PROGRESS = "experiment", "experiment_curves", "experiment_progress"
# (question, label, colour, hatch): Okabe and Ito's colours, told apart by every kind of colour vision; hatches and
# places tell them apart without colour.
_RATES = (
    (ask(RISKY, "asr"), "risky requests answered (lower is better)", "#D55E00", ""),
    (ask("twins", "refused"), "harmless twins refused (lower)", "#0072B2", "///"),
    (ask("general", "accuracy"), "multiple choice right (higher)", "#999999", ".."),
)
_LINES = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#44AA99", "#0072B2", "#D55E00", "#CC79A7", "#882255", "#999999")
_DASHES = ("-", "--", "-.", ":")
_INCH_WIDTH = 8.0
_DPI = 200


def _pyplot_free() -> Any:
    """matplotlib without a window system. Raises `UserError` where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'mirage-vlm[experiment]'") from error
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "mirage",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "hatch.linewidth": 0.6,
        }
    )
    from matplotlib.figure import Figure

    return Figure


def overview(experiment: Experiment) -> Figure:
    """One panel a family: ASR, over-refusal and general ability of each condition with 95% intervals over samples."""
    families = experiment.families
    figure = _pyplot_free()(figsize=(_INCH_WIDTH, 0.7 + 3.0 * len(families)), layout="constrained")
    axes = figure.subplots(len(families), 1, sharex=True, squeeze=False)[:, 0]
    shown = [key for key in CONDITIONS if any(experiment.find(family, key) for family in families)]
    for panel, family in zip(axes, families, strict=True):
        for number, (question, label, colour, hatch) in enumerate(_RATES):
            _bars(
                panel,
                [experiment.cell(family, key, question) for key in shown],
                offset=(number - 1) * 0.27,
                style={"label": label, "color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0},
            )
        panel.set_ylim(0, 118)
        panel.set_yticks([0, 25, 50, 75, 100])
        panel.set_ylabel("percent")
        panel.set_title(f"{FAMILY_TITLES[family]}, {_seeds(experiment, family)}", loc="left", fontsize=10)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    axes[-1].set_xticks(range(len(shown)), [_short(key) for key in shown], fontsize=8)
    axes[-1].set_xlim(-0.6, len(shown) - 0.4)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _bars(panel: Any, cells: Sequence[Any], *, offset: float, style: Mapping[str, Any]) -> None:
    places = [place for place, cell in enumerate(cells) if cell is not None]
    found = [cell for cell in cells if cell is not None]
    heights = [cell.percent for cell in found]
    errors = [[cell.percent - cell.low for cell in found], [cell.high - cell.percent for cell in found]]
    spots = [place + offset for place in places]
    panel.bar(spots, heights, width=0.25, **style)
    panel.errorbar(spots, heights, yerr=errors, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=1.8)
    for spot, height, cell in zip(spots, heights, found, strict=True):
        panel.text(spot, min(cell.high, 100) + 2, f"{height:.0f}", ha="center", va="bottom", fontsize=7)


def _seeds(experiment: Experiment, family: str) -> str:
    number = len({run["seed"] for run in experiment.runs if run["family"] == family and run["seed"] is not None})
    return f"mean over {number} seeds" if number > 1 else "one seed"


def _short(key: str) -> str:
    """The condition's title on several lines."""
    words = CONDITIONS[key].title.replace(",", "").split()
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) < 11:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def curves(experiment: Experiment) -> Figure:
    """Training loss by step, one line a condition (mean over seeds), one panel a family; the axis is logarithmic."""
    families = experiment.families
    figure = _pyplot_free()(figsize=(_INCH_WIDTH, 0.9 + 2.8 * len(families)), layout="constrained")
    axes = figure.subplots(len(families), 1, squeeze=False)[:, 0]
    for panel, family in zip(axes, families, strict=True):
        for number, key in enumerate(CONDITIONS):
            points = mean_curve(experiment, family, key)
            if points:
                steps, losses = zip(*points, strict=True)
                style = {"color": _LINES[number % len(_LINES)], "linestyle": _DASHES[number % len(_DASHES)]}
                panel.plot(steps, losses, label=CONDITIONS[key].title, linewidth=1.4, **style)
        panel.set_yscale("log")
        panel.set_ylabel("training loss")
        panel.set_title(f"{FAMILY_TITLES[family]}, {_seeds(experiment, family)}", loc="left", fontsize=10)
        panel.grid(color="#dddddd", linewidth=0.6)
        if panel.lines:
            panel.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1].set_xlabel("optimiser step")
    return figure


def progress(experiment: Experiment) -> Figure | None:
    """The rates of `overview` by step, from the base on, of the run that is measured on the way; None without one.

    One panel a family, 95% Wilson intervals as bands.
    """
    found = [curve for family in experiment.families for curve in experiment.curves if curve["family"] == family]
    if not found:
        return None
    figure = _pyplot_free()(figsize=(_INCH_WIDTH, 3.2), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, curve in zip(axes, found, strict=True):
        steps = [point["step"] for point in curve["points"]]
        for (question, label, colour, _), dash, marker in zip(_RATES, _DASHES, "os^"):
            counts = [pooled_counts(point, question) for point in curve["points"]]
            intervals = [wilson(*count) for count in counts]
            style = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4, "linewidth": 1.4}
            panel.plot(steps, [100 * hits / n for hits, n in counts], label=label, **style)
            low, high = zip(*intervals, strict=True)
            panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        title = f"{FAMILY_TITLES[curve['family']]}: {CONDITIONS[curve['condition']].title}, seed {curve['seed']}"
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_ylim(-2, 102)
        panel.set_xlabel("optimiser step")
        panel.grid(color="#dddddd", linewidth=0.6)
    axes[0].set_ylabel("percent")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def pooled_counts(point: Mapping[str, Any], question: Question) -> tuple[int, int]:
    """(hits, judged samples) of a point of a learning curve, the question's tasks taken together."""
    counts = [point["counts"][task] for task in question.tasks if task in point["counts"]]
    return sum(item[question.metric] for item in counts), sum(item["n"] for item in counts)


def mean_curve(experiment: Experiment, family: str, condition: str) -> list[tuple[int, float]]:
    """(step, loss) at the steps that all seeds have logged."""
    found: dict[int, list[float]] = {}
    runs = [run for run in experiment.find(family, condition) if run["seed"] is not None]
    for run in runs:
        for step, loss in run["loss"]:
            found.setdefault(step, []).append(loss)
    return [(step, sum(losses) / len(losses)) for step, losses in sorted(found.items()) if len(losses) == len(runs)]


def svg_text(figure: Figure) -> str:
    """The figure as SVG without date; the same figure always gives the same text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"


def write_png(figure: Figure, file: Path) -> None:
    """The figure as PNG, 1,600 pixels wide."""
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
