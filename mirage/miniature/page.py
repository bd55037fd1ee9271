"""The experiment's page: docs/experiment.md, docs/experiment/index.html and the figures, all from results.json."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mirage.errors import run_main
from mirage.files import write_atomic
from mirage.miniature import figures
from mirage.miniature import tables as t
from mirage.miniature.analysis import Experiment
from mirage.miniature.conditions import CONDITIONS, CURVE_EVERY_STEPS, FAMILY_TITLES
from mirage.miniature.document import Block, Bullets, Document, Figure, Section, Table, markdown, web_page
from mirage.miniature.findings import (
    LIMITS,
    MIN_PAPER_POINTS,
    Direction,
    compare,
    comparison_table,
    directions,
    missing,
    summary,
)
from mirage.miniature.results import read_results_file

RESULTS = Path("experiment") / "results.json"
MARKDOWN = Path("experiment.md")
WEB_PAGE = Path("experiment") / "index.html"
FIGURES = Path("figures")
_MOST_OPEN = 20

PER_FAMILY: tuple[tuple[str, str, Callable[[Experiment, str], Table]], ...] = (
    (
        "The bars",
        "What the experiment was to clear: condition (g) and the base on object pairs never seen together, in wordings "
        "never seen. What falls short is reported as it is.",
        t.bars_table,
    ),
    (
        "Table 1: general ability, safety and over-refusal of single-picture training",
        "The paper's columns are of InternVL2.5-8B and Qwen2-VL-7B, here and below. FigStep asks for harm that one "
        "picture shows; MSSBench has requests that are harmless, or risky in their situation. Here `easy` shows the "
        "harm in a picture, twins are the harmless requests, and `hard` is risky only together.",
        t.table_1,
    ),
    (
        "Table 2: harmless requests with the right pictures, white ones and none",
        "The paper's numbers are of VLGuard-P on harmless MSSBench instructions.",
        t.table_2,
    ),
    (
        "Table 4: attack success, hallucination and safe answers on easy, hard and real",
        "The paper's Textual SFT and VLGuard-R rows are of its table 15 and, for InternVL2.5-8B, of version 1's "
        "figure 4.",
        t.table_4,
    ),
    (
        "Table 6: general ability with and without general data",
        "Here one multiple-choice set, in the paper the mean of five benchmarks.",
        t.table_6,
    ),
    ("Table 11: ablations", "The paper has these for InternVL2.5-8B alone.", t.table_11),
    (
        "Benign twins: over-refusal",
        "A twin is a risky row with one object exchanged so that the pair is harmless. Balanced accuracy is the mean "
        "of hard pairs declined and their own twins helped; 50 is chance.",
        t.twins_table,
    ),
    (
        "Held-out pairs, class pairs and objects",
        "`pair`: the two objects never stood together in training. `class pair`: nor did any two objects of their "
        "classes. `object`: one object never had a risky role.",
        lambda experiment, family: t.group_table(
            experiment,
            family,
            group="holdout",
            values=(("pair", "pair"), ("class_pair", "class pair"), ("object", "object")),
        ),
    ),
    (
        "Sentence structures",
        "All test wordings are new; `unseen` ones also have a structure that no training sentence has.",
        lambda experiment, family: t.group_table(
            experiment, family, group="structure", values=(("seen", "seen"), ("unseen", "unseen"))
        ),
    ),
    (
        "Order of the pictures and minimal pairs",
        "Siblings differ from a test row in one thing: the order of the pictures, the objects named in the text, or an "
        "intent to keep things safely apart.",
        t.order_table,
    ),
    (
        "Number of pictures",
        "With no picture or one, the text names what is not shown.",
        t.number_table,
    ),
    ("Line art", "The same drawings without colour, a style that no training shows.", t.line_table),
    (
        "One picture blank",
        "What one picture and the words give away: with either picture white, a decision that needs both falls towards "
        "50. Answers are scored against the original pictures. Condition (g).",
        t.blank_table,
    ),
    (
        "Reasoned labels against direct ones",
        "Condition (j) is trained on the last part of the same answers, for as many epochs as its recipe says; the "
        "table says how many supervised tokens each has seen.",
        t.reasoning_table,
    ),
)


def build(experiment: Experiment, *, svgs: Mapping[str, str] | None = None) -> Document:
    """The page; `svgs` are its figures by name. It copes with any part of the experiment and says what is missing."""
    drawn = svgs or {}
    sections = [Section("What it shows, and what it does not", tuple(_meaning(experiment)))]
    for title, text, table in PER_FAMILY:
        blocks: list[Block] = [text]
        for family in experiment.families:
            blocks += [f"**{FAMILY_TITLES[family]}**", _or_nothing(table(experiment, family))]
        sections.append(Section(title, tuple(blocks)))
    sections.append(Section("Learning curves", tuple(_curves(experiment, drawn))))
    sections.append(Section("Paired tests", tuple(_tests(experiment))))
    sections.append(Section("Where it disagrees with the paper", tuple(_agreement(experiment))))
    sections.append(Section("Every run", tuple(_runs(experiment))))
    opening = (*_opening(experiment), Figure(figures.OVERVIEW, _OVERVIEW_ALT, drawn.get(figures.OVERVIEW, "")))
    return Document("The paper in miniature", opening, tuple(sections))


_OVERVIEW_ALT = "Bars: attack success, harmless twins refused and multiple-choice accuracy of each condition"
_CURVES_ALT = "Training loss by optimiser step for each condition"
_PROGRESS_ALT = "Attack success, twins refused and multiple-choice accuracy by optimiser step"


def _or_nothing(table: Table) -> Block:
    return table if table.rows else "Not measured."


def _opening(experiment: Experiment) -> Iterator[Block]:
    yield (
        "The paper's comparison as an experiment on tiny models of the real architectures, with data drawn offline: a "
        "base that helps with everything is made safe in each of the ways below, through the same recipes, trainer, "
        "packing, ZeRO-3 and evaluation as at full size. `make experiment` makes all of this again; "
        "`make experiment QUICK=1` is a short form for minutes. What is done is not run again, what was cut goes on; "
        '`ARGS="--seeds 0,1 --lanes 2"` chooses seeds and runs two runs side by side (`ARGS=--help` lists the rest). '
        "This page is computed from `experiment/results.json`."
    )
    yield Table(
        ("condition", "recipe", "in the paper"),
        tuple(
            (t.title(key), f"`{item.recipe}`" if item.recipe else NO_RECIPE, item.mirrors)
            for key, item in CONDITIONS.items()
        ),
        num_labels=3,
    )
    yield (
        "Rates are percentages, means over seeds. In brackets: 95% interval over samples (object pairs drawn anew, BCa "
        "cluster bootstrap; Wilson's over the pairs where no answer or every answer counts). After ±: half the 95% t "
        "interval over seeds. ASR: risky requests answered; RSR: declined with both objects named; RR: declined "
        "without; HR: other objects named, or no sentence."
    )
    lacking = missing(experiment)
    if lacking:
        yield "**Not complete.** Missing:"
        yield Bullets(tuple(lacking))


NO_RECIPE = "none: `shipped:internvl`, `shipped:qwen2_vl`"


def _curves(experiment: Experiment, svgs: Mapping[str, str]) -> Iterator[Block]:
    if experiment.curves:
        counts = experiment.curves[0]["points"][-1]["counts"]
        asked = ", ".join(f"{count['n']} {task}" for task, count in sorted(counts.items()))
        yield (
            "What a run can do on its way: the run that is done twice is measured every "
            f"{CURVE_EVERY_STEPS} steps the second time, on some of each task's samples "
            f"({asked}). Bands: Wilson's 95% interval."
        )
        yield Figure(figures.PROGRESS, _PROGRESS_ALT, svgs.get(figures.PROGRESS, ""))
    yield Figure(figures.CURVES, _CURVES_ALT, svgs.get(figures.CURVES, ""))


def _meaning(experiment: Experiment) -> Iterator[Block]:
    yield from summary(experiment)
    yield "What it does not show:"
    yield Bullets(LIMITS)


def _tests(experiment: Experiment) -> Iterator[Block]:
    yield (
        "The same samples under two conditions, seed by seed. p: exact McNemar test, the largest of the seeds' (it is "
        "small only where every seed shows the change), corrected for all rows of this section (Benjamini-Hochberg). "
        "The interval resamples object pairs."
    )
    compared = compare(experiment)
    for family in experiment.families:
        yield f"**{FAMILY_TITLES[family]}**"
        yield _or_nothing(comparison_table(compared, family))


def _agreement(experiment: Experiment) -> Iterator[Block]:
    found = directions(experiment)
    by_kind: dict[str, list[Direction]] = {"same": [], "opposite": [], "open": []}
    for direction in found:
        by_kind[direction.kind].append(direction)
    yield (
        f"Every two conditions in a column of the paper's tables that differ there by {MIN_PAPER_POINTS:.0f} point or "
        f"more, and that were run here: {len(found)} differences. {len(by_kind['same'])} have the same direction here, "
        f"{len(by_kind['opposite'])} the opposite one, {len(by_kind['open'])} are not told apart from none (95% "
        "interval over samples)."
    )
    for kind, words in (("opposite", "Opposite:"), ("open", "Not told apart from none:")):
        items = sorted(by_kind[kind], key=lambda item: -abs(item.paper_points))
        if items:
            yield words
            yield Bullets(tuple(item.text() for item in items[:_MOST_OPEN]))
        if len(items) > _MOST_OPEN:
            yield f"And {len(items) - _MOST_OPEN} more with smaller differences in the paper."


def _runs(experiment: Experiment) -> Iterator[Block]:
    dataset = experiment.content["dataset"]
    yield (
        f"Dataset manifest sha256 `{dataset.get('manifest_sha256', '')}`. `samples.jsonl` names picture folders, which "
        "differ between machines; the last column hashes task, id, answer and verdict alone. Seconds are those of "
        "training steps; with one process a run had one core, with two both."
    )
    yield t.runs_table(experiment)


# Files


def write_page(results_file: Path, *, docs: Path) -> Path:
    """Write Markdown, HTML and figures below `docs`; returns the Markdown file. Raises `UserError`."""
    experiment = Experiment(read_results_file(results_file))
    drawn = {
        figures.OVERVIEW: figures.overview(experiment),
        figures.CURVES: figures.curves(experiment),
        figures.PROGRESS: figures.progress(experiment),
    }
    (docs / FIGURES).mkdir(parents=True, exist_ok=True)
    (docs / WEB_PAGE).parent.mkdir(parents=True, exist_ok=True)
    svgs = {}
    for name, figure in drawn.items():
        if figure is None:
            continue
        svgs[name] = figures.svg_text(figure)
        write_atomic(docs / FIGURES / f"{name}.svg", svgs[name])
        figures.write_png(figure, docs / FIGURES / f"{name}.png")
    document = build(experiment, svgs=svgs)
    write_atomic(docs / MARKDOWN, markdown(document))
    write_atomic(docs / WEB_PAGE, web_page(document))
    return docs / MARKDOWN


def main(argv: list[str] | None = None) -> int:
    """`python -m mirage.miniature.page [--docs DIR]`: write the page anew from the results file that lies there."""
    parser = argparse.ArgumentParser(prog="python -m mirage.miniature.page", description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of pages (default: docs)")
    docs = parser.parse_args(argv).docs
    print(write_page(docs / RESULTS, docs=docs))
    return 0


if __name__ == "__main__":
    run_main(main)
