"""What differs between model families, and nothing else: pictures, chat text, positions, module names.

Shapes: L tokens of a sample, R rows of position ids (1 for plain models, 4 for M-RoPE), H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from mirage.data.row import ImagePart, Message
from mirage.errors import UserError
from mirage.strict_json import read_json

IGNORE_INDEX = -100
SPEC_FILE = "mirage_preprocessing.json"


class PreprocessingSpec(BaseModel):
    """How pictures and chat become tokens: frozen, written into each checkpoint, compared before evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Literal["internvl", "qwen2_vl"]
    image_size: int
    max_tiles: int
    thumbnail: bool
    min_pixels: int
    max_pixels: int
    system_prompt: str | None
    number_images: bool

    def save(self, folder: Path) -> None:
        """Write `mirage_preprocessing.json` into a checkpoint folder."""
        (folder / SPEC_FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> PreprocessingSpec | None:
        """The folder's spec, or None when it has none (weights that MIRage did not write)."""
        path = folder / SPEC_FILE
        try:
            return cls.model_validate(read_json(path)) if path.exists() else None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "file"
            raise UserError(f"{path}: {key}: {first['msg']}; the checkpoint is damaged") from error

    def check(self, settings: Mapping[str, Any], *, folder: Path, source: str) -> None:
        """Raise `UserError` with both values of every setting that `settings` (from `source`) has otherwise."""
        own = self.model_dump()
        wrong = [
            f"preprocessing.{key} is {own[key]!r} there and {settings[key]!r} in {source}"
            for key in own
            if key in settings and settings[key] != own[key]
        ]
        if wrong:
            raise UserError(
                f"{folder} was made with other preprocessing: {'; '.join(wrong)}. "
                "A model is asked as it was taught; leave these settings as the checkpoint has them"
            )


@dataclass(frozen=True)
class Picture:
    """One preprocessed image: its tensors (family-specific keys, first axis is concatenated) and its token count."""

    tensors: Mapping[str, torch.Tensor]
    num_tokens: int

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class RenderedText:
    """Token ids of a conversation and which of them are learnt."""

    input_ids: list[int]
    labels: list[int]
    text: str

    @property
    def num_supervised_tokens(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered chat, and whether the model learns to write it. Begins at a special token or an answer."""

    text: str
    supervised: bool


class ProcessorSpec(BaseModel):
    """How a model with a processor of its own is asked: by that processor's files, named by their hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Literal["generic"] = "generic"
    model_type: str
    processor_sha256: str


@dataclass(frozen=True)
class Question:
    """One row of a generation batch: the messages, `images[i]` (RGB) of `ImagePart(index=i)`, and the prompt's ids."""

    messages: Sequence[Message]
    images: Sequence[Image.Image]
    input_ids: Sequence[int]


class GenerationAdapter(ABC):
    """What evaluation needs of a model: its prompt, the inputs of a batch of prompts, and where an answer ends."""

    family: ClassVar[str]
    tokenizer: Any
    # Written into results and into the key of every answer.
    spec: PreprocessingSpec | ProcessorSpec

    @abstractmethod
    def prompt(self, messages: Sequence[Message], sizes: Sequence[tuple[int, int]]) -> RenderedText:
        """The conversation up to where the answer begins. `sizes[i]` is (width, height) in pixels of image i."""

    @abstractmethod
    def generation_inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """What `model.generate` takes for a batch, on the CPU: ids [B, L] padded on the left, their mask, pictures."""

    @abstractmethod
    def set_tile_budget(self, max_tiles: int) -> None:
        """Evaluate with this many tiles a sample (`eval.max_tiles`). Raises `UserError` where there are no tiles."""

    @property
    @abstractmethod
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """Id that fills batches of prompts."""


class ModelAdapter(GenerationAdapter):
    """One family's rules. Built by `load_model` around a tokenizer, a config and a `PreprocessingSpec`."""

    spec: PreprocessingSpec
    # Module-name prefixes (of the transformers class) that make up each group.
    groups: ClassVar[Mapping[str, tuple[str, ...]]]
    # Last part of the names of the linear layers that adapters may target, by group.
    linear_names: ClassVar[Mapping[str, tuple[str, ...]]]
    decoder_layer_class: ClassVar[str]
    default_system_prompt: ClassVar[str]
    # Keys of `Picture.tensors` that hold floating-point pixels.
    pixel_key: ClassVar[str] = "pixel_values"

    def __init__(self, tokenizer: Any, config: Any, spec: PreprocessingSpec) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.spec = spec

    # Pictures

    @abstractmethod
    def num_image_tokens(self, width: int, height: int, *, num_images: int) -> int:
        """Placeholder tokens of one `width` x `height` pixel image in a sample of `num_images`; no pixels needed."""

    def preprocess(self, image: Image.Image, *, num_images: int) -> Picture:
        """Tensors of one RGB image in a sample of `num_images`: resized, then normalised."""
        return self.normalize(self.resize(image, num_images=num_images))

    @abstractmethod
    def resize_settings(self, *, num_images: int) -> dict[str, int]:
        """All numbers that `resize` depends on besides the image; equal ones give equal pixels."""

    @abstractmethod
    def resize(self, image: Image.Image, *, num_images: int) -> torch.Tensor:
        """The pixels that the model sees of an RGB image, uint8 [N, height, width, 3]: tiles, or one picture."""

    @abstractmethod
    def normalize(self, pixels: torch.Tensor) -> Picture:
        """The model's tensors of resized pixels, uint8 [N, height, width, 3]; arithmetic alone."""

    @abstractmethod
    def picture_images(self, picture: Picture) -> list[Image.Image]:
        """What `preprocess` made of a picture, as RGB images: its tiles in order, or the one resized picture."""

    # Text

    def chat_segments(
        self, messages: Sequence[Message], image_tokens: Sequence[int], *, generation: bool
    ) -> list[Segment]:
        """The conversation in ChatML with placeholders expanded; `generation` opens the assistant's turn.

        The system message is the conversation's own, else the spec's, else the family's; an empty one is left out.
        """
        check_image_marks(messages, image_tokens)
        turns = list(messages)
        system = self.spec.system_prompt if self.spec.system_prompt is not None else self.default_system_prompt
        if turns and turns[0].role == "system":
            system = turns.pop(0).text
        segments = [Segment(f"<|im_start|>system\n{system}<|im_end|>\n", False)] if system else []
        for message in turns:
            if message.role == "assistant":
                segments.append(Segment("<|im_start|>assistant\n", False))
                segments.append(Segment(f"{message.text}<|im_end|>", True))
                segments.append(Segment("\n", False))
            else:
                text = self.message_text(message, image_tokens)
                segments.append(Segment(f"<|im_start|>{message.role}\n{text}<|im_end|>\n", False))
        if generation:
            segments.append(Segment("<|im_start|>assistant\n", False))
        return segments

    @abstractmethod
    def message_text(self, message: Message, image_tokens: Sequence[int]) -> str:
        """A user turn's text with the placeholders of its images."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens read as such, none added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def prefix_ids(self) -> list[int]:
        """Ids before every conversation (BOS where the family has one)."""
        return []

    def render(
        self, messages: Sequence[Message], image_tokens: Sequence[int], *, generation: bool = False
    ) -> RenderedText:
        """Ids and labels of a conversation. The one function that training and evaluation both call.

        `image_tokens[i]` is the token count of the row's image i. With `generation`, the messages end with a user
        turn and the text ends where the answer begins. The first label is never supervised, so that a packed row
        cannot train one sample's last token to predict the next sample's first.
        """
        segments = self.chat_segments(messages, image_tokens, generation=generation)
        input_ids, labels = list(self.prefix_ids), [IGNORE_INDEX] * len(self.prefix_ids)
        before = ""
        for segment in segments:
            ids = self.encode(segment.text)
            if segment.supervised:
                # Tokenised together with the text just before it, as upstream trains, unless that text's own tokens
                # would change: then the prompt of training and of generation would differ.
                context, joined = self.encode(before), self.encode(before + segment.text)
                ids = joined[len(context) :] if joined[: len(context)] == context else ids
            input_ids += ids
            labels += ids if segment.supervised else [IGNORE_INDEX] * len(ids)
            before = segment.text
        if input_ids.count(self.image_token_id) != sum(image_tokens):
            raise UserError(
                f"the text itself holds an image placeholder such as {self.tokenizer.decode([self.image_token_id])!r}; "
                "remove it from the messages"
            )
        if labels:
            labels[0] = IGNORE_INDEX
        return RenderedText(input_ids, labels, "".join(segment.text for segment in segments))

    def prompt(self, messages: Sequence[Message], sizes: Sequence[tuple[int, int]]) -> RenderedText:
        image_tokens = [self.num_image_tokens(width, height, num_images=len(sizes)) for width, height in sizes]
        return self.render(messages, image_tokens, generation=True)

    # Positions and batches

    def generation_inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        length = max(len(question.input_ids) for question in questions)
        input_ids = torch.full((len(questions), length), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(questions), length, dtype=torch.long)
        for row, question in enumerate(questions):
            input_ids[row, length - len(question.input_ids) :] = torch.tensor(question.input_ids)
            mask[row, length - len(question.input_ids) :] = 1
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        pictures = [
            self.preprocess(question.images[index], num_images=len(question.images))
            for question in questions
            for index in image_order(question.messages)
        ]
        if pictures:
            inputs |= self.token_inputs(input_ids) | self.picture_inputs(pictures)
        return inputs

    def set_tile_budget(self, max_tiles: int) -> None:
        self.spec = self.spec.model_copy(update={"max_tiles": max_tiles})

    @abstractmethod
    def position_ids(self, input_ids: torch.Tensor, pictures: Sequence[Picture]) -> torch.Tensor:
        """Position ids [R, L] of one sample with ids [L]; row 0 restarts at 0 and marks the sample in a packed row."""

    def picture_inputs(self, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        """Model inputs for the pictures of a batch, in order; empty without pictures."""
        if not pictures:
            return {}
        return {key: torch.cat([picture.tensors[key] for picture in pictures]) for key in pictures[0].tensors}

    def token_inputs(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further inputs derived from ids alone (e.g. modality marks)."""
        return {}

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """Id of the placeholder that a picture's features replace."""

    @abstractmethod
    def dummy_picture(self) -> tuple[Picture, list[int]]:
        """The smallest picture and ids that hold its placeholders: keeps the vision tower in step on every rank."""

    # Modules

    @abstractmethod
    def vision_module(self, model: Any) -> torch.nn.Module:
        """The module of the transformers class that makes features of pixels; the projector may be inside."""

    @abstractmethod
    def vision_features(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the tower gives the projector for `Picture.tensors`; first axes join as those of the pixels do."""

    @abstractmethod
    def accept_features(self, model: Any) -> None:
        """From now on `model` also takes vision features in place of pixels: its tower hands those on as they are."""

    def group_of(self, parameter_name: str) -> str:
        """The module group ('vision', 'projector', 'language') a parameter of the transformers class belongs to."""
        for group, prefixes in self.groups.items():
            if any(parameter_name.startswith(prefix) for prefix in prefixes):
                return group
        raise ValueError(f"parameter {parameter_name!r} belongs to no module group of {self.family}")

    def lora_target_names(self, module_names: Iterable[str], groups: Sequence[str]) -> list[str]:
        """Full names of the linear layers in `groups`; exact names, so that no tower is adapted by accident."""
        return sorted(
            name
            for name in module_names
            for group in groups
            if any(name.startswith(prefix) for prefix in self.groups[group])
            and name.rsplit(".", 1)[-1] in self.linear_names[group]
        )

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        return [self.tokenizer.convert_tokens_to_ids("<|im_end|>")]

    @property
    def pad_id(self) -> int:
        """Id that fills batches of prompts."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_ids[0]

    def save_files(self, folder: Path) -> None:
        """Write tokenizer, image processor, chat template and preprocessing spec beside the weights."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor_config(folder)
        self.spec.save(folder)

    @abstractmethod
    def image_processor_config(self, folder: Path) -> None:
        """Write the `preprocessor_config.json` that plain transformers and vLLM read."""


def normalized(pixels: torch.Tensor, *, mean: Sequence[float], std: Sequence[float], axis: int) -> torch.Tensor:
    """(pixels / 255 - mean) / std of uint8 pixels with their three channels at `axis`, float32 and contiguous.

    Computed in place, in the order of the upstream image processors: the same bits, at a tenth of numpy's time.
    """
    shape = [3 if number == axis else 1 for number in range(pixels.ndim)]
    shares = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return shares.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def image_of_pixels(pixels: torch.Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The RGB image of normalised pixels [3, height, width]."""
    values = pixels.float() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    array = (values * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(array.numpy())


def image_order(messages: Sequence[Message]) -> list[int]:
    """Image numbers in the order of their marks, which is the order of their placeholders."""
    return [part.index for message in messages for part in message.content if isinstance(part, ImagePart)]


def check_image_marks(messages: Sequence[Message], image_tokens: Sequence[int]) -> None:
    """Raise `UserError` unless the messages mark each image exactly once."""
    marks = image_order(messages)
    if sorted(marks) != list(range(len(image_tokens))):
        raise UserError(f"the messages mark images {marks} and the sample has {len(image_tokens)}")
