"""Converted InternVL2.5 models compute what the original implementation computes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import InternVLForConditionalGeneration

from mirage.models import load_model
from mirage.models.dynamic_rope import forget_longer_sequences
from mirage.models.internvl_checkpoint import convert, hub_name, key_map
from mirage.models.internvl_config import INTERNLM2, native_config
from mirage.models.safetensors_stream import TensorFolder
from tests.support import internvl_reference as reference
from tests.support.published import FIXTURES, small_config, write_published

IMAGE_TOKEN_ID = 500
MODEL = FIXTURES / "model"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """The original implementation's inputs and outputs."""
    with np.load(MODEL / "expected.npz") as arrays:
        return {name: torch.tensor(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference checkpoint in the native layout."""
    folder = tmp_path_factory.mktemp("parity") / "native"
    convert(MODEL, folder, layout="native", check=True, image_token_id=IMAGE_TOKEN_ID)
    return folder


def load_plain(folder: Path) -> Any:
    """Plain transformers, nothing of MIRage's; every key must find its place."""
    model, report = InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def published_tensors(folder: Path) -> dict[str, torch.Tensor]:
    source = TensorFolder(folder)
    return {name: source.read(name) for name in source.info}


def inputs_of(expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: expected[name] for name in ("input_ids", "pixel_values", "labels")}


@pytest.fixture(scope="module", params=["plain", "load_model"])
def model(request: pytest.FixtureRequest, native: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The converted model in plain transformers, and as MIRage loads the published folder."""
    if request.param == "plain":
        return load_plain(native)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIRAGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, adapter = load_model(MODEL)
        again, _ = load_model(MODEL)
    assert adapter.tokenizer is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    model.config.image_token_id = IMAGE_TOKEN_ID
    return model


def test_logits_loss_and_vision_features(model: Any, expected: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        output = model(**inputs_of(expected), use_cache=False)
        features = model.get_image_features(expected["pixel_values"]).pooler_output
    assert (output.logits - expected["logits"]).abs().max() < 1e-4
    assert abs(output.loss.item() - expected["loss"].item()) < 1e-5
    assert (features - expected["vision_features"]).abs().max() < 1e-4


def test_gradient_norms_of_every_original_parameter(model: Any, expected: dict[str, torch.Tensor]) -> None:
    norms = json.loads((MODEL / "expected_grad_norms.json").read_text())
    model.zero_grad()
    model(**inputs_of(expected), use_cache=False).loss.backward()
    squares = {hub_name(name): parameter.grad.square().sum().item() for name, parameter in model.named_parameters()}
    keys = key_map(model.config, language=INTERNLM2)
    assert {entry.published for entry in keys.entries} == set(norms)
    for entry in keys.entries:
        norm = math.sqrt(sum(squares[name] for name in entry.natives))
        assert norm == pytest.approx(norms[entry.published], rel=1e-3), entry.published


def test_the_reference_of_these_tests_is_the_original(expected: dict[str, torch.Tensor]) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    ids = expected["input_ids"][0]
    logits = reference.logits(
        published_tensors(MODEL), config, ids, pixels=expected["pixel_values"], image_token_id=IMAGE_TOKEN_ID
    )
    assert (logits - expected["logits"][0]).abs().max() < 1e-4
    loss = F.cross_entropy(logits[:-1], expected["labels"][0, 1:])
    assert abs(loss.item() - expected["loss"].item()) < 1e-5


VARIANTS = {
    "one_kv_head_and_biases": {"llm": {"num_key_value_heads": 1, "bias": True}},
    "no_grouping_plain_rope": {"llm": {"num_key_value_heads": 6, "rope_scaling": None, "rms_norm_eps": 1e-6}},
    "linear_rope": {"llm": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10000}},
    "intern_vit_6b": {
        "vision": {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False, "num_attention_heads": 2}
    },
    "earlier_layer_other_sizes": {
        "select_layer": -2,
        "vision": {"image_size": 84, "hidden_size": 40, "num_attention_heads": 5, "num_hidden_layers": 4},
        "force_image_size": 84,
        "llm": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_shapes_and_options(name: str, tmp_path: Path) -> None:
    config = small_config(**VARIANTS[name])
    write_published(tmp_path / "published", config, num_shards=3)
    convert(tmp_path / "published", tmp_path / "native", layout="native", image_token_id=IMAGE_TOKEN_ID)
    model = load_plain(tmp_path / "native")
    size = config["vision_config"]["image_size"]
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(10, 490, (40,), generator=generator)
    ids[4 : 4 + 2 * model.config.image_seq_length] = IMAGE_TOKEN_ID
    tensors = published_tensors(tmp_path / "published")
    wanted = reference.logits(tensors, config, ids, pixels=pixels, image_token_id=IMAGE_TOKEN_ID)
    with torch.no_grad():
        found = model(input_ids=ids[None], pixel_values=pixels, use_cache=False).logits[0]
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-4 * max(1.0, wanted.abs().max().item())


LIMIT = 256


def rope_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("length", [LIMIT, LIMIT + 1, LIMIT * 3 // 2, LIMIT * 5 // 2])
def test_dynamic_rope_beyond_the_limit(native: Path, length: int) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["llm_config"]["max_position_embeddings"] == LIMIT
    ids = torch.randint(10, 490, (length,), generator=torch.Generator().manual_seed(length))
    wanted = reference.logits(published_tensors(MODEL), config, ids, pixels=None, image_token_id=IMAGE_TOKEN_ID)
    assert (rope_logits(load_plain(native), ids) - wanted).abs().max() < 1e-4
    if length > LIMIT:
        config["llm_config"]["rope_scaling"] = None
        unscaled = reference.logits(published_tensors(MODEL), config, ids, pixels=None, image_token_id=IMAGE_TOKEN_ID)
        assert (unscaled - wanted).abs().max() > 1e-4 or length == LIMIT + 1


def test_dynamic_rope_forgets_longer_sequences(native: Path) -> None:
    model = load_plain(native)
    ids = torch.randint(10, 490, (LIMIT * 5 // 2,), generator=torch.Generator().manual_seed(0))
    lengths = [LIMIT * 3 // 2, LIMIT]
    fresh = [rope_logits(load_plain(native), ids[:length]) for length in lengths]
    rope_logits(model, ids)
    # transformers, like the original, keeps the longest sequence's base: this is what must not happen in training.
    assert not torch.equal(rope_logits(model, ids[: lengths[0]]), fresh[0])
    assert forget_longer_sequences(model) == 1
    assert forget_longer_sequences(model) == 1
    for length, wanted in zip(lengths, fresh, strict=True):
        rope_logits(model, ids)
        assert torch.equal(rope_logits(model, ids[:length]), wanted)


def test_dynamic_rope_in_generation_is_the_plain_models(native: Path) -> None:
    ids = torch.randint(10, 490, (1, LIMIT - 4), generator=torch.Generator().manual_seed(1))
    plain, ours = load_plain(native), load_plain(native)
    forget_longer_sequences(ours)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **settings), ours.generate(ids, **settings))


def test_full_size_key_map_covers_every_parameter() -> None:
    config = small_config(
        llm={
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 92553,
            "max_position_embeddings": 32768,
        },
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 448,
        },
        force_image_size=448,
    )
    native = native_config(config, image_token_id=92546, tied=False, where=Path("config.json"))
    keys = key_map(native, language=INTERNLM2)
    published = {entry.published: keys.published_shape(entry) for entry in keys.entries}
    # OpenGVLab/InternVL2_5-8B: 8,075,365,376 parameters in 573 tensors.
    assert sum(math.prod(shape) for shape in published.values()) == 8_075_365_376
    assert sum(math.prod(shape) for shape in keys.native_shapes.values()) == 8_075_365_376
    assert len(published) == 573
    assert sorted(name for entry in keys.entries for name in entry.natives) == sorted(keys.native_shapes)
    assert published["language_model.model.layers.31.attention.wqkv.weight"] == (6144, 4096)
    assert published["vision_model.encoder.layers.23.attn.qkv.weight"] == (3072, 1024)
    assert published["mlp1.1.weight"] == (4096, 4096)
    assert native.image_seq_length == 256
