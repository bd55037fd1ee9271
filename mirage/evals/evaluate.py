"""Evaluate one checkpoint: load, generate on every rank, score on the first, write results.json."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from mirage.config.schema import EvalConfig
from mirage.errors import UserError
from mirage.evals.answers import Answer, AnswerStore
from mirage.evals.costs import say_judging, usage_kept
from mirage.evals.denominators import compare_restricted
from mirage.evals.endpoint_generation import ServerSpec
from mirage.evals.generate import (
    Decoding,
    OnAnswers,
    Prompt,
    collect_answers,
    generate_answers,
    make_prompts,
    plan_batches,
)
from mirage.evals.interchange.origin import ForeignSpec
from mirage.evals.judge import Scored, Verdict
from mirage.evals.judges.choose import judge_prompts, keep_verdicts
from mirage.evals.judges.model_judge import ModelJudge
from mirage.evals.metrics import TaskResult, compare_events
from mirage.evals.request import Request, decide_request
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
from mirage.evals.scoring import score_found
from mirage.evals.statistics.multiplicity import finish_comparison
from mirage.evals.task import Task
from mirage.evals.tasks.rows import GROUP_TAGS
from mirage.evals.vllm_generation import VllmDecoding, generate_by_vllm
from mirage.models import GenerationAdapter, load_model
from mirage.models.adapter import PreprocessingSpec, ProcessorSpec
from mirage.models.registry import find_weights, load_adapter
from mirage.tracking.console import Terminal, make_console
from mirage.tracking.progress import Progress, work_facts, work_table
from mirage.training.checkpoint import NAME

Result = TypeVar("Result")
# Of the about twenty lines that an evaluation may print.
_GENERATION_LINES, _JUDGING_LINES = 10, 5


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    config: EvalConfig,
    data_dir: Path,
    out_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    agree: Callable[[str | None], str | None] = lambda failure: failure,
    device: str | torch.device = "cpu",
    baseline: Path | None = None,
    step: int | None = None,
    console: Terminal | None = None,
) -> Results | None:
    """Measure a checkpoint (or any weights folder) on `config.tasks`; the results on rank 0, None on the others.

    Every rank answers its share of the samples into `out_dir`; rank 0 scores them all. The same call again continues
    a killed evaluation, and returns at once when it is complete. `baseline` is another evaluation's folder or
    results.json for paired tests. `agree` is a collective that gives all ranks the first failure of any, or None; every
    rank calls it twice, whatever happens, so that none waits for one that failed.

    Raises `UserError` for weights, data or settings it cannot use, and `EvaluationFailed` for another rank's failure.
    """
    device, data_dir = torch.device(device), data_dir.expanduser().absolute()
    shown = console if rank == 0 and console is not None else make_console("quiet")
    works: list[Progress] = []

    def answer() -> tuple[Request, dict[str, list[Prompt]], GenerationAdapter | None]:
        request = decide_request(checkpoint, config=config, data_dir=data_dir, device=device, baseline=baseline)
        done = finished_results(out_dir, request.key)
        if done is not None and request.is_settled_by(done):
            return request, {}, None
        store = AnswerStore(out_dir, rank=rank)
        ranks = {"rank": rank, "world_size": world_size}
        return request, *_generate(checkpoint, request, store, device=device, console=shown, works=works, **ranks)

    def score() -> Results | None:
        if rank != 0:
            return None
        if adapter is None:
            return finished_results(out_dir, request.key)
        return score_all(
            request,
            prompts,
            out_dir=out_dir,
            preprocessing=adapter.spec,
            baseline=baseline,
            checkpoint=checkpoint.name,
            step=step if step is not None else step_of(checkpoint),
            console=shown,
            works=works,
        )

    request, prompts, adapter = together(answer, agree)
    return together(score, agree)


class EvaluationFailed(UserError):
    """Another rank could not do its part; the text is what it met."""


def together(work: Callable[[], Result], agree: Callable[[str | None], str | None]) -> Result:
    """`work()`, unless any rank fails in it: then all raise, this rank its own error. One collective either way."""
    error: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    first = agree(None if error is None else describe_failure(error))
    if error is not None:
        raise error
    if first is not None:
        raise EvaluationFailed(first)
    return result  # type: ignore[return-value]


def describe_failure(error: Exception) -> str:
    """An error in one line, for another rank and for the evaluation's state."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def score_all(
    request: Request,
    prompts: dict[str, list[Prompt]],
    *,
    out_dir: Path,
    preprocessing: PreprocessingSpec | ProcessorSpec | ServerSpec | ForeignSpec,
    baseline: Path | None,
    checkpoint: str,
    step: int | None,
    answers: Mapping[str, Answer] | None = None,
    console: Terminal | None = None,
    works: Sequence[Progress] = (),
) -> Results:
    """Score `answers`, by default all ranks' stored ones; samples.jsonl and results.json are the last things written.

    The judge's verdicts are kept in `out_dir` and in the shared cache as they come, and what they cost in usage.jsonl.
    The console ends with a table of what took how long, `works` before the judging.
    """
    console = console or make_console("quiet")
    answers = AnswerStore(out_dir, rank=0).read() if answers is None else answers
    rows: list[dict[str, Any]] = []
    tasks: dict[str, TaskResult] = {}
    before = read_samples(_folder_of(baseline)) if baseline is not None else []
    asked = request.judge.endpoint if isinstance(request.judge, ModelJudge) else None
    with keep_verdicts(request.judge, out_dir), usage_kept(console, asked, out_dir, role="judge"):
        say_judging(console, request.judge, request.tasks, prompts, answers)
        total = sum(len(prompts[task.name]) for task in request.tasks)
        with console.progress("verdicts", total, unit="verdicts", num_lines=_JUDGING_LINES) as judging:
            for task in request.tasks:
                tasks[task.name], task_rows = _score(
                    task,
                    prompts[task.name],
                    answers,
                    before=before,
                    request=request,
                    on_verdict=partial(judging.advance, note=task.name, task=task.name),
                )
                rows += task_rows
    tasks, pooled = finish_comparison(tasks, general=request.config.select.general)
    write_samples(out_dir, rows)
    results = Results(
        request=request.key,
        checkpoint=checkpoint,
        step=step,
        fingerprint=request.fingerprint,
        judge=JudgeInfo(
            name=request.judge.name,
            version=request.judge.version,
            notice=request.judge.notice,
            prompts=dict(judge_prompts(request.judge, request.tasks)),
        ),
        decoding=request.decoding,
        preprocessing=preprocessing,
        max_samples=request.config.max_samples,
        data_sha256=request.data_sha256,
        baseline=_baseline_info(request.baseline),
        tasks=tasks,
        pooled=pooled,
    )
    write_results(out_dir, results)
    console.summary(work_table([*works, judging]), what="work", works=work_facts([*works, judging]))
    return results


