"""Evaluate one checkpoint: load, generate on every rank, score on the first, write results.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mirage.config.schema import EvalConfig
from mirage.data.row import canonical_json
from mirage.errors import UserError
from mirage.evals.answers import Answer, AnswerStore
from mirage.evals.generate import Decoding, Prompt, collect_answers, file_sha256, generate_answers, make_prompts
from mirage.evals.judge import Judge, Scored, Verdict
from mirage.evals.metrics import TaskResult, compare_events
from mirage.evals.results import (
    RESULTS_FILE,
    SAMPLES_FILE,
    BaselineInfo,
    JudgeInfo,
    Results,
    events_by_id,
    read_results,
    read_samples,
    write_results,
    write_samples,
)
from mirage.evals.rule_judge import RuleJudge
from mirage.evals.task import Sample, Task, score_answer
from mirage.evals.tasks import find_tasks
from mirage.models import ModelAdapter, load_model
from mirage.models.registry import find_weights
from mirage.training.checkpoint import NAME, READY, ready_checkpoints


@dataclass(frozen=True)
class _Request:
    """One evaluation, decided: what is measured, on what, how."""

    fingerprint: str
    tasks: tuple[Task, ...]
    samples: dict[str, list[Sample]]
    decoding: Decoding
    data_sha256: str
    judge: Judge
    config: EvalConfig
    baseline: Results | None

    @property
    def key(self) -> str:
        """Hash of everything the numbers depend on."""
        identity = {
            "weights": self.fingerprint,
            "data": self.data_sha256,
            "samples": {name: [sample.id for sample in samples] for name, samples in self.samples.items()},
            "decoding": self.decoding.model_dump(mode="json"),
            "max_tiles": self.config.max_tiles,
            "max_unscored": self.config.max_unscored,
            "judge": [self.judge.name, self.judge.version],
            "baseline": self.baseline.request if self.baseline else None,
        }
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    config: EvalConfig,
    data_dir: Path,
    out_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    device: str | torch.device = "cpu",
    baseline: Path | None = None,
    step: int | None = None,
    console: Console | None = None,
) -> Results | None:
    """Measure a checkpoint (or any weights folder) on `config.tasks`; the results on rank 0, None on the others.

    Every rank answers its share of the samples into `out_dir`; rank 0 scores them all. The same call again continues
    a killed evaluation, and returns at once when it is complete. `baseline` is another evaluation's folder or
    results.json for paired tests. Raises `UserError` for weights, data or settings it cannot use.
    """
    device, data_dir = torch.device(device), data_dir.expanduser().absolute()
    request = _decide(checkpoint, config=config, data_dir=data_dir, device=device, baseline=baseline)
    done = _finished(out_dir, request.key)
    if done is not None:
        return done if rank == 0 else None
    store = AnswerStore(out_dir, rank=rank)
    prompts, adapter = _generate(
        checkpoint,
        request,
        store,
        device=device,
        rank=rank,
        world_size=world_size,
        console=console if rank == 0 else None,
    )
    barrier()
    if rank != 0:
        return None
    answers = store.read()
    rows: list[dict[str, Any]] = []
    tasks: dict[str, TaskResult] = {}
    before = read_samples(_folder_of(baseline)) if baseline is not None else []
    for task in request.tasks:
        tasks[task.name], task_rows = _score(task, prompts[task.name], answers, before=before, request=request)
        rows += task_rows
    write_samples(out_dir, rows)
    results = Results(
        request=request.key,
        checkpoint=checkpoint.name,
        step=step if step is not None else _step_of(checkpoint),
        fingerprint=request.fingerprint,
        judge=JudgeInfo(name=request.judge.name, version=request.judge.version, notice=request.judge.notice),
        decoding=request.decoding,
        preprocessing=adapter.spec,
        max_samples=config.max_samples,
        data_sha256=request.data_sha256,
        baseline=_baseline_info(request.baseline),
        tasks=tasks,
    )
    write_results(out_dir, results)
    return results


def _decide(
    checkpoint: Path, *, config: EvalConfig, data_dir: Path, device: torch.device, baseline: Path | None
) -> _Request:
    tasks = find_tasks(config.tasks)
    samples = {task.name: task.load(data_dir) for task in tasks}
    data_sha256 = _data_sha256(data_dir)
    judge = make_judge(config.judge)
    samples = {name: _subset(found, config.max_samples) for name, found in samples.items()}
    decoding = Decoding(
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        attention="sdpa",
    )
    return _Request(
        fingerprint=weights_fingerprint(checkpoint),
        tasks=tuple(tasks),
        samples=samples,
        decoding=decoding,
        data_sha256=data_sha256,
        judge=judge,
        config=config,
        baseline=read_results(baseline) if baseline is not None else None,
    )


def make_judge(name: str) -> Judge:
    """The judge of `eval.judge`."""
    if name != "rule":
        raise UserError(f"eval.judge: there is no judge {name!r}; use 'rule'")
    return RuleJudge()


def _subset(samples: list[Sample], max_samples: int | None) -> list[Sample]:
    """The same samples at each checkpoint: those whose hashed ids come first, in their old order."""
    if max_samples is None or len(samples) <= max_samples:
        return samples
    chosen = sorted(samples, key=lambda sample: hashlib.sha256(sample.id.encode()).hexdigest())[:max_samples]
    ids = {sample.id for sample in chosen}
    return [sample for sample in samples if sample.id in ids]


def _data_sha256(data_dir: Path) -> str:
    """Hash of the files that define the samples (rows name their images by hash)."""
    rows = data_dir / "rows.jsonl"
    files = [rows] if rows.is_file() else sorted([*data_dir.glob("mis_*.json"), *data_dir.glob("mis_test/mis_*.json")])
    return hashlib.sha256(canonical_json([[path.name, file_sha256(path)] for path in files]).encode()).hexdigest()


def weights_fingerprint(checkpoint: Path) -> str:
    """Identity of the weights: READY's fingerprint, else a sha256 over the folder's safetensors and JSON files.

    Raises `UserError` for a checkpoint folder that was never completed or holds no weights.
    """
    if (checkpoint / READY).is_file():
        try:
            return str(json.loads((checkpoint / READY).read_text(encoding="utf-8"))["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{checkpoint / READY} names no fingerprint; the checkpoint is damaged") from error
    if NAME.match(checkpoint.name) and checkpoint.is_dir():
        raise UserError(f"{checkpoint} has no {READY}: it was never finished; start the run again to write it anew")
    folder = find_weights(checkpoint)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    return hashlib.sha256(canonical_json([[path.name, file_sha256(path)] for path in files]).encode()).hexdigest()


def _finished(out_dir: Path, key: str) -> Results | None:
    """The folder's results if they answer this very request."""
    if not (out_dir / RESULTS_FILE).is_file() or not (out_dir / SAMPLES_FILE).is_file():
        return None
    with contextlib.suppress(UserError):
        results = read_results(out_dir)
        return results if results.request == key else None
    return None


