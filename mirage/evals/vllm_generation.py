"""Answers by vLLM's offline engine (`eval.engine=vllm`): training's own token ids, checked against what vLLM read.

Written after the sources of vLLM 0.30 (`LLM.generate`, `multimodal/processing/processor.py`, `models/qwen2_vl.py`,
`models/interns1.py`, which serves native InternVL). It takes a prompt as token ids with one placeholder a picture,
never tokenizes such a prompt again, and puts the picture's tokens in the placeholder's place; `LLM.chat` would render
the folder's template instead. Needs a machine that vLLM runs on: the tests here use a stand-in for it, not a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mirage.config.schema import EvalConfig
from mirage.errors import UserError
from mirage.evals.answers import Answer, AnswerStore
from mirage.evals.generate import OnAnswers, Prompt, answer_of, open_rgb
from mirage.models.adapter import ModelAdapter, image_order
from mirage.models.generic import processor_sha256
from mirage.models.registry import find_weights, known_family

# Prompts handed over together: vLLM batches them itself, and a kill loses no more than these.
CHUNK = 256


class VllmDecoding(BaseModel):
    """Everything besides weights, prompt and pictures that is asked of vLLM. Its batches are its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Literal["vllm"] = "vllm"
    version: str
    do_sample: Literal[False] = False
    max_new_tokens: int = Field(gt=0)
    dtype: str
    prompt: Literal["training"] = Field(default="training", description="rendered here as in training, no template")
    pictures: Literal["resized_as_trained", "processor"] = Field(description="who scales or cuts them")
    processor_sha256: str = Field(description="of the folder's processor files, which vLLM reads")

    @classmethod
    def of(cls, config: EvalConfig, checkpoint: Path, *, dtype: str) -> VllmDecoding:
        """As the settings ask for it. Raises `UserError` without vLLM, and for weights that it cannot be given."""
        version = import_vllm().__version__
        folder = find_weights(checkpoint)
        if (folder / "adapter_config.json").exists():
            raise UserError(f"{folder} is an adapter; for vLLM `mirage export {checkpoint} DST --merge`, evaluate DST")
        family = known_family(folder)
        if family is None:
            raise UserError(f"{folder}: MIRage renders no prompts of its kind; serve it with vLLM, use eval.endpoint")
        pictures: Any = "resized_as_trained" if family == "qwen2_vl" else "processor"
        limit, files = config.max_new_tokens, processor_sha256(folder)
        return cls(version=version, max_new_tokens=limit, dtype=dtype, pictures=pictures, processor_sha256=files)


def import_vllm() -> Any:
    """The vllm package. Raises `UserError` where it is missing or broken."""
    try:
        import vllm
    except ImportError as error:
        raise UserError(f"eval.engine=vllm needs vLLM ({error}): pip install 'mirage-vlm[vllm]'") from None
    return vllm


def generate_by_vllm(
    folder: Path,
    adapter: ModelAdapter,
    prompts: Sequence[Prompt],
    *,
    decoding: VllmDecoding,
    store: AnswerStore,
    on_answers: OnAnswers = lambda count, kept: None,
) -> None:
    """Answer greedily, into `store`, what is not there yet; vLLM is started only if something is missing.

    Raises `UserError` where vLLM cannot load the weights, and where the prompt that it read is not training's.
    """
    have = store.read()
    missing = list({prompt.key: prompt for prompt in prompts if prompt.key not in have}.values())
    on_answers(len({prompt.key for prompt in prompts}) - len(missing), True)
    if not missing:
        return
    vllm = import_vllm()
    try:
        llm = vllm.LLM(
            model=str(folder),
            dtype=decoding.dtype,
            seed=0,
            trust_remote_code=False,
            # Otherwise the folder's generation_config.json would be merged into the sampling.
            generation_config="vllm",
            limit_mm_per_prompt={"image": max(1, *(len(p.sample.image_paths) for p in missing)), "video": 0},
            mm_processor_kwargs=picture_settings(adapter, num_images=1),
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"vLLM {decoding.version} cannot load {folder}: {' '.join(str(error).split())[:300]}"
        ) from error
    # Stops where transformers is told to stop, and nowhere else; text is decoded here too.
    stops = {"stop_token_ids": adapter.stop_ids, "ignore_eos": True}
    params = vllm.SamplingParams(temperature=0.0, max_tokens=decoding.max_new_tokens, detokenize=False, **stops)
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        outputs = llm.generate([vllm_prompt(adapter, prompt) for prompt in chunk], params, use_tqdm=False)
        store.append([_answer(adapter, *pair, decoding) for pair in zip(chunk, outputs, strict=True)])
        on_answers(len(chunk), False)
    del llm
    gc.collect()


def picture_settings(adapter: ModelAdapter, *, num_images: int) -> dict[str, Any]:
    """The processor's settings for so many pictures. Raises `UserError` for what it has no setting for."""
    spec, settings = adapter.spec, adapter.resize_settings(num_images=num_images)
    if spec.family == "qwen2_vl":
        return {"size": {"shortest_edge": settings["min_pixels"], "longest_edge": settings["max_pixels"]}}
    if not spec.thumbnail and spec.max_tiles > 1:
        raise UserError("preprocessing.thumbnail=false: vLLM's processor adds thumbnails; use eval.engine=transformers")
    size = {"height": settings["tile_size"], "width": settings["tile_size"]}
    return {"crop_to_patches": True, "min_patches": 1, "max_patches": settings["max_tiles"], "size": size}


def vllm_prompt(adapter: ModelAdapter, prompt: Prompt) -> dict[str, Any]:
    """What `LLM.generate` takes: ids with one placeholder a picture, and the pictures in the prompt's order."""
    order = image_order(prompt.sample.messages)
    ids, image = list(prompt.input_ids), adapter.image_token_id
    ids = [token for place, token in enumerate(ids) if token != image or place == 0 or ids[place - 1] != image]
    if not order:
        return {"prompt_token_ids": ids}
    if adapter.family == "internvl":
        # vLLM writes <img> and </img> itself, around what it puts in the placeholder's place.
        marks = [place for place, token in enumerate(ids) if token == image]
        written = {place + step for place in marks for step in (-1, 1)}
        ids = [token for place, token in enumerate(ids) if place not in written]
    images = [open_rgb(prompt.sample, index) for index in order]
    if adapter.family == "qwen2_vl":
        # Already of the size that training gives them, which the processor's rule leaves as it is.
        images = [Image.fromarray(adapter.resize(image, num_images=len(order))[0].numpy()) for image in images]
    settings = picture_settings(adapter, num_images=len(order))
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}, "mm_processor_kwargs": settings}


def _answer(adapter: ModelAdapter, prompt: Prompt, output: Any, decoding: VllmDecoding) -> Answer:
    if list(output.prompt_token_ids) != prompt.input_ids:
        raise UserError(
            f"sample {prompt.sample.id}: vLLM {decoding.version} read another prompt than training's "
            f"({len(output.prompt_token_ids)} tokens, not {len(prompt.input_ids)}); use eval.engine=transformers"
        )
    (completion,) = output.outputs
    ids, ended = list(completion.token_ids), completion.finish_reason
    if ended not in ("stop", "length") or (ended == "length" and len(ids) < decoding.max_new_tokens):
        raise UserError(
            f"sample {prompt.sample.id}: vLLM ended the answer after {len(ids)} tokens ({ended}): the model's context "
            "is full; lower eval.max_new_tokens"
        )
    return replace(answer_of(adapter, prompt, ids), finish=ended)
