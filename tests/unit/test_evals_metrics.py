"""Rates, bounds, sums and paired tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirage.evals.judge import Scored, Unscored, Verdict
from mirage.evals.metrics import compare_events, make_rate
from mirage.evals.task import Sample
from mirage.evals.tasks import TASKS
from mirage.evals.tasks.mis import JOINT_TABLE


def samples(count: int) -> list[Sample]:
    return [Sample(f"s{i}", (), (Path("a"),), f"cat{i % 2}", f"sub{i % 3}", f"pair{i // 2}") for i in range(count)]


def scored(label: str, safe: str = "yes", perception: str = "1") -> Scored:
    return Scored(label, (label,), "because", {"safe": safe, "perception": perception})


def test_wilson_interval_at_zero_events_has_a_width() -> None:
    rate = make_rate(0, 100)
    assert (rate.percent, rate.ci_low) == (0.0, 0.0)
    assert rate.ci_high == pytest.approx(3.6994, abs=1e-3)  # 1.96^2 / (100 + 1.96^2)


def test_bounds_count_unscored_samples_both_ways() -> None:
    rate = make_rate(3, 8, num_unscored=2)
    assert (rate.percent, rate.bound_low, rate.bound_high) == (37.5, 30.0, 50.0)
    empty = make_rate(0, 0, num_unscored=4)
    assert (empty.percent, empty.ci_high, empty.bound_low, empty.bound_high) == (None, None, 0.0, 100.0)


def test_the_four_rates_sum_to_100_and_the_joint_table_keeps_both_labels() -> None:
    verdicts: list[Verdict] = [
        scored("asr", "no", "3"),
        scored("asr", "no", "1"),
        scored("rsr"),
        scored("rr", perception="2"),
        scored("hr", perception="3"),
        Unscored("no answer"),
        scored("rsr"),
    ]
    result = TASKS["mis_easy"].aggregate(samples(7), verdicts, max_unscored=0.2)
    assert sum(rate.percent or 0 for rate in result.rates.values()) == pytest.approx(100)
    assert {name: rate.count for name, rate in result.rates.items()} == {"asr": 2, "rsr": 2, "rr": 1, "hr": 1}
    assert result.rates["asr"].n == 6
    table = result.tables[JOINT_TABLE]
    assert table["unsafe, level 3"] == 1 and table["safe, level 1"] == 2 and sum(table.values()) == 6
    assert result.num_clusters == 4
    assert result.unscored_reasons == {"no answer": 1}
    assert {name: group.num_samples for name, group in result.by_category.items()} == {"cat0": 4, "cat1": 3}
    assert result.by_sub_category["cat0 / sub0"].num_samples == 2


@pytest.mark.parametrize(("num_unscored", "valid"), [(2, True), (3, False)])
def test_too_many_unscored_samples_void_the_task(num_unscored: int, valid: bool) -> None:
    verdicts: list[Verdict] = [scored("rsr")] * (100 - num_unscored)
    verdicts += [Unscored("x")] * num_unscored
    result = TASKS["mis_easy"].aggregate(samples(100), verdicts, max_unscored=0.02)
    assert result.valid is valid
    assert valid or "3 of 100" in (result.invalid_reason or "")


def test_exact_mcnemar_on_the_shared_judged_samples() -> None:
    before = {f"s{i}": ("asr",) for i in range(8)} | {"gone": ("asr",), "voided": None}
    now = {f"s{i}": ("rsr",) if i < 6 else ("asr",) for i in range(8)} | {"new": ("asr",), "voided": ("asr",)}
    paired = compare_events(now, before, metrics=["asr", "rr"])
    asr = paired["asr"]
    assert (asr.num_pairs, asr.gained, asr.lost, asr.baseline_percent, asr.delta_points) == (8, 0, 6, 100.0, -75.0)
    assert asr.p_value == pytest.approx(2 * 0.5**6)  # six one-way flips are the least that reach p < .05
    assert paired["rr"].p_value == 1.0
