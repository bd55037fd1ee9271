"""Qwen2-VL against transformers' own processor and model: pixels, token counts, text, M-RoPE positions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from mirage.config.schema import DataConfig, PreprocessingConfig, SourceConfig
from mirage.data.collate import collate
from mirage.data.pictures import PictureLoader
from mirage.data.render import Sample, build_sample, image_token_counts, render_sample
from mirage.data.row import ImagePart, Message, TextPart
from mirage.data.sources import load_mixture
from mirage.errors import UserError
from mirage.evals.generate import Decoding, generate_batch, make_prompts
from mirage.evals.task import Sample as EvalSample
from mirage.models import ModelAdapter, load_model
from mirage.models.qwen2_vl import scaled_size
from mirage.models.registry import load_adapter

PUBLISHED = PreprocessingConfig()
NARROW = PreprocessingConfig(min_pixels=28 * 28, max_pixels=112 * 112)
# (width, height): square, wide, tall, tiny, huge, one pixel off a multiple of 28, half-way cases, extreme strips.
SIZES = [
    (28, 28), (448, 448), (447, 449), (640, 480), (1080, 1920), (3000, 2000), (1, 1), (13, 15), (56, 2), (2, 56),
    (14, 14), (42, 70), (70, 42), (98, 126), (224, 14), (5600, 28), (28, 5600), (199, 1), (1, 200), (1001, 1003),
    (4096, 4096), (17, 2931),
]  # fmt: skip
# chat_template of Qwen/Qwen2-VL-7B-Instruct, word for word.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ProcessorWithoutVideo(Qwen2VLProcessor):
    """transformers' processor; its video part needs torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        if name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(name, argument)


def adapter_of(folder: Path, preprocessing: PreprocessingConfig = NARROW) -> ModelAdapter:
    return load_adapter(folder, preprocessing=preprocessing)


def image_processor(preprocessing: PreprocessingConfig) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(min_pixels=preprocessing.min_pixels, max_pixels=preprocessing.max_pixels)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conversation(num_images: int, *, system: str | None = None, turns: int = 1) -> list[Message]:
    """Images first in the first turn, text between the last two."""
    content: list[Any] = [ImagePart(index=index) for index in range(num_images)]
    if num_images > 1:
        content.insert(num_images - 1, TextPart(text=" and "))
    content.append(TextPart(text="What  is\nshown in the pictures?"))
    messages = [Message(role="system", content=[TextPart(text=system)])] if system else []
    messages += [Message(role="user", content=content)]
    for number in range(turns):
        messages += [Message(role="assistant", content=[TextPart(text=f"A square, number {number}.")])]
        messages += [Message(role="user", content=[TextPart(text="And?")])] if number + 1 < turns else []
    return messages


def as_chat(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as transformers' templates take them."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                for part in message.content
            ],
        }
        for message in messages
    ]


# Pictures


@pytest.mark.parametrize("preprocessing", [PUBLISHED, NARROW, PreprocessingConfig(min_pixels=1, max_pixels=28 * 28)])
def test_token_counts_and_sizes_equal_the_processors(tiny_folders, preprocessing):
    adapter, processor = adapter_of(tiny_folders["qwen2_vl"], preprocessing), image_processor(preprocessing)
    chance = random.Random(0)
    drawn = [(chance.randint(1, 2000), chance.randint(1, 2000)) for _ in range(2000)]
    for width, height in [*SIZES, *(size for size in drawn if max(size) <= 200 * min(size))]:
        patches = processor.get_number_of_image_patches(height, width)
        assert adapter.num_image_tokens(width, height, num_images=2) * 4 == patches, (width, height)


def test_a_strip_is_refused_where_transformers_refuses_it(tiny_folders):
    adapter, processor = adapter_of(tiny_folders["qwen2_vl"]), image_processor(NARROW)
    for width, height in ((201, 1), (3, 601)):
        with pytest.raises(ValueError, match="aspect ratio"):
            processor.get_number_of_image_patches(height, width)
        with pytest.raises(UserError, match=f"{width} x {height} pixels is more than 200 times"):
            adapter.num_image_tokens(width, height, num_images=1)


def test_pixel_limits_hold(tiny_folders):
    for preprocessing in (PUBLISHED, NARROW):
        for width, height in SIZES[:14]:
            scaled = scaled_size(
                width, height, factor=28, min_pixels=preprocessing.min_pixels, max_pixels=preprocessing.max_pixels
            )
            assert preprocessing.min_pixels <= scaled[0] * scaled[1] <= preprocessing.max_pixels
            assert not scaled[0] % 28 and not scaled[1] % 28


