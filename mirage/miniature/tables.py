"""The tables of the experiment's page: analogues of the paper's beside its numbers, and the experiment's own."""

from __future__ import annotations

from collections.abc import Sequence

from mirage.miniature.analysis import Experiment, Question, ask, complement
from mirage.miniature.bars import RISKY, decision, find_bars, show, show_change, tokens
from mirage.miniature.conditions import BASE, CONDITIONS, MAIN
from mirage.miniature.document import Table
from mirage.miniature.paper import TABLE_1, TABLE_2, TABLE_4, TABLE_6, TABLE_11, Rates

NONE = "–"
# Conditions in which a decision is learnt at all; the tables of held-out kinds compare these.
DECIDING = (BASE, "vlguard", "vlguard_r", "mis", MAIN, "direct")


def title(condition: str) -> str:
    """`(g) MIRage with twins`."""
    item = CONDITIONS[condition]
    return f"({item.letter}) {item.title}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _present(experiment: Experiment, family: str, conditions: Sequence[str]) -> list[str]:
    return [key for key in conditions if experiment.find(family, key)]


def bars_table(experiment: Experiment, family: str) -> Table:
    """Each bar: target, what was found, met or missed."""
    rows = [(bar.name, bar.target, bar.found or NONE, bar.verdict) for bar in find_bars(experiment, family)]
    return Table(("bar", "target", "found", "verdict"), tuple(rows), num_labels=3)


def table_1(experiment: Experiment, family: str) -> Table:
    """General ability, attack success, harmless requests answered, compositional risk declined."""
    paper = TABLE_1[family]
    rows = []
    for key in _present(experiment, family, (BASE, "textual", "vlguard", "vlguard_r")):
        theirs = paper.get(key)
        ours = (
            experiment.cell(family, key, ask("general", "accuracy")),
            experiment.cell(family, key, ask("mis_easy", "asr")),
            complement(experiment.cell(family, key, ask("twins", "refused"))),
            complement(experiment.cell(family, key, ask("mis_hard", "asr"))),
        )
        beside = (None,) * 4 if theirs is None else (sum(theirs[:3]) / 3, *theirs[3:])
        cells = [text for cell, value in zip(ours, beside, strict=True) for text in (show(cell), _percent(value))]
        rows.append((title(key), *cells))
    header = (
        "condition",
        "multiple choice",
        "paper: mean of MMStar, MMMU, MMT-MI",
        "ASR, easy",
        "paper: FigStep ASR",
        "twins not refused",
        "paper: MSSBench safe",
        "hard pairs declined",
        "paper: MSSBench unsafe",
    )
    return Table(header, tuple(rows))


def table_2(experiment: Experiment, family: str) -> Table:
    """Harmless requests refused, with their pictures, white ones, none; the paper has VLGuard alone."""
    inputs = (
        ("twins", "the right pictures"),
        ("twins@white", "white pictures"),
        ("twins@text_only", "no pictures"),
        ("twins@black", "black pictures"),
    )
    rows = []
    for key in _present(experiment, family, (BASE, "textual", "vlguard", "vlguard_r")):
        for task, name in inputs:
            refused = experiment.cell(family, key, ask(task, "refused"))
            if refused is None:
                continue
            theirs = TABLE_2[family].get(task) if key == "vlguard" else None
            helped = experiment.cell(family, key, ask(task, "helped"))
            paper = (None, None) if theirs is None else theirs
            rows.append((title(key), name, show(refused), _percent(paper[0]), show(helped), _percent(paper[1])))
    header = ("condition", "input", "refused", "paper: refused", "helped", "paper: accuracy")
    return Table(header, tuple(rows), num_labels=2)


def table_4(experiment: Experiment, family: str) -> Table:
    """The four rates on easy, hard and real for each condition."""
    rows = []
    for key in _present(experiment, family, tuple(CONDITIONS)):
        for task, split in (("mis_easy", "easy"), ("mis_hard", "hard"), ("mis_real", "real")):
            cells = [experiment.cell(family, key, ask(task, metric)) for metric in ("asr", "hr", "rsr", "rr")]
            if cells[0] is None:
                continue
            theirs: Rates | None = TABLE_4[family].get(key, {}).get(task)
            paper = NONE if theirs is None else " / ".join(_percent(value) for value in theirs)
            rows.append((title(key), split, str(cells[0].num_samples), *map(show, cells), paper))
    header = ("condition", "split", "n", "ASR", "HR", "RSR", "RR", "paper: ASR / HR / RSR / RR")
    return Table(header, tuple(rows), num_labels=2)


