"""What the numbers say, worked out and not written by hand: paired tests, agreement with the paper, a summary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from mirage.miniature.analysis import Change, Experiment, Question, adjust, ask
from mirage.miniature.bars import HELD_OUT, RISKY, find_bars, show, show_change, signed, tokens
from mirage.miniature.conditions import BASE, CONDITIONS, FAMILIES, FAMILY_TITLES, MAIN, SEEDS, TRAINED
from mirage.miniature.document import Table
from mirage.miniature.paper import MODELS, Analogue, figures
from mirage.miniature.tables import NONE, title

# The paper's differences below this many points are not counted as findings: it states no intervals.
MIN_PAPER_POINTS = 1.0

_ASR, _REFUSED, _GENERAL = ask(RISKY, "asr"), ask("twins", "refused"), ask("general", "accuracy")
_NAMES = {_ASR: "ASR, easy and hard", _REFUSED: "twins refused", _GENERAL: "multiple choice"}
# (condition, other, what): the comparisons that the experiment was made for.
COMPARISONS: tuple[tuple[str, str, Question], ...] = (
    *((key, BASE, question) for key in TRAINED for question in (_ASR, _REFUSED, _GENERAL)),
    *((MAIN, other, question) for other in ("mis", "vlguard", "direct") for question in (_ASR, _REFUSED)),
    ("mis", "vlguard", _REFUSED),
    ("mis", "mis_nogeneral", _GENERAL),
    ("sorry", "mis", _REFUSED),
    ("textonly", "mis", _ASR),
    ("vlguard_r", "vlguard", _REFUSED),
)


@dataclass(frozen=True)
class Compared:
    """One comparison of a family with its result."""

    family: str
    condition: str
    other: str
    what: str
    change: Change


def compare(experiment: Experiment) -> list[Compared]:
    """All comparisons of all families that were measured, their p-values corrected together."""
    found = []
    for family in experiment.families:
        for condition, other, question in COMPARISONS:
            change = experiment.change(family, condition, other, question)
            if change is not None:
                found.append(Compared(family, condition, other, _NAMES[question], change))
    corrected = adjust([item.change for item in found])
    return [
        Compared(item.family, item.condition, item.other, item.what, change)
        for item, change in zip(found, corrected, strict=True)
    ]


def comparison_table(compared: list[Compared], family: str) -> Table:
    """The paired tests of one family."""
    rows = []
    for item in compared:
        if item.family == family:
            change = item.change
            moved = show_change(change)
            p = NONE if change.adjusted is None else p_text(change.adjusted)
            rows.append((title(item.condition), title(item.other), item.what, moved, p, str(change.num_seeds)))
    return Table(("condition", "against", "rate", "change, points", "p", "seeds"), tuple(rows), num_labels=3)


def p_text(value: float) -> str:
    """A p-value with as many digits as it bears."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


# Agreement with the paper


@dataclass(frozen=True)
class Direction:
    """A difference that the paper has between two conditions, and the same one here."""

    family: str
    analogue: Analogue
    condition: str
    other: str
    paper_points: float
    points: float
    low: float
    high: float

    @property
    def kind(self) -> str:
        """`same`, `opposite`, or `open` where the interval here holds 0."""
        if self.low <= 0 <= self.high:
            return "open"
        return "same" if (self.points > 0) == (self.paper_points > 0) else "opposite"

    def text(self) -> str:
        """The difference in one line."""
        return (
            f"{FAMILY_TITLES[self.family]}, table {self.analogue.table}, {self.analogue.name}: "
            f"{CONDITIONS[self.condition].title} minus {CONDITIONS[self.other].title} is {signed(self.points)} points "
            f"[{signed(self.low)}, {signed(self.high)}] here and {signed(self.paper_points)} in the paper"
        )


