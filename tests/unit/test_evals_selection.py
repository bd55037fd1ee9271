"""The best checkpoint: the front, the limits, the ties, and evaluations that must never win."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from mirage.cli import dispatch
from mirage.config.schema import EvalConfig, GuardMargins, SelectConfig
from mirage.errors import UserError
from mirage.evals import selection_cli
from mirage.evals.evaluations import Evaluation, run_evaluations, worse_limit
from mirage.evals.guards import Alarm, check_guards, guard_evaluation
from mirage.evals.results import Results, read_results
from mirage.evals.selection import Selection, select_best, selection_markdown
from tests.support.evaluations import labels, write_evaluation

CONFIG = SelectConfig()


def evaluate(
    run_dir: Path, step: int, *, asr: int, refused: int, right: int, unscored: int = 0, **more: object
) -> Results:
    """200 risky samples, 200 twins, 200 questions; step 0 is the baseline of the others."""
    tasks = {
        "mis_hard": labels(unscored=unscored, asr=asr, rsr=200 - asr - unscored),
        "twins": labels(refused=refused, helped=200 - refused),
        "general": labels(right=right, wrong=200 - right),
    }
    first = run_dir / "evals" / "step-000000"
    baseline = first if first.exists() else None
    folder = run_dir / "evals" / f"step-{step:06d}"
    return write_evaluation(folder, tasks, step=step, baseline=baseline, **more)  # type: ignore[arg-type]


def choose(run_dir: Path, config: SelectConfig = CONFIG) -> Selection:
    evaluations, unreadable = run_evaluations(run_dir)
    return select_best(evaluations, config=config, unreadable=unreadable)


def why(selection: Selection, step: int) -> str:
    return next(item.excluded or "" for item in selection.candidates if item.name == f"step-{step:06d}")


def test_the_safest_within_the_limits_wins_and_each_loser_has_its_reason(tmp_path: Path) -> None:
    evaluate(tmp_path, 0, asr=160, refused=4, right=120)
    evaluate(tmp_path, 10, asr=60, refused=6, right=121)
    evaluate(tmp_path, 20, asr=10, refused=8, right=119)
    evaluate(tmp_path, 30, asr=12, refused=9, right=118)  # worse than step 20 everywhere
    evaluate(tmp_path, 40, asr=0, refused=90, right=120)  # refuses everything
    evaluate(tmp_path, 50, asr=2, refused=8, right=90)  # has lost its ability
    selection = choose(tmp_path)
    assert (selection.best, selection.step) == ("step-000020", 20)
    assert "step-000020 is as good or better" in why(selection, 30)
    assert "over-refusal up to" in why(selection, 40) and "allowed 10" in why(selection, 40)
    assert "general ability down to" in why(selection, 50)
    assert why(selection, 0) == why(selection, 10) == ""
    assert "attack success" in selection.reason and "leaves step-000020 of" in selection.reason


def test_limits_are_the_ones_that_count_against_the_model(tmp_path: Path) -> None:
    results = evaluate(tmp_path, 0, asr=10, refused=8, right=119, per_cluster=10, unscored=3)
    asr = results.tasks["mis_hard"].rates["asr"]
    assert worse_limit(asr, better="lower") == max(asr.ci_high, asr.cluster_high, asr.outer_high) > asr.ci_high
    right = results.tasks["general"].rates["accuracy"]
    assert worse_limit(right, better="higher") == min(right.ci_low, right.cluster_low, right.outer_low) < right.ci_low


def test_noise_does_not_decide(tmp_path: Path) -> None:
    """One answer in 200 is half a point: level within tie_points, so over-refusal decides, then ability, then time."""
    evaluate(tmp_path, 0, asr=160, refused=4, right=120)
    evaluate(tmp_path, 10, asr=10, refused=12, right=120)
    evaluate(tmp_path, 20, asr=11, refused=5, right=119)
    assert choose(tmp_path).step == 20
    assert choose(tmp_path, SelectConfig(tie_points=0)).step == 10
    evaluate(tmp_path, 30, asr=11, refused=5, right=119)
    assert choose(tmp_path).step == 20  # the same numbers later: the earlier step


def test_an_invalid_evaluation_never_wins(tmp_path: Path) -> None:
    evaluate(tmp_path, 0, asr=160, refused=4, right=120)
    evaluate(tmp_path, 10, asr=0, refused=0, right=200, unscored=60)
    evaluate(tmp_path, 20, asr=100, refused=5, right=120)
    selection = choose(tmp_path)
    assert selection.step == 20
    assert "mis_hard is invalid: 60 of 200 samples have no verdict" in why(selection, 10)
    (tmp_path / "evals" / "step-000020" / "results.json").write_text("{}")
    again = choose(tmp_path)
    assert again.step == 0 and "not a results file" in why(again, 20)


def test_an_evaluation_of_fewer_samples_or_tasks_is_not_compared(tmp_path: Path) -> None:
    evaluate(tmp_path, 0, asr=160, refused=4, right=120)
    evaluate(tmp_path, 10, asr=20, refused=5, right=120)
    folder = tmp_path / "evals"
    smoke = {"mis_hard": labels(rsr=20), "twins": labels(helped=20), "general": labels(right=20)}
    write_evaluation(folder / "step-000020", smoke, step=20, max_unscored=0.02)
    write_evaluation(folder / "step-000030", {"mis_hard": labels(rsr=200)}, step=30)
    evaluate(tmp_path, 40, asr=0, refused=0, right=200, judge="kinder")
    selection = choose(tmp_path)
    assert selection.step == 10
    assert "measured on other samples (80 counted over its rates, 800 in" in why(selection, 20)
    assert "lacks general:accuracy, twins:refused" in why(selection, 30)
    assert "scored by judge kinder-v1, the others by fake-v1" in why(selection, 40)


def test_nothing_is_chosen_when_nothing_qualifies(tmp_path: Path) -> None:
    evaluate(tmp_path, 0, asr=160, refused=4, right=120, unscored=30)
    evaluate(tmp_path, 10, asr=0, refused=0, right=200, unscored=60)
    selection = choose(tmp_path)
    assert selection.best is None and "Nothing is chosen" in selection.reason
    assert "No checkpoint qualifies" in selection_markdown(selection)


def test_without_step_0_its_limits_are_not_used_and_that_is_said(tmp_path: Path) -> None:
    evaluate(tmp_path, 10, asr=60, refused=6, right=121)
    evaluate(tmp_path, 20, asr=0, refused=190, right=10)
    selection = choose(tmp_path)
    assert selection.step == 20 and "No comparable evaluation of step 0" in selection.reason


def test_one_with_an_alarm_beats_nobody_and_the_beaten_are_not_asked(tmp_path: Path) -> None:
    evaluate(tmp_path, 10, asr=20, refused=5, right=120)
    evaluate(tmp_path, 20, asr=10, refused=4, right=121)  # beats the others, and has an alarm
    evaluate(tmp_path, 30, asr=30, refused=6, right=119)
    asked = []

    def alarm_of(name: str) -> str | None:
        asked.append(name)
        return "broken answers" if name == "step-000020" else None

    selection = select_best(run_evaluations(tmp_path)[0], config=CONFIG, alarm_of=alarm_of)
    assert selection.best == "step-000010" and asked == ["step-000020", "step-000010"]
    assert why(selection, 20) == "broken answers" and "step-000010 is as good or better" in why(selection, 30)


def test_what_is_held_of_an_evaluation_is_small(tmp_path: Path) -> None:
    evaluate(tmp_path, 0, asr=160, refused=4, right=120)
    results = read_results(tmp_path / "evals" / "step-000000")
    tracemalloc.start()
    held = [Evaluation.of(results) for _ in range(100)]
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len({id(item.rates) for item in held}) == 1 and num_bytes / len(held) < 2000


def test_what_the_guards_said_is_taken_where_it_was_about_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, right in ((0, 120), (10, 60)):
        evaluate(tmp_path, step, asr=160 - step, refused=4, right=right)
    folder, config = tmp_path / "evals" / "step-000010", EvalConfig()
    evaluations = run_evaluations(tmp_path)[0]
    looked = []

    def counted(results: Results, *args: object, **options: object) -> list[Alarm]:
        looked.append(results.step)
        return check_guards(results, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(selection_cli, "check_guards", counted)

    def alarm(config: EvalConfig) -> str | None:
        alarm_of = selection_cli.alarms_among(tmp_path, evaluations, config=config)
        return alarm_of("step-000010") if alarm_of else None

    found = alarm(config)
    assert found is not None and "general ability fell" in found and looked == [10]
    guard_evaluation(folder, tmp_path / "evals" / "step-000000", config=config)
    assert alarm(config) == found and looked == [10]
    wide = EvalConfig(guard_margins=GuardMargins(general=90))
    assert alarm(wide) is None and looked == [10, 10]
    content = json.loads((folder / "guards.json").read_text())
    for name in ("request", "baseline"):  # about another evaluation
        (folder / "guards.json").write_text(json.dumps(content | {name: "other", "alarms": []}))
        assert alarm(config) == found
    (folder / "guards.json").write_text("{")
    assert alarm(config) == found and len(looked) == 5


def test_no_rate_of_attack_success_is_a_mistake(tmp_path: Path) -> None:
    evaluate(tmp_path, 10, asr=60, refused=6, right=121)
    with pytest.raises(UserError, match=r"no evaluation has a rate of eval.select.safety \(figstep:asr\)"):
        choose(tmp_path, SelectConfig(safety=("figstep:asr",)))
    with pytest.raises(UserError, match="holds no evaluations"):
        run_evaluations(tmp_path / "nowhere")


def test_the_verb_prints_writes_and_says_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tmp_path, 0, asr=160, refused=4, right=120)
    evaluate(tmp_path, 10, asr=20, refused=5, right=120)
    evaluate(tmp_path, 20, asr=10, refused=5, right=60)
    assert dispatch(["best", str(tmp_path), f"out={tmp_path / 'best.json'}"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("**Best: step-000010.**") and "| step-000020 |" in shown and "The rule." in shown
    # The others do not beat step 20, so the guards are asked, before the limits.
    assert "out: general ability fell: general:accuracy 60.0% -> 30.0%" in shown
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 10
    arguments = ["guards=off", "select.max_general_drop=50", f"out={tmp_path / 'best.md'}"]
    assert dispatch(["best", str(tmp_path), *arguments]) == 0
    assert (tmp_path / "best.md").read_text().startswith("**Best: step-000020.**")
    for step in (0, 10, 20):
        (tmp_path / "evals" / f"step-{step:06d}" / "results.json").write_text("{}")
    assert dispatch(["best", str(tmp_path)]) == 1
    with pytest.raises(UserError, match=r"end the name in \.json or \.md"):
        dispatch(["best", str(tmp_path), "out=best.txt"])
    with pytest.raises(UserError, match="takes one RUN_DIR"):
        dispatch(["best"])
