"""`mirage evaluate`: from the command's words to an evaluation, its folder and its baseline."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mirage.config.loader import load_section
from mirage.config.schema import DataConfig, EvalConfig
from mirage.errors import UserError
from mirage.evals.evaluate import evaluate_checkpoint, finished_results, step_of
from mirage.evals.request import decide_request
from mirage.evals.results import RESULTS_FILE, read_results
from mirage.evals.schedule import leased, results_dir
from mirage.evals.show_results import show_results
from mirage.model_card.write import refresh_cards_of
from mirage.models.registry import find_weights, known_family, load_adapter
from mirage.models.shipped import PREFIX, find_shipped
from mirage.report.callback import report_run
from mirage.strict_json import read_json_object
from mirage.tracking.console import console_mode, make_console
from mirage.training.checkpoint import NAME, ready_checkpoints

# What `mirage evaluate` takes besides the keys of the recipe's eval section.
_OWN_SETTINGS = ("out_dir", "baseline", "device", "console")


def run(path: str | Path, settings: Sequence[str] = ()) -> int:
    """`mirage evaluate PATH key=value ...`: measure, print the table, exit code.

    PATH is a checkpoint, a run folder (its newest checkpoint) or any weights folder. Settings are the recipe's `eval`
    keys, over those of the run that the path lies in, and `out_dir`, `baseline`, `device`, `console`. Raises
    `UserError`.
    """
    own, rest = _own_settings(settings)
    console = make_console(console_mode(own.get("console")))
    quiet_libraries()
    shipped = str(path).startswith(PREFIX)
    given = find_shipped(str(path)) if shipped else Path(path).expanduser().absolute()
    if shipped and "out_dir" not in own:
        raise UserError(f"say where the results of {path} go: out_dir=DIR")
    if not given.exists():
        raise UserError(f"there is nothing at {path}; give a checkpoint, a run folder or a folder of weights")
    checkpoint = _newest_checkpoint(given) or given
    run_dir = checkpoint.parent if NAME.match(checkpoint.name) else None
    recipe = recipe_of(run_dir)
    taught, rest = _preprocessing_settings(rest)
    _check_preprocessing(checkpoint, recipe.get("preprocessing"), taught)
    config = load_section("eval", rest, base=recipe.get("eval"))
    assert isinstance(config, EvalConfig)
    data_dir = config.data_dir or Path(recipe.get("data", {}).get("dir") or DataConfig().dir)
    first = run_dir / "evals" / "step-000000" if run_dir is not None else None
    baseline = Path(own["baseline"]) if "baseline" in own else None
    usual = config.engine == "transformers"
    if (
        usual
        and baseline is None
        and first is not None
        and (first / RESULTS_FILE).is_file()
        and step_of(checkpoint) != 0
    ):
        baseline = first
    if not usual and "device" in own:
        raise UserError(f"device={own['device']} has no effect with eval.engine={config.engine}, which chooses its own")
    device = find_device(own.get("device"))
    request = decide_request(
        checkpoint, config=config, data_dir=data_dir.expanduser().absolute(), device=device, baseline=baseline
    )
    out_dir = (
        Path(own["out_dir"]) if "out_dir" in own else _default_out_dir(checkpoint, run_dir, request.key, usual=usual)
    )
    with leased(checkpoint) if NAME.match(checkpoint.name) else contextlib.nullcontext():
        results = evaluate_checkpoint(
            checkpoint,
            config=config,
            data_dir=data_dir,
            out_dir=out_dir,
            device=device,
            baseline=baseline,
            console=console,
        )
    assert results is not None
    if run_dir is not None:
        refresh_cards_of(run_dir, console)
    show_results(console, results, file=out_dir / RESULTS_FILE, before=read_results(baseline) if baseline else None)
    step = step_of(checkpoint)
    if run_dir is not None and step is not None and out_dir.absolute() == results_dir(run_dir.absolute(), step):
        report_run(run_dir, console)
    return 0


def quiet_libraries() -> None:
    """Keep transformers' bars for each file it loads out of the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _own_settings(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The settings that are no keys of the recipe, and the others."""
    own = {key: text for key, _, text in (item.partition("=") for item in settings) if key in _OWN_SETTINGS}
    return own, [item for item in settings if item.partition("=")[0] not in _OWN_SETTINGS]


def _preprocessing_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings of the recipe's preprocessing section, without its name, and the others."""
    prefix = "preprocessing."
    taught = [item.removeprefix(prefix) for item in settings if item.startswith(prefix)]
    return taught, [item for item in settings if not item.startswith(prefix)]


def _check_preprocessing(checkpoint: Path, recorded: dict[str, Any] | None, settings: Sequence[str]) -> None:
    """Evaluation takes the checkpoint's preprocessing. Raises `UserError` where run or command say otherwise."""
    if not recorded and not settings:
        return
    folder = find_weights(checkpoint)
    if known_family(folder) is None:
        raise UserError(f"preprocessing settings have no effect on {folder}, which is asked through its own processor")
    spec = load_adapter(folder).spec
    if recorded:
        spec.check(recorded, folder=folder, source="the run's recipe.json")
    if settings:
        asked = load_section("preprocessing", settings, base=None)
        names = {item.partition("=")[0] for item in settings}
        given = {key: value for key, value in asked.model_dump().items() if key in names}
        spec.check(given, folder=folder, source="the command")


def find_device(name: str | None) -> torch.device:
    """The device of that name, or a GPU where there is one. Raises `UserError` for one that is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device={name}: no such device; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: no GPU is present; use device=cpu")
    return device


def recipe_of(run_dir: Path | None) -> dict[str, Any]:
    """The resolved recipe of a run, or nothing."""
    file = run_dir / "recipe.json" if run_dir is not None else None
    if file is None or not file.is_file():
        return {}
    return read_json_object(file, remedy="the run folder is damaged")


def _newest_checkpoint(path: Path) -> Path | None:
    found = ready_checkpoints(path) if path.is_dir() else []
    return found[-1] if found else None


def _default_out_dir(checkpoint: Path, run_dir: Path | None, key: str, *, usual: bool) -> Path:
    """The run's own folder for this step unless an evaluation with other settings lies there, or another engine's."""
    if run_dir is None:
        return checkpoint.parent / f"{checkpoint.name}-evals" / key[:12]
    step = step_of(checkpoint)
    assert step is not None, "a checkpoint of a run"
    own = results_dir(run_dir, step)
    if usual and (not own.exists() or finished_results(own, key) is not None):
        return own
    return run_dir / "evals" / f"other-{checkpoint.name}-{key[:12]}"