def _generate(
    checkpoint: Path,
    request: _Request,
    store: AnswerStore,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    console: Console | None,
) -> tuple[dict[str, list[Prompt]], ModelAdapter]:
    model, adapter = load_model(
        checkpoint, attention="sdpa", dtype=getattr(torch, request.decoding.dtype), device=device
    )
    model.set_attn_implementation(request.decoding.attention)
    if request.config.max_tiles is not None:
        adapter.spec = adapter.spec.model_copy(update={"max_tiles": request.config.max_tiles})
    prompts = {
        task.name: make_prompts(
            adapter, request.samples[task.name], fingerprint=request.fingerprint, decoding=request.decoding
        )
        for task in request.tasks
    }
    for name, task_prompts in prompts.items():
        with _progress(console, name) as on_batch:
            generate_answers(
                model,
                adapter,
                task_prompts,
                decoding=request.decoding,
                store=store,
                device=device,
                rank=rank,
                world_size=world_size,
                on_batch=on_batch,
            )
    return prompts, adapter


@contextlib.contextmanager
def _progress(console: Console | None, task: str) -> Any:
    if console is None or not console.is_terminal:
        yield lambda done, total: None
        return
    with console.status(f"evaluating {task}") as status:
        yield lambda done, total: status.update(f"evaluating {task}: batch {done} of {total}")