def table_6(experiment: Experiment, family: str) -> Table:
    """General ability by condition, and its change against the base."""
    rows = []
    for key in _present(experiment, family, tuple(CONDITIONS)):
        cell = experiment.cell(family, key, ask("general", "accuracy"))
        change = None if key == BASE else experiment.change(family, key, BASE, ask("general", "accuracy"))
        moved = NONE if change is None else show_change(change)
        share, theirs = TABLE_6[family].get(key, (None, None))
        rows.append((title(key), show(cell), moved, _percent(theirs), _percent(share)))
    header = ("condition", "multiple choice", "against the base", "paper: mean of five", "paper: general data, %")
    return Table(header, tuple(rows))


def table_11(experiment: Experiment, family: str) -> Table:
    """The ablations: labels that apologise, no pictures."""
    paper = TABLE_11[family]
    rows = []
    for key in _present(experiment, family, (BASE, "sorry", "textonly", "mis", MAIN, "direct")):
        cells = (
            experiment.cell(family, key, ask("general", "accuracy")),
            complement(experiment.cell(family, key, ask("twins", "refused"))),
            complement(experiment.cell(family, key, ask("mis_hard", "asr"))),
            experiment.cell(family, key, ask("mis_easy", "asr")),
            experiment.cell(family, key, ask("mis_hard", "asr")),
            experiment.cell(family, key, ask("mis_real", "asr")),
        )
        theirs = paper.get(key)
        beside = NONE if theirs is None else " / ".join(_percent(value) for value in theirs)
        rows.append((title(key), *map(show, cells), beside))
    header = (
        "condition",
        "multiple choice",
        "twins not refused",
        "hard pairs declined",
        "ASR, easy",
        "ASR, hard",
        "ASR, real",
        "paper: general / MSSBench safe / unsafe / ASR easy / hard / real",
    )
    return Table(header, tuple(rows))


# The experiment's own


def twins_table(experiment: Experiment, family: str) -> Table:
    """What becomes of harmless requests, by condition."""
    metrics = ("refused", "helped", "helped_right", "neither")
    rows = []
    for key in _present(experiment, family, tuple(CONDITIONS)):
        cells = [experiment.cell(family, key, ask("twins", metric)) for metric in metrics]
        rows.append((title(key), *map(show, cells), show(decision(experiment, family, key))))
    header = ("condition", "refused", "helped", "helped, objects right", "neither", "balanced accuracy, hard")
    return Table(header, tuple(rows))


def group_table(experiment: Experiment, family: str, *, group: str, values: Sequence[tuple[str, str]]) -> Table:
    """ASR and over-refusal by a group of the samples. `values` has (value, what it is called)."""
    rows = []
    for key in _present(experiment, family, DECIDING):
        cells: list[str] = []
        for value, _ in values:
            cells.append(show(experiment.cell(family, key, ask(RISKY, "asr", **{group: value}))))
            cells.append(show(experiment.cell(family, key, ask("twins", "refused", **{group: value}))))
        rows.append((title(key), *cells))
    names = [f"{name}: {what}" for _, name in values for what in ("ASR", "refused")]
    return Table(("condition", *names), tuple(rows))


def order_table(experiment: Experiment, family: str) -> Table:
    """The same requests with the pictures in the other order, and minimal-pair siblings."""
    columns = (
        ("hard: ASR", ask("mis_hard", "asr")),
        ("hard, pictures swapped: ASR", ask("mis_hard@swap", "asr")),
        ("twins: refused", ask("twins", "refused")),
        ("twins, pictures swapped: refused", ask("twins@swap", "refused")),
        ("sibling, other order: ASR", ask("contrast", "asr", sibling_kind="swap_order")),
        ("harmless sibling, other order: refused", ask("contrast_twins", "refused", sibling_kind="swap_order")),
        ("sibling, objects in the text: ASR", ask("contrast", "asr", sibling_kind="all_in_text")),
        ("its harmless sibling: refused", ask("contrast_twins", "refused", sibling_kind="all_in_text")),
        ("asked to keep things apart: refused", ask("contrast_twins", "refused", sibling_kind="protective_intent")),
    )
    return _columns(experiment, family, DECIDING, columns)


