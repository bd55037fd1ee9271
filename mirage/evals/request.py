"""An evaluation, decided before it runs: which samples, weights, settings and judge; its key names them all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from mirage.config.schema import EvalConfig
from mirage.data.row import canonical_json
from mirage.errors import UserError
from mirage.evals.endpoint_generation import EndpointDecoding, endpoint_fingerprint
from mirage.evals.generate import Decoding
from mirage.evals.interchange.origin import ImportedDecoding
from mirage.evals.judge import Judge
from mirage.evals.judges.choose import judge_prompts, make_judge
from mirage.evals.judges.verdict_cache import TRANSIENT
from mirage.evals.results import Results, read_results
from mirage.evals.task import Sample, Task
from mirage.evals.tasks import find_tasks
from mirage.evals.vllm_generation import VllmDecoding
from mirage.files import file_sha256
from mirage.models.registry import find_weights
from mirage.strict_json import read_json_object
from mirage.training.checkpoint import NAME, READY


@dataclass(frozen=True)
class Request:
    """One evaluation, decided: what is measured, on what, how."""

    fingerprint: str
    tasks: tuple[Task, ...]
    samples: dict[str, list[Sample]]
    decoding: Decoding | EndpointDecoding | ImportedDecoding | VllmDecoding
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
            "judge": self._judge_identity(),
            "baseline": self.baseline.request if self.baseline else None,
        }
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()

    def _judge_identity(self) -> list[Any]:
        prompts = judge_prompts(self.judge, self.tasks)
        return [self.judge.name, self.judge.version, *([dict(prompts)] if prompts else [])]

    def is_settled_by(self, results: Results) -> bool:
        """Whether results of this request need no further call: no verdict is missing that another try may bring."""
        retried = (TRANSIENT, *self.config.ask_again)
        reasons = [reason for result in results.tasks.values() for reason in result.unscored_reasons]
        return not any(f"{kind}: " in reason for reason in reasons for kind in retried)


def decide_request(
    checkpoint: Path | None, *, config: EvalConfig, data_dir: Path, device: torch.device, baseline: Path | None
) -> Request:
    """Load the samples and name everything the numbers will depend on. Raises `UserError` for what cannot be used.

    `checkpoint` None: the model under test is behind `config.endpoint`.
    """
    tasks, folders, samples = _load_tasks(config, data_dir)
    data_sha256 = data_fingerprint([file for task in tasks for file in task.files(folders[task.name])])
    measured, fingerprint, decoding = _measured(checkpoint, config, device)
    judge = make_judge(config, measured=measured, tasks=tasks, device=device)
    samples = {name: subset(found, config.max_samples) for name, found in samples.items()}
    before = read_results(baseline) if baseline is not None else None
    _check_engines(before, decoding)
    return Request(
        fingerprint=fingerprint,
        tasks=tuple(tasks),
        samples=samples,
        decoding=decoding,
        data_sha256=data_sha256,
        judge=judge,
        config=config,
        baseline=before,
    )


def check_evaluation(config: EvalConfig, *, run_dir: Path, data_dir: Path, device: torch.device) -> None:
    """Raise `UserError` for what would make every evaluation of a run fail: its tasks, their data, its judge."""
    if config.endpoint is not None:
        raise UserError("eval.endpoint asks a server, and a run measures its own checkpoints; leave it out")
    if config.engine != "transformers":
        raise UserError(f"eval.engine={config.engine} is for `mirage evaluate`; a run measures with transformers")
    tasks, _, _ = _load_tasks(config, data_dir)
    make_judge(config, measured=str(run_dir), tasks=tasks, device=device)


def _load_tasks(config: EvalConfig, data_dir: Path) -> tuple[list[Task], dict[str, Path], dict[str, list[Sample]]]:
    """The tasks, and by name the folder of each and its samples."""
    tasks = find_tasks(config.tasks)
    folders = {task.name: task.folder(config, data_dir) for task in tasks}
    return tasks, folders, {task.name: task.load(folders[task.name]) for task in tasks}


def _measured(
    checkpoint: Path | None, config: EvalConfig, device: torch.device
) -> tuple[str, str, Decoding | EndpointDecoding | VllmDecoding]:
    """The model under test: its name, its fingerprint, and how it is decoded."""
    if checkpoint is not None and config.endpoint is not None:
        raise UserError(f"eval.endpoint asks a server and {checkpoint} is a folder; measure one of them")
    if checkpoint is None:
        assert config.endpoint is not None
        return config.endpoint.model, endpoint_fingerprint(config.endpoint), EndpointDecoding.of(config)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    if config.engine == "vllm":
        return str(checkpoint), weights_fingerprint(checkpoint), VllmDecoding.of(config, checkpoint, dtype=dtype)
    decoding = Decoding(
        max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, dtype=dtype, attention="sdpa"
    )
    return str(checkpoint), weights_fingerprint(checkpoint), decoding


def _check_engines(baseline: Results | None, decoding: BaseModel) -> None:
    """Prompts of the two engines are equal and would be paired, and their kernels are not."""
    if baseline is not None and isinstance(baseline.decoding, VllmDecoding) != isinstance(decoding, VllmDecoding):
        raise UserError(
            "the baseline's answers and these are of two engines (eval.engine): the difference would be vLLM's as much "
            "as the model's; measure both with one engine"
        )


def subset(samples: list[Sample], max_samples: int | None) -> list[Sample]:
    """The same samples at each checkpoint: those whose hashed ids come first, in their old order.

    Samples of one group (`meta["group"]`: rotations of a question, a pair) come together or not at all.
    """
    if max_samples is None or len(samples) <= max_samples:
        return samples
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.meta.get("group", sample.id), []).append(sample)
    ids: set[str] = set()
    for _, group in sorted(groups.items(), key=lambda item: hashlib.sha256(item[0].encode()).hexdigest()):
        if len(ids) + len(group) <= max_samples:
            ids |= {sample.id for sample in group}
    return [sample for sample in samples if sample.id in ids]


def data_fingerprint(files: Sequence[Path]) -> str:
    """Hash of the files that define the samples (pictures are hashed one by one)."""
    return hashlib.sha256(
        canonical_json([[path.name, file_sha256(path)] for path in sorted(set(files))]).encode()
    ).hexdigest()


def weights_fingerprint(checkpoint: Path) -> str:
    """Identity of the weights: READY's fingerprint, else a sha256 over the folder's safetensors and JSON files.

    Raises `UserError` for a checkpoint folder that was never completed or holds no weights.
    """
    if (checkpoint / READY).is_file():
        found = read_json_object(checkpoint / READY, remedy="the checkpoint is damaged").get("fingerprint")
        if not isinstance(found, str):
            raise UserError(f"{checkpoint / READY} names no fingerprint; the checkpoint is damaged")
        return found
    if NAME.match(checkpoint.name) and checkpoint.is_dir():
        raise UserError(f"{checkpoint} has no {READY}: it was never finished; start the run again to write it anew")
    folder = find_weights(checkpoint)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    return hashlib.sha256(canonical_json([[path.name, file_sha256(path)] for path in files]).encode()).hexdigest()