def finished_results(out_dir: Path, key: str) -> Results | None:
    """The folder's results if they answer this very request."""
    if not (out_dir / RESULTS_FILE).is_file() or not (out_dir / SAMPLES_FILE).is_file():
        return None
    with contextlib.suppress(UserError):
        results = read_results(out_dir)
        return results if results.request == key else None
    return None


def _generate(
    checkpoint: Path,
    request: Request,
    store: AnswerStore,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    console: Terminal,
    works: list[Progress],
) -> tuple[dict[str, list[Prompt]], GenerationAdapter]:
    """The prompts by task, and the adapter that made them; `works` gets what it took."""
    decoding = request.decoding
    if isinstance(decoding, VllmDecoding):
        return _generate_by_vllm(checkpoint, request, decoding, store, console=console, works=works)
    assert isinstance(decoding, Decoding)
    model, adapter = load_model(
        checkpoint, attention="sdpa", dtype=getattr(torch, decoding.dtype), device=device, evaluation=True
    )
    model.set_attn_implementation(decoding.attention)
    if request.config.max_tiles is not None:
        adapter.set_tile_budget(request.config.max_tiles)
    prompts = {
        task.name: make_prompts(adapter, request.samples[task.name], fingerprint=request.fingerprint, decoding=decoding)
        for task in request.tasks
    }
    batches = [plan_batches(found, batch_size=decoding.batch_size) for found in prompts.values()]
    total = sum(len(batch) for found in batches for batch in found[rank::world_size])
    with answering(console, total) as work:
        for name, task_prompts in prompts.items():
            generate_answers(
                model,
                adapter,
                task_prompts,
                decoding=decoding,
                store=store,
                device=device,
                rank=rank,
                world_size=world_size,
                on_answers=counted(work, name),
            )
    works.append(work)
    return prompts, adapter