def _score(
    task: Task,
    prompts: Sequence[Prompt],
    answers: dict[str, Answer],
    *,
    before: Sequence[dict[str, Any]],
    request: _Request,
) -> tuple[TaskResult, list[dict[str, Any]]]:
    found = collect_answers(prompts, answers)
    verdicts = [
        score_answer(task, prompt.sample, answer.text, request.judge)
        for prompt, answer in zip(prompts, found, strict=True)
    ]
    old = {row["id"]: row for row in before if row["task"] == task.name}
    rows = [
        _sample_row(task, prompt, answer, verdict, old=old.get(prompt.sample.id))
        for prompt, answer, verdict in zip(prompts, found, verdicts, strict=True)
    ]
    result = task.aggregate([prompt.sample for prompt in prompts], verdicts, max_unscored=request.config.max_unscored)
    comparison = {}
    if old:
        names = [metric.name for metric in task.metrics]
        comparison = compare_events(events_by_id(rows, task.name), events_by_id(before, task.name), metrics=names)
    cut = sum(answer.finish == "length" for answer in found)
    return result.model_copy(update={"num_truncated": cut, "comparison": comparison}), rows


def _sample_row(
    task: Task, prompt: Prompt, answer: Answer, verdict: Verdict, *, old: dict[str, Any] | None
) -> dict[str, Any]:
    """One line of samples.jsonl. `changed` is 'old -> new' where the verdict differs from the baseline's, else ''."""
    sample = prompt.sample
    label = verdict.label if isinstance(verdict, Scored) else "unscored"
    return {
        "id": sample.id,
        "task": task.name,
        "category": sample.category,
        "sub_category": sample.sub_category,
        "cluster": sample.cluster,
        "image_paths": [str(path) for path in sample.image_paths],
        "question": sample.question,
        "answer": answer.text,
        "num_tokens": answer.num_tokens,
        "finish": answer.finish,
        "verdict": label,
        "events": list(verdict.events) if isinstance(verdict, Scored) else None,
        "reason": verdict.reason,
        "details": dict(verdict.details) if isinstance(verdict, Scored) else {},
        "changed": f"{old['verdict']} -> {label}" if old is not None and old["verdict"] != label else "",
        "prompt_sha256": hashlib.sha256(prompt.text.encode()).hexdigest(),
        "key": answer.key,
    }


def _step_of(checkpoint: Path) -> int | None:
    found = NAME.match(checkpoint.name)
    return int(found[1]) if found else None


def _folder_of(baseline: Path) -> Path:
    return baseline if baseline.is_dir() else baseline.parent


def _baseline_info(results: Results | None) -> BaselineInfo | None:
    return BaselineInfo(step=results.step, fingerprint=results.fingerprint) if results else None


def run(
    path: Path,
    *,
    config: EvalConfig,
    data_dir: Path,
    out_dir: Path | None = None,
    baseline: Path | None = None,
    device: str | torch.device | None = None,
    console: Console | None = None,
) -> Results:
    """`mirage evaluate PATH`: a checkpoint, a run folder (its newest checkpoint) or any weights folder, in one process.

    Results go to `out_dir`; by default to the run's `evals/step-NNNNNN` if the path lies in a run and nothing else is
    there, else to a folder beside it named after the settings. `baseline` defaults to the run's step 0.
    Raises `UserError` for a path without weights, and for data or settings it cannot use.
    """
    path = path.expanduser().absolute()
    checkpoint = _newest_checkpoint(path) or path
    run_dir = checkpoint.parent if NAME.match(checkpoint.name) else None
    first = run_dir / "evals" / "step-000000" if run_dir is not None else None
    if baseline is None and first is not None and (first / RESULTS_FILE).is_file() and _step_of(checkpoint) != 0:
        baseline = first
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if out_dir is None:
        key = _decide(checkpoint, config=config, data_dir=data_dir.absolute(), device=chosen, baseline=baseline).key
        out_dir = _default_out_dir(checkpoint, run_dir, key)
    results = evaluate_checkpoint(
        checkpoint,
        config=config,
        data_dir=data_dir,
        out_dir=out_dir,
        device=chosen,
        baseline=baseline,
        console=console,
    )
    assert results is not None
    return results


def _newest_checkpoint(path: Path) -> Path | None:
    found = ready_checkpoints(path) if path.is_dir() else []
    return found[-1] if found else None


def _default_out_dir(checkpoint: Path, run_dir: Path | None, key: str) -> Path:
    """The run's own folder for this step unless an evaluation with other settings lies there."""
    if run_dir is None:
        return checkpoint.parent / f"{checkpoint.name}-evals" / key[:12]
    usual = run_dir / "evals" / f"step-{_step_of(checkpoint):06d}"
    if not usual.exists() or _finished(usual, key) is not None:
        return usual
    return run_dir / "evals" / f"other-{checkpoint.name}-{key[:12]}"