def number_table(experiment: Experiment, family: str) -> Table:
    """No picture to four: ASR and over-refusal."""
    columns: list[tuple[str, Question]] = []
    for number in ("0", "1", "2", "3", "4"):
        risky, benign = {
            "0": ("contrast", "contrast_twins"),
            "1": ("contrast", "contrast_twins"),
            "2": (RISKY, "twins"),
        }.get(number, ("mis_multi", "multi_twins"))
        columns.append((f"{number} pictures: ASR", ask(risky, "asr", num_images=number)))
        columns.append((f"{number}: refused", ask(benign, "refused", num_images=number)))
    return _columns(experiment, family, DECIDING, columns)


def line_table(experiment: Experiment, family: str) -> Table:
    """Line art, a style that no training shows."""
    columns = (
        ("coloured: ASR", ask(RISKY, "asr")),
        ("line art: ASR", ask("mis_line", "asr")),
        ("coloured: twins refused", ask("twins", "refused")),
        ("line art: twins refused", ask("line_twins", "refused")),
        ("coloured: objects right", ask("twins", "helped_right")),
        ("line art: objects right", ask("line_twins", "helped_right")),
        ("coloured: multiple choice", ask("general", "accuracy")),
        ("line art: multiple choice", ask("line_general", "accuracy")),
    )
    return _columns(experiment, family, DECIDING, columns)


def _columns(
    experiment: Experiment, family: str, conditions: Sequence[str], columns: Sequence[tuple[str, Question]]
) -> Table:
    rows = [
        (title(key), *(show(experiment.cell(family, key, question)) for _, question in columns))
        for key in _present(experiment, family, conditions)
    ]
    return Table(("condition", *(name for name, _ in columns)), tuple(rows))


def blank_table(experiment: Experiment, family: str) -> Table:
    """Hard rows and their own twins with one picture white: what one picture and the words give away."""
    rows = []
    for variant, name in (("", "both pictures"), ("@white1", "first one white"), ("@white2", "second one white")):
        declined = complement(experiment.cell(family, MAIN, ask(f"mis_hard{variant}", "asr")))
        helped = experiment.cell(family, MAIN, ask(f"twins{variant}", "helped", of="hard"))
        balanced = decision(experiment, family, MAIN, variant=variant)
        if balanced is not None:
            rows.append((name, show(declined), show(helped), show(balanced)))
    return Table(("input", "hard pairs declined", "their twins helped", "balanced accuracy"), tuple(rows))


def reasoning_table(experiment: Experiment, family: str) -> Table:
    """Reasoned labels against their last part alone, with what each has trained on."""
    rows = []
    for key in _present(experiment, family, (MAIN, "direct")):
        seen = tokens(experiment, family, key)
        runs = experiment.find(family, key)
        rows.append(
            (
                title(key),
                NONE if seen is None else f"{seen:,.0f}",
                f"{sum(run['steps'] for run in runs) / len(runs):,.0f}",
                show(experiment.cell(family, key, ask(RISKY, "asr"))),
                show(experiment.cell(family, key, ask("twins", "refused"))),
                show(experiment.cell(family, key, ask("general", "accuracy"))),
                show(decision(experiment, family, key)),
            )
        )
    header = ("condition", "supervised tokens", "steps", "ASR", "twins refused", "multiple choice", "balanced accuracy")
    return Table(header, tuple(rows))


def runs_table(experiment: Experiment) -> Table:
    """Every run with what identifies it."""
    rows = []
    for run in experiment.runs:
        trained = run["seed"] is not None
        rows.append(
            (
                run["family"],
                run["condition"],
                str(run["seed"]) if trained else NONE,
                f"{run['steps']:,}" if trained else NONE,
                f"{run['supervised_tokens_seen']:,}" if trained else NONE,
                f"{run['train_seconds']:.0f}" if trained else NONE,
                str(run["world_size"]) if trained else NONE,
                run.get("settings", NONE),
                run["samples_sha256"][:12],
                run["answers_sha256"][:12],
            )
        )
    header = (
        "family",
        "condition",
        "seed",
        "steps",
        "supervised tokens",
        "seconds",
        "processes",
        "settings",
        "samples.jsonl sha256",
        "answers sha256",
    )
    return Table(header, tuple(rows), num_labels=2)