def _generate_by_vllm(
    checkpoint: Path,
    request: Request,
    decoding: VllmDecoding,
    store: AnswerStore,
    *,
    console: Terminal,
    works: list[Progress],
) -> tuple[dict[str, list[Prompt]], GenerationAdapter]:
    """All tasks' prompts together: vLLM is loaded once."""
    folder = find_weights(checkpoint)
    adapter = load_adapter(folder)
    if request.config.max_tiles is not None:
        adapter.set_tile_budget(request.config.max_tiles)
    prompts = {
        name: make_prompts(adapter, samples, fingerprint=request.fingerprint, decoding=decoding)
        for name, samples in request.samples.items()
    }
    together = [prompt for task_prompts in prompts.values() for prompt in task_prompts]
    with answering(console, len({prompt.key for prompt in together})) as work:
        generate_by_vllm(folder, adapter, together, decoding=decoding, store=store, on_answers=counted(work, "by vLLM"))
    works.append(work)
    return prompts, adapter


def answering(console: Terminal, total: int) -> Progress:
    """The progress of an evaluation's answers, whoever gives them."""
    return console.progress("answers", total, unit="answers", num_lines=_GENERATION_LINES)


def counted(work: Progress, name: str) -> OnAnswers:
    """Counts a task's answers."""
    return lambda count, kept: work.advance(count, kept=kept, note=name, task=name)


def _score(
    task: Task,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Answer],
    *,
    before: Sequence[dict[str, Any]],
    request: Request,
    on_verdict: Callable[[], None],
) -> tuple[TaskResult, list[dict[str, Any]]]:
    found = collect_answers(prompts, answers)
    samples = [prompt.sample for prompt in prompts]
    verdicts = score_found(task, samples, found, request.judge, on_verdict=on_verdict)
    old = {row["id"]: row for row in before if row["task"] == task.name}
    rows = [
        _sample_row(task, prompt, answer, verdict, old=old.get(prompt.sample.id))
        for prompt, answer, verdict in zip(prompts, found, verdicts, strict=True)
    ]
    result = task.aggregate(samples, verdicts, max_unscored=request.config.max_unscored)
    comparison = {}
    if old:
        names = [metric.name for metric in task.metrics]
        now, then = events_by_id(rows, task.name), events_by_id(before, task.name)
        by_key = dict(zip(now, samples, strict=True))
        clusters = {key: sample.cluster for key, sample in by_key.items()}
        comparison = compare_events(now, then, metrics=names, clusters=clusters)
        comparison |= compare_restricted(now, then, samples=by_key, metrics=names, counts=task.counts)
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
        "tags": {name: sample.meta[name] for name in GROUP_TAGS if name in sample.meta},
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


def step_of(checkpoint: Path) -> int | None:
    found = NAME.match(checkpoint.name)
    return int(found[1]) if found else None


def _folder_of(baseline: Path) -> Path:
    return baseline if baseline.is_dir() else baseline.parent


def _baseline_info(results: Results | None) -> BaselineInfo | None:
    return BaselineInfo(step=results.step, fingerprint=results.fingerprint) if results else None
