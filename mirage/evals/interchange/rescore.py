"""`mirage rescore`: answers that another tool generated, scored by this project's judges with its statistics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from mirage.config.loader import load_section
from mirage.config.schema import DataConfig, EvalConfig
from mirage.errors import UserError
from mirage.evals.answers import Answer
from mirage.evals.endpoint_generation import make_endpoint_prompts
from mirage.evals.evaluate import finished_results, score_all
from mirage.evals.interchange.origin import ForeignSpec, ImportedDecoding
from mirage.evals.interchange.predictions import Prediction, Predictions, match_predictions, read_predictions
from mirage.evals.judges.choose import make_judge
from mirage.evals.request import Request, data_fingerprint, subset
from mirage.evals.results import RESULTS_FILE, Results, read_results
from mirage.evals.show_results import show_results
from mirage.evals.tasks import find_task
from mirage.files import file_sha256
from mirage.tracking.console import Terminal, console_mode, make_console

# What the command takes besides the keys of the recipe's eval section.
_OWN_SETTINGS = ("task", "out_dir", "baseline", "model", "repeated", "console")
DEFAULT_FOLDER = Path("runs") / "imported"


def rescore(
    predictions: Predictions,
    *,
    task: str,
    model: str,
    config: EvalConfig,
    data_dir: Path,
    out_dir: Path | None = None,
    baseline: Path | None = None,
    console: Terminal | None = None,
) -> tuple[Results, Path]:
    """Score the answers as those of `model` to `task`; the results, and the folder where they lie.

    Questions without an answer are unscored, never dropped. The same call again goes on where a killed one stood and
    returns at once when it is complete. Raises `UserError` for answers to other questions, and for data or judges that
    cannot be used.
    """
    request = _request(predictions, task=task, model=model, config=config, data_dir=data_dir, baseline=baseline)
    found = request.samples[task]
    matched = match_predictions(predictions, found, task=task)
    folder = out_dir or DEFAULT_FOLDER / _plain(f"{model}-{task}") / request.key[:12]
    done = finished_results(folder, request.key)
    if done is not None and request.is_settled_by(done):
        return done, folder
    folder.mkdir(parents=True, exist_ok=True)
    prompts = make_endpoint_prompts(found, fingerprint=request.fingerprint, decoding=request.decoding)
    answers = {prompt.key: _answer(prompt.key, matched[prompt.sample.id]) for prompt in prompts}
    results = score_all(
        request,
        {task: prompts},
        out_dir=folder,
        preprocessing=ForeignSpec(tool=predictions.tool),
        baseline=baseline,
        checkpoint=model,
        step=None,
        answers=answers,
        console=console,
    )
    return results, folder


def _request(
    predictions: Predictions, *, task: str, model: str, config: EvalConfig, data_dir: Path, baseline: Path | None
) -> Request:
    loaded = find_task(task)
    folder = loaded.folder(config, data_dir)
    samples = subset(loaded.load(folder), config.max_samples)
    sha256 = file_sha256(predictions.path)
    return Request(
        # Stands for the weights, which a file of answers does not name.
        fingerprint=sha256,
        tasks=(loaded,),
        samples={task: samples},
        decoding=ImportedDecoding(tool=predictions.tool, file=predictions.path.name, sha256=sha256),
        data_sha256=data_fingerprint(loaded.files(folder)),
        judge=make_judge(config, measured=model, tasks=[loaded], device=_device()),
        config=config,
        baseline=read_results(baseline) if baseline is not None else None,
    )


def _answer(key: str, prediction: Prediction) -> Answer:
    """How many tokens it has and whether it was cut is not known."""
    return Answer(key, prediction.text, 0, "stop", prediction.failure)


def _device() -> torch.device:
    """Where a judge in this process runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-80:] or "answers"


def run(args: Sequence[str]) -> int:
    """`mirage rescore FILE task=NAME key=value ...`: score, print the table, exit code. Raises `UserError`."""
    own = {key: text for key, _, text in (item.partition("=") for item in args) if key in _OWN_SETTINGS}
    paths = [item for item in args if "=" not in item]
    settings = [item for item in args if "=" in item and item.partition("=")[0] not in _OWN_SETTINGS]
    if len(paths) != 1 or "task" not in own:
        raise UserError("rescore takes one FILE of answers and task=NAME; `mirage tasks` lists the names")
    config = load_section("eval", settings)
    assert isinstance(config, EvalConfig)
    path, console = Path(paths[0]).expanduser(), make_console(console_mode(own.get("console")))
    baseline = Path(own["baseline"]) if "baseline" in own else None
    predictions = read_predictions(path, repeated=_repeated(own.get("repeated", "refuse")))
    results, folder = rescore(
        predictions,
        task=own["task"],
        model=own.get("model", path.stem),
        config=config,
        data_dir=(config.data_dir or DataConfig().dir).expanduser().absolute(),
        out_dir=Path(own["out_dir"]) if "out_dir" in own else None,
        baseline=baseline,
        console=console,
    )
    show_results(console, results, file=folder / RESULTS_FILE, before=read_results(baseline) if baseline else None)
    (result,) = results.tasks.values()
    others = len(predictions.by_id) - (result.num_samples - _num_absent(result.unscored_reasons, path))
    if others > 0:
        console.say(f"{others} answers of {path.name} are to questions that {own['task']!r} does not ask")
    return 0


def _num_absent(reasons: dict[str, int], path: Path) -> int:
    return sum(count for reason, count in reasons.items() if f"{path.name} holds no answer" in reason)


def _repeated(text: str) -> Literal["refuse", "first", "last"]:
    known: dict[str, Literal["refuse", "first", "last"]] = {"refuse": "refuse", "first": "first", "last": "last"}
    if text not in known:
        raise UserError(f"repeated={text}: write repeated=first, repeated=last or repeated=refuse")
    return known[text]
