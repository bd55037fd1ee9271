"""From run folders to results.json, and its numbers against ones worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest, t

from mirage.errors import UserError
from mirage.evals.metrics import wilson
from mirage.files import file_sha256
from mirage.miniature import plan
from mirage.miniature.analysis import Experiment, adjust, ask, balanced, complement, seed_spread
from mirage.miniature.bars import decision, find_bars
from mirage.miniature.conditions import BASE, MAIN
from mirage.miniature.experiment import run_jobs
from mirage.miniature.findings import directions, missing
from mirage.miniature.outcomes import base_task, kind_of, letter
from mirage.miniature.plan import Options, plan_jobs
from mirage.miniature.results import answers_sha256, collect, read_results_file, write_results_file
from mirage.tracking.console import make_console
from tests.support.miniature import FakeRuns, content, make_data

TASKS = ("mis_easy", "mis_hard", "twins", "general", "twins@white")


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setattr(plan, "base_fingerprint", lambda family: "base")
    options = Options(
        out=tmp_path / "runs",
        families=("internvl",),
        seeds=(0, 1),
        conditions=(BASE, MAIN),
        data_dir=make_data(tmp_path / "data"),
        tasks=TASKS,
    )
    assert (
        run_jobs(plan_jobs(options), FakeRuns(options.data_dir, steps=100), lanes=1, console=make_console("quiet")) == 0
    )
    return options


def test_runs_become_letters_counts_and_hashes(options: Options) -> None:
    found = collect(options.out, data_dir=options.data_dir)
    assert [(run["condition"], run["seed"]) for run in found["runs"]] == [(BASE, None), (MAIN, 0), (MAIN, 1)]
    assert found["tasks"]["twins"] == {
        "ids": "t1 t2 t3",
        "clusters": "0 1 2",
        "groups": {
            "holdout": {"values": ["object", "pair"], "codes": "110"},
            "num_images": {"values": ["2"], "codes": "000"},
            "of": {"values": ["easy", "hard"], "codes": "011"},
        },
    }
    run = found["runs"][1]
    assert run["outcomes"] == {
        "general": "yo",
        "mis_easy": "as",
        "mis_hard": "as",
        "twins": "phr",
        "twins@white": "phr",
    }
    assert run["counts"]["twins"] == {"n": 3, "refused": 1, "helped": 2, "helped_right": 1, "neither": 0}
    assert (run["steps"], run["world_size"], run["samples_seen"]) == (100, 2, 40)
    assert run["supervised_tokens_seen"] == 1200 and run["train_seconds"] == 50.0
    assert len(run["loss"]) == 40 and run["loss"][0] == [1, 1.0] and run["loss"][-1] == [100, 0.01]
    samples = options.out / "internvl" / MAIN / "seed-0" / "evals" / "step-000100" / "samples.jsonl"
    assert run["samples_sha256"] == file_sha256(samples)
    assert found["repeats"] == [
        {
            "family": "internvl",
            "condition": MAIN,
            "seed": 0,
            "same_answers": True,
            "same_losses": True,
            "world_sizes": [2, 2],
        }
    ]


def test_the_run_done_twice_is_a_learning_curve_on_the_samples_that_all_steps_share(options: Options) -> None:
    again = options.out / "internvl" / MAIN / "seed-0-again" / "evals" / "step-000050" / "samples.jsonl"
    lines = again.read_text(encoding="utf-8").splitlines(keepends=True)
    again.write_text("".join(line for line in lines if '"id": "h2"' not in line), encoding="utf-8")
    (curve,) = collect(options.out, data_dir=options.data_dir)["curves"]
    assert (curve["family"], curve["condition"], curve["seed"]) == ("internvl", MAIN, 0)
    assert [point["step"] for point in curve["points"]] == [0, 50, 100]
    assert all(set(point["counts"]) == {"mis_easy", "mis_hard", "twins", "general"} for point in curve["points"])
    # Of the two hard rows the step on the way was asked one, so each step counts that one alone.
    assert {point["counts"]["mis_hard"]["n"] for point in curve["points"]} == {1}
    assert curve["points"][0]["counts"]["twins"] == {"n": 3, "refused": 1, "helped": 2, "helped_right": 1, "neither": 0}


def test_clusters_are_numbered_once_for_all_tasks(options: Options) -> None:
    """Invented rows e1, h1, t1 and g1 share a pair: drawing it anew must draw it everywhere."""
    tasks = collect(options.out, data_dir=options.data_dir)["tasks"]
    assert {task: item["clusters"][0] for task, item in tasks.items()} == dict.fromkeys(tasks, "0")


def test_a_different_answer_or_loss_in_the_second_run_of_a_seed_is_seen(options: Options) -> None:
    again = options.out / "internvl" / MAIN / "seed-0-again"
    file = again / "evals" / "step-000100" / "samples.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("asr e1", "another answer"), encoding="utf-8")
    lines = (again / "metrics.jsonl").read_text(encoding="utf-8")
    (again / "metrics.jsonl").write_text(
        lines.replace('"train/loss": 0.5', '"train/loss": 0.5000001'), encoding="utf-8"
    )
    repeat = collect(options.out, data_dir=options.data_dir)["repeats"][0]
    assert (repeat["same_answers"], repeat["same_losses"]) == (False, False)


def test_the_file_is_the_same_bytes_each_time_and_reads_back(options: Options, tmp_path: Path) -> None:
    found = collect(options.out, data_dir=options.data_dir)
    one = write_results_file(found, tmp_path / "a" / "results.json")
    two = write_results_file(collect(options.out, data_dir=options.data_dir), tmp_path / "b.json")
    assert one.read_bytes() == two.read_bytes() and read_results_file(one) == found
    assert str(tmp_path) not in one.read_text(encoding="utf-8")


def test_an_unfinished_run_is_left_out(options: Options) -> None:
    (options.out / "internvl" / MAIN / "seed-1" / "summary.json").unlink()
    runs = collect(options.out, data_dir=options.data_dir)["runs"]
    assert [(run["condition"], run["seed"]) for run in runs] == [(BASE, None), (MAIN, 0)]


def test_runs_on_other_rows_are_refused(options: Options) -> None:
    with (options.data_dir / "rows.jsonl").open("a") as rows:
        rows.write("\n")
    with pytest.raises(UserError, match="were measured on other rows"):
        collect(options.out, data_dir=options.data_dir)


def test_runs_from_different_bases_are_refused(options: Options) -> None:
    (options.out / "internvl" / MAIN / "seed-1" / "base.json").write_text('{"fingerprint": "old"}', encoding="utf-8")
    with pytest.raises(UserError, match="start from different base weights"):
        collect(options.out, data_dir=options.data_dir)


def test_answers_hash_ignores_order_and_folders() -> None:
    rows = [{"task": "twins", "id": str(n), "answer": "a", "verdict": "helped", "image_paths": ["x"]} for n in range(3)]
    moved = [row | {"image_paths": ["y"]} for row in reversed(rows)]
    assert answers_sha256(rows) == answers_sha256(moved)
    assert answers_sha256(rows) != answers_sha256([rows[0] | {"answer": "b"}, *rows[1:]])


def test_letters() -> None:
    assert letter("twins@white", {"id": "1", "verdict": "helped", "events": ["helped", "helped_right"]}) == "p"
    assert letter("twins", {"id": "1", "verdict": "helped", "events": ["helped"]}) == "h"
    assert letter("mis_hard", {"id": "1", "verdict": "unscored", "events": None}) == "?"
    with pytest.raises(UserError, match="sample 1 of task general: the verdict 'asr'"):
        letter("general", {"id": "1", "verdict": "asr", "events": ["asr"]})
    assert (kind_of("line_twins"), kind_of("line_general"), kind_of("mis_line@swap")) == ("benign", "general", "risky")
    assert base_task("twins@white1") == "twins"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 0}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.json"):
        read_results_file(file)


# Numbers


def handmade(**outcomes: dict[tuple[str, int | None], str]) -> Experiment:
    """One task each of 20 samples in 20 clusters; `outcomes[task][condition, seed]`, first ten of holdout `pair`."""
    runs: dict[tuple[str, int | None], dict[str, Any]] = {}
    for task, by_run in outcomes.items():
        for (condition, seed), text in by_run.items():
            run = runs.setdefault(
                (condition, seed),
                {"family": "internvl", "condition": condition, "seed": seed, "outcomes": {}}
                | {"supervised_tokens_seen": 1000},
            )
            run["outcomes"][task] = text
    ids = " ".join(str(number) for number in range(20))
    groups = {"holdout": {"values": ["object", "pair"], "codes": "1" * 10 + "0" * 10}}
    tasks = {task: {"ids": ids, "clusters": ids, "groups": groups} for task in outcomes}
    return Experiment({"tasks": tasks, "runs": list(runs.values()), "repeats": [], "curves": [], "dataset": {}})


def test_a_rate_over_one_run_is_wilsons() -> None:
    experiment = handmade(mis_hard={(BASE, None): "a" * 15 + "s" * 5})
    cell = experiment.cell("internvl", BASE, ask("mis_hard", "asr"))
    assert cell is not None and (cell.percent, cell.spread, cell.num_samples) == (75.0, None, 20)
    assert (cell.low, cell.high) == pytest.approx(wilson(15, 20))
    part = experiment.cell("internvl", BASE, ask("mis_hard", "asr", holdout="object"))
    assert part is not None and (part.percent, part.num_samples) == (50.0, 10)
    assert experiment.cell("internvl", BASE, ask("mis_easy", "asr")) is None
    assert experiment.cell("qwen2_vl", BASE, ask("mis_hard", "asr")) is None


def test_unscored_and_unasked_samples_are_not_counted() -> None:
    cell = handmade(mis_hard={(BASE, None): "aa??" + "-" * 10 + "ssssss"}).cell(
        "internvl", BASE, ask("mis_hard", "asr")
    )
    assert cell is not None and (cell.percent, cell.num_samples) == (25.0, 8)


def test_a_rate_over_seeds_has_a_t_interval_and_draws_each_pair_for_all_seeds() -> None:
    texts = {(MAIN, seed): "a" * hits + "s" * (20 - hits) for seed, hits in enumerate((2, 4, 6))}
    cell = handmade(mis_hard=texts).cell("internvl", MAIN, ask("mis_hard", "asr"))
    assert cell is not None and cell.by_seed == (10.0, 20.0, 30.0) and cell.percent == pytest.approx(20.0)
    assert cell.spread == pytest.approx(t.ppf(0.975, 2) * 10 / math.sqrt(3))
    assert (cell.num_samples, cell.num_clusters) == (20, 20)
    # Three seeds of one sample are no three samples: about as wide as one run of 20, not of 60.
    alone = handmade(mis_hard={(MAIN, 0): texts[MAIN, 1]}).cell("internvl", MAIN, ask("mis_hard", "asr"))
    assert alone is not None and cell.high - cell.low > 0.7 * (alone.high - alone.low)


def test_no_answer_that_counts_still_leaves_an_interval() -> None:
    texts = {(MAIN, seed): "s" * 20 for seed in range(3)}
    cell = handmade(mis_hard=texts).cell("internvl", MAIN, ask("mis_hard", "asr"))
    assert cell is not None and (cell.percent, cell.low) == (0.0, 0.0)
    assert cell.high == pytest.approx(wilson(0, 20)[1])


def test_a_change_is_paired_and_its_p_is_the_worst_seeds() -> None:
    base = {(BASE, None): "a" * 20}
    now = {(MAIN, 0): "s" * 12 + "a" * 8, (MAIN, 1): "s" * 4 + "a" * 16}
    change = handmade(mis_hard=base | now).change("internvl", MAIN, BASE, ask("mis_hard", "asr"))
    assert change is not None and change.num_seeds == 2
    assert change.points == pytest.approx(-40.0) and change.low < -40 < change.high < 0
    assert change.p_value == pytest.approx(binomtest(0, 4).pvalue)
    assert change.spread == pytest.approx(seed_spread([-60.0, -20.0]))
    again = adjust([change, dataclasses.replace(change, p_value=0.01)])
    assert [item.adjusted for item in again] == pytest.approx([0.125, 0.02])


def test_balanced_accuracy_is_the_mean_of_both_halves() -> None:
    experiment = handmade(mis_hard={(MAIN, 0): "a" * 4 + "s" * 16}, twins={(MAIN, 0): "h" * 10 + "r" * 10})
    declined = complement(experiment.cell("internvl", MAIN, ask("mis_hard", "asr")))
    helped = experiment.cell("internvl", MAIN, ask("twins", "helped"))
    cell = balanced(declined, helped)
    assert declined is not None and helped is not None and cell is not None
    assert (declined.percent, cell.percent) == (80.0, 65.0)
    assert cell.percent - cell.low == pytest.approx(math.hypot(80 - declined.low, 50 - helped.low) / 2)
    assert decision(experiment, "internvl", MAIN) is None  # no sample says which twins are of hard rows


def test_seed_spread_needs_two_seeds() -> None:
    assert seed_spread([3.0]) is None and seed_spread([4.0, 4.0]) == 0.0


# Bars and the paper


def bars(**outcomes: dict[tuple[str, int | None], str]) -> dict[str, tuple[str, str]]:
    return {bar.name: (bar.verdict, bar.found) for bar in find_bars(handmade(**outcomes), "internvl")}


def test_bars_are_met_and_missed_at_their_limits() -> None:
    found = bars(
        mis_easy={(BASE, None): "a" * 16 + "s" * 4, (MAIN, 0): "s" * 20, ("vlguard", 0): "s" * 20},
        mis_hard={(BASE, None): "a" * 15 + "s" * 5, (MAIN, 0): "a" + "s" * 19, ("vlguard", 0): "s" * 20},
        twins={(BASE, None): "h" * 20, (MAIN, 0): "rr" + "h" * 18, ("vlguard", 0): "r" * 5 + "h" * 15},
        general={(BASE, None): "y" * 18 + "w" * 2, (MAIN, 0): "y" * 17 + "w" * 3},
    )
    verdicts = {name: verdict for name, (verdict, _) in found.items()}
    assert verdicts["Base: ASR, easy"] == "met" and verdicts["Base: ASR, hard"] == "missed"
    assert verdicts["Base: multiple choice"] == "met"
    # Of the ten hard and ten easy held-out pairs one is answered: 5 %.
    assert verdicts["MIRage with twins, pairs never seen: ASR"] == "met"
    assert verdicts["MIRage with twins, pairs never seen: twins helped"] == "missed"
    assert verdicts["MIRage with twins: multiple choice"] == "missed"
    assert verdicts["Refusal SFT: over-refusal"] == "missed"  # 50 against 20
    assert verdicts["Reasoned against direct labels"] == "not measured"


def test_refusing_nothing_at_all_is_beaten_by_any_refusal() -> None:
    twins = {(MAIN, 0): "h" * 20, ("vlguard", 0): "r" + "h" * 19}
    assert bars(twins=twins)["Refusal SFT: over-refusal"][0] == "met"
    assert bars(twins=twins | {("vlguard", 0): "h" * 20})["Refusal SFT: over-refusal"][0] == "missed"


def test_a_direction_against_the_papers_is_found() -> None:
    """The paper's MIRage answers fewer easy requests than its base; here it answers all and the base none."""
    found = directions(handmade(mis_easy={(BASE, None): "s" * 20, ("mis", 0): "a" * 20}))
    asr = next(item for item in found if item.analogue.metric == "asr")
    assert asr.kind == "opposite" and asr.points == 100.0 and asr.paper_points == pytest.approx(0.24 - 80.12)
    agreed = directions(handmade(mis_easy={(BASE, None): "a" * 20, ("mis", 0): "s" * 20}))
    assert {item.kind for item in agreed} == {"same"}
    even = directions(handmade(mis_easy={(BASE, None): "a" * 20, ("mis", 0): "a" * 20}))
    assert {item.kind for item in even} == {"open"}


def test_a_complement_turns_direction_and_interval() -> None:
    """Refusing more twins is fewer harmless requests answered, as VLGuard-P does in the paper."""
    found = directions(handmade(twins={(BASE, None): "h" * 20, ("vlguard", 0): "r" * 20}))
    (item,) = [one for one in found if one.analogue.name == "harmless requests answered"]
    assert (item.points, item.kind) == (-100.0, "same") and item.low <= item.points <= item.high < 0


def test_missing_runs_are_listed() -> None:
    told = missing(Experiment(content(families=("internvl",), seeds=(0, 2), conditions=(BASE, MAIN))))
    assert "InternVL, tiny: (g) MIRage with twins lacks seed 1" in told
    assert "InternVL, tiny: (c) VLGuard refusals was not run" in told and "Qwen2-VL, tiny: no run at all" in told
    assert missing(Experiment(content())) == []
