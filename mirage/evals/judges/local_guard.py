"""A guard model in this process: a folder of weights, asked one answer at a time through its own chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mirage.data.picture_files import open_picture
from mirage.data.row import ImagePart, Message, TextPart
from mirage.endpoint.messages import PictureInput
from mirage.errors import UserError
from mirage.evals.judges.guard_formats import WILDGUARD_CHAT, GuardFormat, Turns
from mirage.evals.judges.guard_judge import MAX_TOKENS
from mirage.evals.judges.verdict_cache import Said
from mirage.models.adapter import GenerationAdapter, Question
from mirage.models.generic import is_known
from mirage.models.registry import find_weights, load_model
from mirage.models.template_trial import try_template
from mirage.strict_json import read_json_object


class LocalGuard:
    """Greedy, one answer at a time: no padding changes a verdict. Loads the weights at the first question.

    Text models (Llama Guard 3 8B and 1B, WildGuard) and image-text models (Llama Guard 4, Llama Guard 3 Vision) that
    transformers has classes for; safetensors only, no remote code. Raises `UserError` for a folder that is none.
    """

    def __init__(self, folder: Path, form: GuardFormat, *, fingerprint: str, device: torch.device) -> None:
        self.folder = find_weights(folder)
        self.model_type = str(read_json_object(self.folder / "config.json", any_number=True).get("model_type"))
        if not is_known(self.model_type) and self.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise UserError(f"{self.folder}: transformers has no text or image-text class for {self.model_type!r}")
        self.sees_pictures = is_known(self.model_type)
        self.name = folder.name
        self.num_waiting = 1
        self._form = form
        self._fingerprint = fingerprint
        self._device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._model: Any = None
        self._adapter: GenerationAdapter | None = None
        self._tokenizer: Any = None

    def identity(self) -> dict[str, Any]:
        """Weights by their fingerprint, number format, and transformers' version."""
        return {"weights": self._fingerprint, "dtype": str(self._dtype), "transformers": transformers.__version__}

    async def say(self, turns: Turns, pictures: Sequence[PictureInput]) -> Said:
        """The guard's words; a reply that is cut at `MAX_TOKENS` is a failure of the class 'schema'."""
        return await asyncio.to_thread(self._say, turns, pictures)

    async def aclose(self) -> None:
        """Nothing is open."""

    @torch.inference_mode()
    def _say(self, turns: Turns, pictures: Sequence[PictureInput]) -> Said:
        if self._model is None:
            self._load()
        inputs = self._inputs(turns, pictures)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        output = self._model.generate(**inputs)[0, num_prompt_tokens:].tolist()
        ends = set(self._model.generation_config.eos_token_id)
        if not ends & set(output):
            return Said("schema", f"the guard's reply was cut at {MAX_TOKENS} tokens")
        kept = output[: next(position for position, token in enumerate(output) if token in ends)]
        return Said("reply", self._tokenizer.decode(kept, skip_special_tokens=True).strip())

    def _load(self) -> None:
        if self.sees_pictures:
            self._model, self._adapter = load_model(
                self.folder, attention="sdpa", dtype=self._dtype, device=self._device, evaluation=True
            )
            self._tokenizer, ends = self._adapter.tokenizer, self._adapter.stop_ids
        else:
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=self._dtype, use_safetensors=True, local_files_only=True
            )
            self._model = model.to(self._device).eval()
            ends = _ids(self._model.generation_config.eos_token_id) + _ids(self._tokenizer.eos_token_id)
        if self._form == "llama_guard" and self._adapter is None and self._tokenizer.chat_template is None:
            raise UserError(f"{self.folder} holds no chat template; Llama Guard's task and hazards are in it")
        if self._adapter is None and self._tokenizer.chat_template is not None:
            chat = [{"role": "user", "content": "What is this?"}]
            try_template(lambda: self._tokenizer.apply_chat_template(chat, tokenize=False), str(self.folder))
        self._model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=sorted(set(ends)),
            pad_token_id=min(ends),
            use_cache=True,
        )

    def _inputs(self, turns: Turns, pictures: Sequence[PictureInput]) -> dict[str, torch.Tensor]:
        if self._adapter is not None:
            inputs = self._adapter.generation_inputs([_question(self._adapter, turns, pictures)])
        elif self._form == "wildguard":
            text = WILDGUARD_CHAT.format(text=turns[0][1])
            inputs = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            chat = [{"role": role, "content": text} for role, text in turns]
            inputs = self._tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        return {name: self._place(tensor) for name, tensor in inputs.items() if name != "token_type_ids"}

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype) if tensor.is_floating_point() else tensor.to(self._device)


def _question(adapter: GenerationAdapter, turns: Turns, pictures: Sequence[PictureInput]) -> Question:
    """The turns as messages, the pictures at the head of the first."""
    messages: list[Message] = []
    for role, text in turns:
        marks = tuple(ImagePart(index=index) for index in range(len(pictures))) if not messages else ()
        messages.append(Message.model_validate({"role": role, "content": (*marks, TextPart(text=text))}))
    images = [open_picture(None, content=picture.content) for picture in pictures]
    return Question(messages, images, adapter.prompt(messages, [image.size for image in images]).input_ids)


def _ids(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