@pytest.mark.parametrize("size", SIZES[:16])
def test_pixels_equal_the_processors(tiny_folders, size):
    adapter, image = adapter_of(tiny_folders["qwen2_vl"]), picture(*size)
    expected = image_processor(NARROW)(image, return_tensors="pt")
    ours = adapter.preprocess(image, num_images=1)
    assert torch.equal(ours.tensors["image_grid_thw"], expected["image_grid_thw"])
    assert ours.tensors["pixel_values"].dtype == expected["pixel_values"].dtype == torch.float32
    assert torch.equal(ours.tensors["pixel_values"], expected["pixel_values"])
    assert ours.num_tokens == adapter.num_image_tokens(*size, num_images=1)


def test_every_grey_level_normalises_to_the_same_float(tiny_folders):
    levels = np.arange(56 * 56).astype(np.uint8).reshape(56, 56, 1).repeat(3, axis=2)
    image = Image.fromarray(levels)
    expected = image_processor(NARROW)(image, return_tensors="pt")["pixel_values"]
    ours = adapter_of(tiny_folders["qwen2_vl"]).preprocess(image, num_images=1)
    assert torch.equal(ours.tensors["pixel_values"], expected)


def test_the_file_written_for_servers_says_the_same(tiny_folders, tmp_path):
    adapter = adapter_of(tiny_folders["qwen2_vl"])
    adapter.save_files(tmp_path)
    served = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    image = picture(333, 190)
    assert torch.equal(
        served(image, return_tensors="pt")["pixel_values"],
        adapter.preprocess(image, num_images=1).tensors["pixel_values"],
    )


# Text


@pytest.mark.parametrize("num_images", [0, 1, 2, 4])
@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("turns", [0, 1, 2])
def test_prompt_equals_the_processors(tiny_folders, num_images, system, turns):
    adapter = adapter_of(tiny_folders["qwen2_vl"])
    images = [picture(40 + 30 * number, 100, seed=number) for number in range(num_images)]
    messages = conversation(num_images, system=system, turns=turns)
    counts = [adapter.num_image_tokens(*image.size, num_images=num_images) for image in images]
    rendered = adapter.render(messages, counts, generation=turns == 0)
    processor = ProcessorWithoutVideo(image_processor(NARROW), adapter.tokenizer, chat_template=TEMPLATE)
    text = processor.apply_chat_template(as_chat(messages), tokenize=False, add_generation_prompt=turns == 0)
    expected = processor(text=[text], images=images or None, return_tensors="pt")
    assert rendered.input_ids == expected["input_ids"][0].tolist()
    assert rendered.text.replace("<|image_pad|>", "") == text.replace("<|image_pad|>", "")
    token_types = adapter.token_inputs(torch.tensor([rendered.input_ids]))["mm_token_type_ids"]
    assert torch.equal(token_types, expected["mm_token_type_ids"].int())
    if images:
        ours = adapter.picture_inputs([adapter.preprocess(image, num_images=num_images) for image in images])
        assert all(torch.equal(ours[name], expected[name]) for name in ("pixel_values", "image_grid_thw"))


def test_saved_template_is_the_published_one_with_the_runs_system_prompt(tiny_folders, tmp_path):
    for name, prompt in (("published", None), ("other", 'Be "careful" 🙂.\n{{ x }}'), ("none", "")):
        folder = tmp_path / name
        folder.mkdir()
        adapter = adapter_of(tiny_folders["qwen2_vl"], NARROW.model_copy(update={"system_prompt": prompt}))
        adapter.save_files(folder)
        template = AutoTokenizer.from_pretrained(folder).chat_template
        if prompt is None:
            assert template == TEMPLATE
        for system in (None, "Own."):
            messages = conversation(2, system=system)
            text = adapter.tokenizer.apply_chat_template(as_chat(messages), tokenize=False, chat_template=template)
            assert text == adapter.render(messages, [1, 1]).text


# Positions


@pytest.fixture(scope="module")
def model(tiny_folders) -> Any:
    return load_model(tiny_folders["qwen2_vl"], preprocessing=NARROW)[0]


def make_sample(adapter: ModelAdapter, sizes: list[tuple[int, int]]) -> Sample:
    pictures = [adapter.preprocess(picture(*size), num_images=len(sizes)) for size in sizes]
    rendered = adapter.render(conversation(len(sizes)), [picture.num_tokens for picture in pictures])
    return build_sample(rendered, adapter, pictures)


