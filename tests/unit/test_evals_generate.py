"""Generation with real tiny models: batching, resuming, ranks, pictures and keys."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from mirage.config.schema import PreprocessingConfig, TinyConfig
from mirage.data.row import ImagePart, Message, TextPart
from mirage.data.sources import read_rows
from mirage.errors import UserError
from mirage.evals.answers import Answer, AnswerStore
from mirage.evals.generate import Decoding, generate_answers, generate_batch, make_prompts, plan_batches
from mirage.evals.task import Sample
from mirage.evals.tasks.rows import sample_of_row
from mirage.models import ModelAdapter, load_model
from mirage.models.tiny import build_tiny
from tests.support.dataset import write_dataset

TINY = TinyConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=64,
    vision_hidden_size=32, vision_layers=1, vocab_size=400, warmup_steps=0,
)  # fmt: skip
SMALL = PreprocessingConfig(image_size=56, max_tiles=4, min_pixels=28 * 28, max_pixels=84 * 84)
DECODING = Decoding(max_new_tokens=6, batch_size=4, dtype="float32", attention="sdpa")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=["internvl", "qwen2_vl"])
def loaded(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    build_tiny(folder, request.param, TINY, SMALL, data_dir=data, seed=0)
    model, adapter = load_model(folder, attention="sdpa", dtype=torch.float32, device="cpu")
    model.set_attn_implementation("sdpa")
    return model, adapter


@pytest.fixture(scope="module")
def samples(data: Path) -> list[Sample]:
    """Prompts with two pictures, with one, and with none, of different lengths."""
    rows = [row for row in read_rows(data) if row.split in ("hard", "twins", "train_general")][:14]
    return [_longer(sample_of_row(row, data), words=number) for number, row in enumerate(rows)]


def _longer(sample: Sample, *, words: int) -> Sample:
    asked = sample.messages[-1]
    content = (*asked.content, TextPart(text=" please" * words))
    return replace(sample, messages=(*sample.messages[:-1], asked.model_copy(update={"content": content})))


def answers_of(store: AnswerStore) -> dict[str, str]:
    return {key: answer.text for key, answer in store.read().items()}


def test_the_samples_cover_all_numbers_of_pictures(samples: list[Sample]) -> None:
    assert {len(sample.image_paths) for sample in samples} == {0, 1, 2}


def test_the_prompt_is_the_beginning_of_what_training_renders(loaded: tuple[Any, ModelAdapter], data: Path) -> None:
    _, adapter = loaded
    row = next(row for row in read_rows(data, splits=["train"]))
    prompt = make_prompts(adapter, [sample_of_row(row, data)], fingerprint="w", decoding=DECODING)[0]
    tokens = [adapter.num_image_tokens(image.width, image.height, num_images=2) for image in row.images]
    trained = adapter.render(row.messages, tokens)
    assert trained.text.startswith(prompt.text)
    assert trained.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_a_padded_batch_answers_as_each_prompt_alone(loaded: tuple[Any, ModelAdapter], samples: list[Sample]) -> None:
    model, adapter = loaded
    prompts = make_prompts(adapter, samples, fingerprint="w", decoding=DECODING)
    assert len({len(prompt.input_ids) for prompt in prompts}) > 3
    for batch in plan_batches(prompts, batch_size=8):
        together = generate_batch(model, adapter, batch, decoding=DECODING, device=CPU)
        alone = [generate_batch(model, adapter, [prompt], decoding=DECODING, device=CPU)[0] for prompt in batch]
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        assert all(0 < answer.num_tokens <= DECODING.max_new_tokens for answer in together)


def test_a_checkpoints_own_generation_settings_are_not_used(
    loaded: tuple[Any, ModelAdapter], samples: list[Sample]
) -> None:
    model, adapter = loaded
    prompts = make_prompts(adapter, samples[:1], fingerprint="w", decoding=DECODING)
    plain = generate_batch(model, adapter, prompts, decoding=DECODING, device=CPU)
    model.generation_config = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, max_new_tokens=2)
    assert generate_batch(model, adapter, prompts, decoding=DECODING, device=CPU) == plain


def test_answers_do_not_depend_on_ranks_or_on_being_killed(
    loaded: tuple[Any, ModelAdapter], samples: list[Sample], tmp_path: Path
) -> None:
    model, adapter = loaded
    prompts = make_prompts(adapter, samples, fingerprint="w", decoding=DECODING)

    def answer(folder: Path, *, rank: int = 0, world_size: int = 1) -> AnswerStore:
        store = AnswerStore(folder, rank=rank)
        generate_answers(
            model, adapter, prompts, decoding=DECODING, store=store, device=CPU, rank=rank, world_size=world_size
        )
        return store

    whole = answers_of(answer(tmp_path / "one"))
    assert set(whole) == {prompt.key for prompt in prompts}
    for rank in (0, 1, 2):
        store = answer(tmp_path / "three", rank=rank, world_size=3)
    assert answers_of(store) == whole
    shares = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "three").glob("answers-*.jsonl"))]
    assert len(shares) == 3 and sum(shares) == len(whole) and max(shares) - min(shares) <= DECODING.batch_size
    # Killed in the middle of the second batch's line, then gone on with by one process.
    path = tmp_path / "one" / "answers-0.jsonl"
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][: len(lines[5]) // 2])
    assert answers_of(answer(tmp_path / "one")) == whole
    assert path.read_bytes() == content


def test_nothing_is_generated_twice(loaded: tuple[Any, ModelAdapter], samples: list[Sample], tmp_path: Path) -> None:
    _, adapter = loaded
    prompts = make_prompts(adapter, samples, fingerprint="w", decoding=DECODING)
    store = AnswerStore(tmp_path, rank=0)
    store.append(Answer(prompt.key, "said before", 2, "stop") for prompt in prompts)
    generate_answers(None, adapter, prompts, decoding=DECODING, store=store, device=CPU)
    assert set(answers_of(store).values()) == {"said before"}


def test_keys_name_weights_prompt_pictures_decoding_and_preprocessing(
    loaded: tuple[Any, ModelAdapter], samples: list[Sample]
) -> None:
    _, adapter = loaded
    sample = next(sample for sample in samples if len(sample.image_paths) == 2)

    def key(sample: Sample = sample, fingerprint: str = "w", **decoding: Any) -> str:
        chosen = DECODING.model_copy(update=decoding)
        return make_prompts(adapter, [sample], fingerprint=fingerprint, decoding=chosen)[0].key

    other_text = (Message(role="user", content=(ImagePart(index=0), ImagePart(index=1), TextPart(text="Why?"))),)
    swapped = tuple(reversed(sample.image_sha256))
    keys = [
        key(),
        key(fingerprint="v"),
        key(max_new_tokens=7),
        key(dtype="bfloat16"),
        key(replace(sample, messages=other_text)),
        key(replace(sample, image_sha256=swapped)),
    ]
    spec = adapter.spec
    adapter.spec = spec.model_copy(update={"thumbnail": not spec.thumbnail})
    keys.append(key())
    adapter.spec = spec
    assert len(set(keys)) == len(keys)
    assert key() == keys[0] == key(replace(sample, id="another", image_sha256=()))


def test_batches_are_cut_from_the_samples_alone(loaded: tuple[Any, ModelAdapter], samples: list[Sample]) -> None:
    _, adapter = loaded
    prompts = make_prompts(adapter, samples, fingerprint="w", decoding=DECODING)
    batches = plan_batches(prompts, batch_size=4)
    assert batches == plan_batches(prompts[::-1], batch_size=4)
    assert sorted(prompt.sample.id for batch in batches for prompt in batch) == sorted(s.id for s in samples)
    for batch in batches:
        lengths = [len(prompt.input_ids) for prompt in batch]
        assert len(batch) <= 4 and lengths == sorted(lengths)
        assert len({bool(prompt.sample.image_paths) for prompt in batch}) == 1


def test_pictures_follow_their_marks_not_their_numbers(
    loaded: tuple[Any, ModelAdapter], samples: list[Sample], tmp_path: Path
) -> None:
    model, adapter = loaded
    Image.new("RGB", (150, 40), "red").save(tmp_path / "wide.png")
    sample = next(sample for sample in samples if len(sample.image_paths) == 2)
    paths, text = (tmp_path / "wide.png", sample.image_paths[1]), TextPart(text="What?")
    forward = Message(role="user", content=(TextPart(text="1: "), ImagePart(index=0), ImagePart(index=1), text))
    backward = Message(role="user", content=(TextPart(text="1: "), ImagePart(index=1), ImagePart(index=0), text))
    asked = [
        replace(sample, image_sha256=(), image_paths=paths, messages=(forward,)),
        replace(sample, image_sha256=(), image_paths=paths[::-1], messages=(backward,)),
    ]
    prompts = make_prompts(adapter, asked, fingerprint="w", decoding=DECODING)
    assert prompts[0].input_ids == prompts[1].input_ids
    first, second = (
        generate_batch(model, adapter, [prompt], decoding=DECODING, device=CPU)[0].text for prompt in prompts
    )
    assert first == second


def test_a_changed_or_broken_picture_is_named(
    loaded: tuple[Any, ModelAdapter], samples: list[Sample], tmp_path: Path
) -> None:
    model, adapter = loaded
    sample = next(sample for sample in samples if len(sample.image_paths) == 1)
    copied = tmp_path / "copy.png"
    shutil.copy(sample.image_paths[0], copied)
    moved = replace(sample, image_paths=(copied,))
    prompts = make_prompts(adapter, [moved], fingerprint="w", decoding=DECODING)
    Image.new("RGB", (64, 64), "black").save(copied)
    with pytest.raises(UserError, match=f"sample {sample.id}: the file is not the one its row names"):
        generate_batch(model, adapter, prompts, decoding=DECODING, device=CPU)
    copied.write_text("no image")
    with pytest.raises(UserError, match=r"sample .*copy\.png cannot be read"):
        make_prompts(adapter, [moved], fingerprint="w", decoding=DECODING)


def test_a_damaged_line_inside_the_answers_is_an_error(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, rank=0)
    store.append([Answer("a", "x", 1, "stop"), Answer("b", "y", 1, "length")])
    lines = store.path.read_text().splitlines()
    assert json.loads(lines[1])["finish"] == "length"
    store.path.write_text("{broken\n" + lines[1] + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        store.read()
