"""Any image-text model that transformers knows, asked through its own processor and chat template: evaluation only."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from mirage.data.row import ImagePart, Message, canonical_json
from mirage.errors import UserError
from mirage.models.adapter import IGNORE_INDEX, GenerationAdapter, ProcessorSpec, Question, RenderedText, image_order
from mirage.models.strict_loading import ONE_LOAD
from mirage.models.template_trial import try_template
from mirage.strict_json import read_json_object

# What decides how a processor asks; a change of any is another way to ask.
PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

_SHORT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def is_known(model_type: str) -> bool:
    """Whether transformers has an image-text class of its own for `model_type`; no remote code is ever run."""
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


class GenericAdapter(GenerationAdapter):
    """A model's own processor behind evaluation's protocol.

    The prompt's text is the chat template's, with one placeholder an image: the processor expands them when the
    pictures are there, so `RenderedText.input_ids` are shorter than what the model reads and only order the batches.
    """

    family = "generic"

    def __init__(self, folder: Path, config: Any) -> None:
        self.config = config
        self.processor = load_processor(folder, config.model_type)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        self._stop_ids = _stop_ids(folder, config, self.tokenizer)
        self.spec = ProcessorSpec(model_type=config.model_type, processor_sha256=processor_sha256(folder))

    def prompt(self, messages: Sequence[Message], sizes: Sequence[tuple[int, int]]) -> RenderedText:
        marks = image_order(messages)
        if sorted(marks) != list(range(len(sizes))):
            raise UserError(f"the messages mark images {marks} and the sample has {len(sizes)}")
        text = self.processor.apply_chat_template(_conversation(messages, None), add_generation_prompt=True)
        input_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return RenderedText(input_ids, [IGNORE_INDEX] * len(input_ids), text)

    def generation_inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        inputs = self.processor.apply_chat_template(
            [_conversation(question.messages, question.images) for question in questions],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}

    def set_tile_budget(self, max_tiles: int) -> None:
        raise UserError(
            f"eval.max_tiles={max_tiles} has no effect on a {self.config.model_type} model, which MIRage asks through "
            "its own processor; leave eval.max_tiles out"
        )

    @property
    def stop_ids(self) -> list[int]:
        return self._stop_ids

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id


def load_generic(
    folder: Path, *, config: Any, dtype: torch.dtype, device: str | torch.device
) -> tuple[Any, GenericAdapter]:
    """(model, adapter) of a folder whose `model_type` is in transformers' image-text mapping; for evaluation.

    Raises `UserError` for a model that cannot be asked this way.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{folder}: a {config.model_type} model has an encoder and a decoder; MIRage evaluates decoder-only chat "
            "models in process"
        )
    adapter = GenericAdapter(folder, config)
    try:
        with ONE_LOAD:
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
            )
    except (ValueError, ImportError, OSError) as error:
        raise UserError(
            f"{folder}: transformers cannot load this {config.model_type} model: {_reason(error)}"
        ) from error
    return model.to(device).eval(), adapter


def load_processor(folder: Path, model_type: str) -> Any:
    """The folder's own processor, with its chat template. Raises `UserError` where there is none.

    Combined processors that also take videos need torchvision for that alone; without it they are built from their
    image processor and tokenizer, and the video part is left empty.
    """
    name = _processor_name(folder, model_type)
    processor_class = getattr(transformers, name or "", None)
    if processor_class is None:
        raise UserError(f"{folder}: transformers has no processor for {model_type!r}; ask it through a server")
    try:
        if not is_torchvision_available() and "video_processor" in processor_class.get_attributes():
            processor = _without_video(processor_class, folder)
        else:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"{folder}: its {name} cannot be built: {_reason(error)}") from error
    if getattr(processor, "chat_template", None) is None:
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise UserError(
            f"{folder} holds no chat template (chat_template.jinja); MIRage cannot ask the model without one"
        )
    try_template(lambda: processor.apply_chat_template(_SHORT, add_generation_prompt=True), str(folder))
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


class _NoVideo:
    """Lets a combined processor have no video part."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]


def _without_video(processor_class: Any, folder: Path) -> Any:
    settings, _ = processor_class.get_processor_dict(folder, local_files_only=True)
    accepted = inspect.signature(processor_class.__init__).parameters
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, local_files_only=True),
        "tokenizer": AutoTokenizer.from_pretrained(folder, local_files_only=True),
        "video_processor": None,
    }
    rest = {key: value for key, value in settings.items() if key in accepted and key not in parts}
    return type(processor_class.__name__, (_NoVideo, processor_class), {})(**parts, **rest)


def _processor_name(folder: Path, model_type: str) -> str | None:
    for file in ("processor_config.json", "preprocessor_config.json"):
        if (folder / file).is_file():
            name = read_json_object(folder / file, remedy="fetch it again", any_number=True).get("processor_class")
            if isinstance(name, str) and hasattr(transformers, name):
                return name
    return PROCESSOR_MAPPING_NAMES.get(model_type)


def processor_sha256(folder: Path) -> str:
    """Hash over the names and bytes of the files that decide how the model is asked."""
    present = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    hashes = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in present]
    return hashlib.sha256(canonical_json(hashes).encode()).hexdigest()


def _stop_ids(folder: Path, config: Any, tokenizer: Any) -> list[int]:
    """End-of-answer ids: the folder's generation_config.json, else the config's; the tokenizer's end of text too."""
    found: list[int] = []
    if (folder / "generation_config.json").is_file():
        found += _ids(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)
    if not found:
        found += _ids(getattr(config.get_text_config(), "eos_token_id", None))
    found += _ids(tokenizer.eos_token_id)
    if not found:
        raise UserError(f"{folder}: neither generation_config.json nor the tokenizer says what ends an answer")
    return sorted(set(found))


def _ids(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _conversation(messages: Sequence[Message], images: Sequence[Any] | None) -> list[dict[str, Any]]:
    """The messages as chat templates take them; with `images`, each mark carries its picture."""
    turns = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message.content:
            if not isinstance(part, ImagePart):
                content.append({"type": "text", "text": part.text})
            elif images is None:
                content.append({"type": "image"})
            else:
                content.append({"type": "image", "image": images[part.index]})
        turns.append({"role": message.role, "content": content})
    return turns


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