def directions(experiment: Experiment) -> list[Direction]:
    """Every two conditions that one of the paper's columns has and that were measured here, once a rate."""
    found: dict[tuple[str, ...], Direction] = {}
    for family in experiment.families:
        for analogue, by_condition in figures(family):
            for first, second in combinations([key for key in CONDITIONS if key in by_condition], 2):
                theirs = by_condition[second] - by_condition[first]
                question = ask(analogue.task, analogue.metric)
                change = experiment.change(family, second, first, question)
                if change is None or abs(theirs) < MIN_PAPER_POINTS:
                    continue
                points, low, high = change.points, change.low, change.high
                if analogue.complement:
                    points, low, high = -points, -high, -low
                key = (family, analogue.task, analogue.metric, analogue.name, first, second)
                found.setdefault(key, Direction(family, analogue, second, first, theirs, points, low, high))
    return list(found.values())


# In words


def missing(experiment: Experiment) -> list[str]:
    """Which planned runs the results file does not have."""
    lines = []
    for family in FAMILIES:
        if family not in experiment.families:
            lines.append(f"{FAMILY_TITLES[family]}: no run at all")
            continue
        for key in CONDITIONS:
            seeds = {run["seed"] for run in experiment.find(family, key)}
            lacking = [str(seed) for seed in SEEDS if seed not in seeds] if key != BASE else []
            if not seeds:
                lines.append(f"{FAMILY_TITLES[family]}: {title(key)} was not run")
            elif lacking:
                lines.append(f"{FAMILY_TITLES[family]}: {title(key)} lacks seed {', '.join(lacking)}")
    return lines


def summary(experiment: Experiment) -> list[str]:
    """Paragraphs on what was found, one a family, from the numbers."""
    return [" ".join(_family_summary(experiment, family)) for family in experiment.families]


def _family_summary(experiment: Experiment, family: str) -> Iterator[str]:
    judged = [bar for bar in find_bars(experiment, family) if bar.met is not None]
    met = [bar for bar in judged if bar.met]
    yield f"**{FAMILY_TITLES[family]}** (in the paper: {MODELS[family]}): {len(met)} of {len(judged)} bars are met."
    missed = "; ".join(f"{bar.name} ({bar.found}, target {bar.target})" for bar in judged if not bar.met)
    if missed:
        yield f"Missed: {missed}."
    asr, refused = ask(RISKY, "asr", **HELD_OUT), ask("twins", "refused", **HELD_OUT)
    parts = []
    for key in (BASE, "vlguard", "mis", MAIN):
        cells = experiment.cell(family, key, asr), experiment.cell(family, key, refused)
        if None not in cells:
            parts.append(f"{title(key)} answers {show(cells[0])}% and refuses {show(cells[1])}%")
    if parts:
        yield f"Of risky and of harmless requests about pairs of objects never seen together, {'; '.join(parts)}."
    change = experiment.change(family, MAIN, "direct", ask(RISKY, "asr"))
    seen = tokens(experiment, family, MAIN), tokens(experiment, family, "direct")
    if change is not None and None not in seen:
        told = "cannot be told apart from" if change.low <= 0 <= change.high else _than(change.points)
        yield (
            f"ASR with reasoned labels {told} ASR with direct ones ({show_change(change)} points; {seen[0]:,.0f} and "
            f"{seen[1]:,.0f} supervised tokens)."
        )


def _than(points: float) -> str:
    return "is lower than" if points < 0 else "is higher than"


LIMITS = (
    "The models are tiny: they know the words of one grammar, drawings of some tens of objects, and a small table of "
    "facts about classes of objects, which stands for what a real model knows of the world. Nothing here says how a "
    "model of billions of parameters behaves.",
    "Questions and reference answers come from that grammar, and the judge reads the structure of a reply (objects "
    "named, declined, helped). No rate here measures how safe free text is.",
    "Whoever settled the base and the recipes could see this data's test rows; the seeds were not chosen. Intervals "
    "over seeds say how much the training run matters, those over samples how much the choice of object pairs does; "
    "neither covers another taxonomy, grammar or base.",
    "The paper's columns are other benchmarks, models and judges. Only the direction of a difference is compared, "
    "never its size.",
    "Photographs exist for few objects, so the `real` split is small and its intervals are wide.",
)
