"""`mirage best`: the run's best checkpoint by the recipe's rule, as markdown on screen and as a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from mirage.config.loader import load_section
from mirage.config.schema import EvalConfig
from mirage.errors import UserError
from mirage.evals.evaluate_cli import recipe_of
from mirage.evals.evaluations import Evaluation, run_evaluations
from mirage.evals.guards import check_guards, recorded_alarms
from mirage.evals.results import read_results, read_samples
from mirage.evals.selection import select_best, selection_markdown
from mirage.files import write_atomic

NO_WINNER = 1


def run(run_dir: Path, settings: Sequence[str], *, out: str | None) -> int:
    """Choose among the run's evaluations, print why; exit code 1 where none qualifies.

    `settings` are keys of the recipe's eval section over the run's own; `out` names a .json or .md file to write.
    Raises `UserError` for a folder without evaluations, or an unknown kind of file.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder; give the run_dir of a run")
    target = Path(out) if out is not None else None
    if target is not None and target.suffix not in (".json", ".md"):
        raise UserError(f"out={out}: end the name in .json or .md")
    config = load_section("eval", settings, base=recipe_of(run_dir).get("eval"))
    assert isinstance(config, EvalConfig)
    evaluations, unreadable = run_evaluations(run_dir)
    alarm_of = alarms_among(run_dir, evaluations, config=config)
    selection = select_best(evaluations, config=config.select, unreadable=unreadable, alarm_of=alarm_of)
    text = selection_markdown(selection)
    if target is not None:
        write_atomic(target, selection.model_dump_json(indent=2) + "\n" if target.suffix == ".json" else text)
    print(text)
    return 0 if selection.best is not None else NO_WINNER


def alarms_among(
    run_dir: Path, evaluations: Mapping[str, Evaluation], *, config: EvalConfig
) -> Callable[[str], str | None] | None:
    """What the guards say of the evaluation of a name, None for no alarm.

    Without an evaluation of step 0 they say nothing. What they said while training is taken where it was about the same
    two evaluations under the same settings; else answers are read, those of step 0 once, and the others' are not kept.
    """
    first = next((name for name, evaluation in evaluations.items() if evaluation.step == 0), None)
    if first is None or config.guards == "off":
        return None
    folder, start = run_dir / "evals", evaluations[first]
    baseline = lru_cache(maxsize=1)(lambda: (read_results(folder / first), read_samples(folder / first)))

    def alarm_of(name: str) -> str | None:
        if evaluations[name].baseline != start.fingerprint:
            return None
        request = evaluations[name].request
        alarms = recorded_alarms(folder / name, request=request, baseline=start.request, config=config)
        if alarms is None:
            results, rows = read_results(folder / name), read_samples(folder / name)
            alarms = check_guards(results, baseline()[0], rows, baseline_samples=baseline()[1], config=config)
        return "; ".join(alarm.message for alarm in alarms) or None

    return alarm_of