def rope_index(model: Any, adapter: ModelAdapter, sample: Sample) -> torch.Tensor:
    """transformers' M-RoPE ids [3, L]; plain positions for text."""
    if not sample.pictures:
        return torch.arange(sample.num_tokens).expand(3, -1)
    ids = sample.input_ids[None]
    grids = torch.cat([picture.tensors["image_grid_thw"] for picture in sample.pictures])
    positions, _ = model.model.get_rope_index(ids, **adapter.token_inputs(ids), image_grid_thw=grids)
    return positions[:, 0]


CASES = [
    [],
    [(100, 60)],
    [(30, 110)],
    [(100, 60), (60, 100)],
    [(112, 112), (28, 28)],
    [(28, 140), (140, 28), (56, 56), (90, 70)],
]


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_positions_equal_the_models(model, tiny_folders, sizes):
    adapter = adapter_of(tiny_folders["qwen2_vl"])
    sample = make_sample(adapter, sizes)
    assert torch.equal(sample.position_ids[0], torch.arange(sample.num_tokens))
    assert torch.equal(sample.position_ids[1:], rope_index(model, adapter, sample))


def test_positions_of_packed_samples_are_those_of_each_alone(model, tiny_folders):
    adapter = adapter_of(tiny_folders["qwen2_vl"])
    samples = [make_sample(adapter, sizes) for sizes in CASES]
    packed = collate(samples, adapter).inputs["position_ids"]
    expected = torch.cat([rope_index(model, adapter, sample) for sample in samples], dim=1)
    assert packed.shape == (4, 1, sum(sample.num_tokens for sample in samples))
    assert torch.equal(packed[1:, 0], expected)
    starts = torch.tensor([sample.num_tokens for sample in samples]).cumsum(0)[:-1]
    assert (packed[0, 0] == 0).nonzero().flatten().tolist() == [0, *starts.tolist()]


def test_logits_with_our_positions_equal_the_models_own(model, tiny_folders):
    adapter = adapter_of(tiny_folders["qwen2_vl"])
    sample = make_sample(adapter, CASES[3])
    inputs = {"input_ids": sample.input_ids[None], **adapter.token_inputs(sample.input_ids[None])}
    inputs |= adapter.picture_inputs(sample.pictures)
    with torch.no_grad():
        own = model(**inputs, use_cache=False).logits
        ours = model(**inputs, position_ids=sample.position_ids[:, None], use_cache=False).logits
    assert (own - ours).abs().max() < 1e-5


# The recipe's pixel limits


@pytest.mark.parametrize("max_pixels", [56 * 56, 112 * 112])
def test_pixel_limits_act_alike_in_training_and_evaluation(shapes, tiny_folders, tmp_path, max_pixels):
    limits = NARROW.model_copy(update={"max_pixels": max_pixels})
    adapter = adapter_of(tiny_folders["qwen2_vl"], limits)
    entry = load_mixture(DataConfig(dir=shapes, sources=(SourceConfig(split="train"),)), seed=0).rows[0]
    sample = render_sample(entry, adapter, PictureLoader(adapter, cache_bytes=0))
    # What a checkpoint carries, and what evaluation reads from it.
    adapter.save_files(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(adapter.config.to_dict()))
    evaluation = load_adapter(tmp_path)
    assert evaluation.spec.max_pixels == max_pixels
    question = [message for message in entry.row.messages if message.role != "assistant"]
    asked = EvalSample("one", tuple(question), tuple(entry.image_paths), category="", sub_category="", cluster="one")
    decoding = Decoding(max_new_tokens=1, batch_size=1, dtype="float32", attention="sdpa")
    (prompt,) = make_prompts(evaluation, [asked], fingerprint="x", decoding=decoding)
    assert prompt.input_ids == sample.input_ids[: len(prompt.input_ids)].tolist()
    assert prompt.input_ids.count(adapter.image_token_id) == sum(image_token_counts(entry.row, adapter))
    assert all(picture.num_tokens * 28 * 28 <= max_pixels for picture in sample.pictures)
    seen: dict[str, torch.Tensor] = {}
    model, _ = load_model(tiny_folders["qwen2_vl"])
    model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(pixels=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    generate_batch(model, evaluation, [prompt], decoding=decoding, device=torch.device("cpu"))
    trained = torch.cat([picture.tensors["pixel_values"] for picture in sample.pictures])
    assert torch.equal(seen["pixels"], trained)
