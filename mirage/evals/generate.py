"""Greedy, batched answers of a model: the same prompt bytes as training, the same answers whatever the world size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from transformers import GenerationConfig

from mirage.data.picture_files import open_picture, picture_size
from mirage.data.row import canonical_json
from mirage.errors import UserError
from mirage.evals.answers import Answer, AnswerStore
from mirage.evals.task import Sample
from mirage.files import file_sha256
from mirage.models.adapter import GenerationAdapter, Question

# Called with so many more answers, and whether they were there from an earlier run.
OnAnswers = Callable[[int, bool], None]


class Decoding(BaseModel):
    """Everything besides weights, prompt and pictures that an answer depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    do_sample: Literal[False] = False
    max_new_tokens: int = Field(gt=0)
    # Part of the identity: padding changes the last bits of floating-point sums.
    batch_size: int = Field(gt=0)
    dtype: str
    attention: Literal["sdpa", "eager"]


@dataclass(frozen=True)
class Prompt:
    """A sample ready for the model; `input_ids` are on the CPU, pictures are read when its batch comes."""

    sample: Sample
    input_ids: list[int]
    text: str
    key: str


def make_prompts(
    adapter: GenerationAdapter, samples: Sequence[Sample], *, fingerprint: str, decoding: BaseModel
) -> list[Prompt]:
    """Render the samples as training does. Pictures' sizes are read, their pixels are not.

    `fingerprint` names the weights. An answer's key is the sha256 of weights, prompt text, pictures, decoding and
    preprocessing: nothing else can change it.
    """
    identity = [fingerprint, decoding.model_dump(mode="json"), adapter.spec.model_dump(mode="json")]
    return [_make_prompt(adapter, sample, identity) for sample in samples]


def _make_prompt(adapter: GenerationAdapter, sample: Sample, identity: list[Any]) -> Prompt:
    try:
        sizes = [picture_size(path) for path in sample.image_paths]
    except UserError as error:
        raise UserError(f"sample {sample.id}: {error}") from error
    rendered = adapter.prompt(sample.messages, sizes)
    known = sample.image_sha256 or (None,) * len(sizes)
    hashes = [digest or file_sha256(path) for digest, path in zip(known, sample.image_paths, strict=True)]
    key = hashlib.sha256(canonical_json([*identity, rendered.text, hashes]).encode()).hexdigest()
    return Prompt(sample, rendered.input_ids, rendered.text, key)


def plan_batches(prompts: Sequence[Prompt], *, batch_size: int) -> list[list[Prompt]]:
    """Cut the prompts into batches by (has pictures, length, id): a function of the samples alone, not of the ranks."""
    ordered = sorted(
        prompts, key=lambda prompt: (bool(prompt.sample.image_paths), len(prompt.input_ids), prompt.sample.id)
    )
    batches: list[list[Prompt]] = []
    for with_pictures in (False, True):
        group = [prompt for prompt in ordered if bool(prompt.sample.image_paths) is with_pictures]
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches


def generate_answers(
    model: Any,
    adapter: GenerationAdapter,
    prompts: Sequence[Prompt],
    *,
    decoding: Decoding,
    store: AnswerStore,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    on_answers: OnAnswers = lambda count, kept: None,
) -> None:
    """Answer this rank's batches into `store`; a batch whose answers are all there is not generated again.

    Batch b belongs to rank b % world_size. A partly answered batch is generated whole: resuming changes nothing.
    `on_answers` hears of this rank's answers, batch by batch.
    """
    have = store.read()
    for batch in plan_batches(prompts, batch_size=decoding.batch_size)[rank::world_size]:
        missing = [prompt.key for prompt in batch if prompt.key not in have]
        if missing:
            answers = generate_batch(model, adapter, batch, decoding=decoding, device=device)
            fresh = {answer.key: answer for answer in answers if answer.key in missing}
            store.append(fresh.values())
            have |= fresh
        on_answers(len(batch), not missing)


@torch.inference_mode()
def generate_batch(
    model: Any, adapter: GenerationAdapter, batch: Sequence[Prompt], *, decoding: Decoding, device: torch.device
) -> list[Answer]:
    """Greedy answers of one batch, in its order.

    Prompts are padded on the left with an attention mask [B, L]; the model must run SDPA or eager attention, because
    packed-row attention takes no mask.
    """
    inputs = _batch_inputs(model, adapter, batch, device=device)
    length = inputs["input_ids"].shape[1]
    # Replaces the checkpoint's own generation_config.json, whose penalties or temperatures would be merged in.
    model.generation_config = _greedy(adapter, decoding)
    output = model.generate(**inputs)[:, length:].tolist()
    return [answer_of(adapter, prompt, ids) for prompt, ids in zip(batch, output, strict=True)]


def _greedy(adapter: GenerationAdapter, decoding: Decoding) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=adapter.stop_ids,
        pad_token_id=adapter.pad_id,
        use_cache=True,
    )


def _batch_inputs(
    model: Any, adapter: GenerationAdapter, batch: Sequence[Prompt], *, device: torch.device
) -> dict[str, torch.Tensor]:
    questions = [
        Question(
            prompt.sample.messages,
            [open_rgb(prompt.sample, index) for index in range(len(prompt.sample.image_paths))],
            prompt.input_ids,
        )
        for prompt in batch
    ]
    inputs = adapter.generation_inputs(questions)
    return {name: _place(tensor, model, device) for name, tensor in inputs.items()}


def _place(tensor: torch.Tensor, model: Any, device: torch.device) -> torch.Tensor:
    return tensor.to(device, model.dtype) if tensor.is_floating_point() else tensor.to(device)


def open_rgb(sample: Sample, index: int) -> Image.Image:
    """Image `index` of the sample. Raises `UserError` where it is not the file that the row names."""
    path = sample.image_paths[index]
    expected = sample.image_sha256[index] if sample.image_sha256 else None
    if expected is not None and file_sha256(path) != expected:
        raise UserError(f"{path}: sample {sample.id}: the file is not the one its row names (sha256 differs)")
    return open_picture(path)


def answer_of(adapter: GenerationAdapter, prompt: Prompt, ids: Sequence[int]) -> Answer:
    """The answer in the generated ids, up to the first that ends one."""
    stops = [position for position, token in enumerate(ids) if token in adapter.stop_ids]
    kept = list(ids[: stops[0]]) if stops else list(ids)
    text = adapter.tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Answer(prompt.key, text, len(kept), "stop" if stops else "length")


def collect_answers(prompts: Sequence[Prompt], answers: Mapping[str, Answer]) -> list[Answer]:
    """The prompts' answers in their order. Raises `UserError` if one is missing (a rank died before writing it)."""
    missing = [prompt.sample.id for prompt in prompts if prompt.key not in answers]
    if missing:
        raise UserError(f"{len(missing)} answers are missing (first: sample {missing[0]}); run the evaluation again")
    return [answers[prompt.key] for prompt in prompts]
