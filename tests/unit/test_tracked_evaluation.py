"""What an evaluation's numbers become: the score that sweeps minimise, categories, changes, rates that rise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mirage.config.schema import AlertsConfig, EvalConfig, SelectConfig, TrackingConfig
from mirage.evals.results import read_results, read_samples
from mirage.evals.tracked import (
    category_metrics,
    change_metrics,
    log_evaluation,
    rise_alerts,
    select_metrics,
    table_rows,
)
from mirage.tracking.run import Tracker
from tests.support.evaluations import labels, write_evaluation


def evaluation(folder: Path, step: int, *, asr: int, refused: int, right: int, **more: Any) -> Path:
    path = folder / f"step-{step:06d}"
    given = {
        "mis_hard": labels(asr=asr, rsr=40 - asr),
        "twins": labels(refused=refused, helped=40 - refused),
        "general": labels(right=right, wrong=40 - right),
    }
    write_evaluation(path, given, step=step, baseline=folder / "step-000000" if step else None, **more)
    return path


def test_the_score_is_what_the_documentation_says(tmp_path: Path) -> None:
    first = read_results(evaluation(tmp_path, 0, asr=40, refused=0, right=36))
    now = read_results(evaluation(tmp_path, 4, asr=4, refused=8, right=32))
    found = select_metrics(now, first, SelectConfig())
    assert found == pytest.approx({"asr": 10.0, "over_refusal": 20.0, "general": 80.0, "score": 15.0 + 10.0})
    better = read_results(evaluation(tmp_path, 8, asr=4, refused=8, right=40))
    assert select_metrics(better, first, SelectConfig())["score"] == pytest.approx(15.0), "a gain is no bonus"
    assert "score" not in select_metrics(now, None, SelectConfig()), "what was lost since step 0 is not known"


def test_a_broken_judge_gives_no_score(tmp_path: Path) -> None:
    folder = tmp_path / "step-000000"
    write_evaluation(
        folder, {"mis_hard": labels(rsr=5, unscored=35), "twins": labels(helped=9), "general": ["right"] * 9}
    )
    now = read_results(folder)
    assert set(select_metrics(now, now, SelectConfig())) == {"over_refusal", "general"}


def test_the_summary_is_of_the_newest_evaluation_and_of_step_0(tmp_path: Path) -> None:
    evals = tmp_path / "evals"
    tracker = Tracker.open(tmp_path, TrackingConfig(wandb="off"), name="x", recipe={}, is_main=True)
    config = EvalConfig()
    log_evaluation(tracker, evaluation(evals, 0, asr=40, refused=0, right=36), step=0, config=config, num_alarms=0)
    assert not (tmp_path / "summary.json").exists()
    log_evaluation(tracker, evaluation(evals, 4, asr=4, refused=8, right=32), step=4, config=config, num_alarms=1)
    assert tracker._summary["select/score"] == pytest.approx(25.0) and tracker._summary["select/base_asr"] == 100.0
    write_evaluation(evals / "step-000008", {"mis_hard": labels(rsr=40)}, step=8, baseline=evals / "step-000000")
    log_evaluation(tracker, evals / "step-000008", step=8, config=config, num_alarms=0)
    assert math.isnan(float(tracker._summary["select/score"])), "an old score must not stand for a new checkpoint"
    tracker.close()


def test_categories_and_changes_are_logged_by_name(tmp_path: Path) -> None:
    evaluation(tmp_path, 0, asr=40, refused=0, right=36)
    results = read_results(evaluation(tmp_path, 4, asr=4, refused=8, right=32))
    categories = category_metrics(results)
    assert {"eval/mis_hard/category/category_0/asr", "eval/twins/category/category_2/refused"} <= set(categories)
    assert not any("general" in name for name in categories), "general benchmarks have too many subjects"
    changes = change_metrics(results)
    assert changes["eval/mis_hard/asr_change"] == pytest.approx(-90.0)
    assert 0 < changes["eval/mis_hard/asr_change_p"] < 1e-6


def test_only_rises_beyond_noise_and_margin_are_told(tmp_path: Path) -> None:
    evaluation(tmp_path, 0, asr=4, refused=4, right=36)
    steady = evaluation(tmp_path, 4, asr=6, refused=4, right=36)
    risen = evaluation(tmp_path, 8, asr=26, refused=18, right=20)
    found = {step: told(path) for step, path in ((4, steady), (8, risen))}
    assert found == {4: [], 8: ["mis_hard:asr: step 4 to 8", "twins:refused: step 4 to 8"]}
    assert told(risen, asr_rise=60.0, over_refusal_rise=None) == []


def test_another_judge_is_not_compared(tmp_path: Path) -> None:
    evaluation(tmp_path, 0, asr=4, refused=4, right=36)
    assert told(evaluation(tmp_path, 4, asr=36, refused=4, right=36, judge="other")) == []


def told(folder: Path, **alerts: Any) -> list[str]:
    found = rise_alerts(
        folder, read_results(folder), read_samples(folder), config=EvalConfig(), alerts=AlertsConfig(**alerts)
    )
    assert all(len(alert.title) <= 64 and "points, p" in alert.text for alert in found)
    return [alert.key.removeprefix("rise: ") for alert in found]


def test_a_table_shows_changed_verdicts_first_with_parts() -> None:
    rows = [{"task": "a", "answer": "The first image shows a cat.", "changed": changed} for changed in ("", "x", "")]
    found = table_rows([*rows, {"task": "b", "answer": "", "changed": "x"}], "a")
    assert [row["changed"] for row in found] == ["x", "", ""]
    assert found[0]["parts"] == [("perceive", "The first image shows a cat.")]
