"""The plan against known models, hand-computed sums, and what autograd and PyTorch's own counter say."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mirage.config import Recipe, load_recipe
from mirage.errors import UserError
from mirage.models.lora import select_trainable
from mirage.models.registry import FAMILIES
from mirage.training.plan import (
    ParameterCounts,
    Shape,
    decoder_layer_bytes,
    default_world_size,
    largest_pack,
    memory_plan,
    model_config,
    model_shape,
    parameter_counts,
    parse_memory,
    plan_adapter,
    sample_work,
    state_bytes_per_parameter,
)
from mirage.training.plan_data import planned_mixture
from mirage.training.plan_report import make_plan, render_plan
from tests.support.dataset import write_dataset


def sizes(*args: str) -> tuple[Recipe, ParameterCounts, Shape]:
    recipe = load_recipe(args)
    config, _ = model_config(recipe)
    adapter = plan_adapter(recipe, config)
    return recipe, parameter_counts(config, adapter, recipe.model), model_shape(config, adapter)


# Parameters


def test_internvl_8b_by_part() -> None:
    # The published checkpoint OpenGVLab/InternVL2_5-8B has 8,075,365,376 parameters.
    _, counts, shape = sizes("recipe=internvl_mis")
    assert counts.num_total == 8_075_365_376
    assert counts.total["embeddings"] == counts.total["head"] == 92_553 * 4_096
    # Pixel-unshuffled features of 4 x 1024: a norm, and two linear layers with biases.
    assert counts.total["projector"] == 2 * 4_096 + 2 * (4_096 * 4_096 + 4_096)
    # q and o, k and v (8 of 32 heads), three matrices of the MLP, two norms; the last norm.
    layer = 2 * 4_096**2 + 2 * 4_096 * 1_024 + 3 * 4_096 * 14_336 + 2 * 4_096
    assert counts.total["language"] == 32 * layer + 4_096
    # The paper trains projector and language model.
    assert counts.num_trained == counts.num_total - counts.total["vision"]
    assert (shape.vision_window_tokens, shape.vision_tokens_per_image_token) == (1025, 1025 / 256)


def test_qwen2_vl_7b_by_part() -> None:
    # The published checkpoint Qwen/Qwen2-VL-7B-Instruct has 8,291,375,616 parameters.
    _, counts, _ = sizes("recipe=qwen2vl_mis")
    assert counts.num_total == 8_291_375_616
    assert counts.total["embeddings"] == counts.total["head"] == 152_064 * 3_584
    assert counts.total["projector"] == 2 * 1_280 + (5_120**2 + 5_120) + (5_120 * 3_584 + 3_584)
    assert counts.trained["vision"] == 0 and counts.trained["projector"] == counts.total["projector"]


def test_lora_of_internvl_8b() -> None:
    _, counts, _ = sizes("recipe=internvl_mis_lora")
    # Rank 16 on q, k, v, o and the three of the MLP: rank x (in + out) each.
    per_layer = 16 * (2 * (4_096 + 4_096) + 2 * (4_096 + 1_024) + 3 * (4_096 + 14_336))
    assert counts.adapters == {"language": 32 * per_layer}
    assert counts.copies == counts.trained["projector"] == counts.total["projector"]
    assert counts.num_held == counts.num_total + counts.num_adapters + counts.copies


@pytest.mark.parametrize("family", ["internvl", "qwen2vl"])
@pytest.mark.parametrize(
    "settings",
    [
        ("model.train=vision,projector,language",),
        ("model.train=projector,language",),
        ("model.lora.rank=8", "model.train=projector"),
        ("model.lora={rank: 4, targets: [vision, language]}", "model.train=projector"),
        ("model.lora={rank: 4, targets: [language]}", "model.train=[]"),
    ],
)
def test_counts_are_those_of_the_model_that_training_prepares(family: str, settings: tuple[str, ...]) -> None:
    recipe = load_recipe([f"recipe=tiny_{family}_mis", *settings])
    config, _ = model_config(recipe)
    adapter = plan_adapter(recipe, config)
    counts = parameter_counts(config, adapter, recipe.model)
    model = FAMILIES[recipe.model.family][1](config)
    wrapped = select_trainable(model, adapter, recipe.model, base="x", seed=0) or model
    assert counts.num_trained == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert counts.num_held == sum(p.numel() for p in wrapped.parameters())


# Memory


def test_state_of_a_trained_parameter() -> None:
    bf16 = state_bytes_per_parameter(load_recipe(["recipe=internvl_mis"]))
    assert bf16 == {"weights": 2, "gradients": 4, "master weights": 4, "AdamW moments": 8}
    fp32 = state_bytes_per_parameter(load_recipe(["recipe=internvl_mis", "train.precision=fp32"]))
    assert sum(fp32.values()) == 20


@pytest.mark.parametrize(
    ("stage", "divisors"),
    [(1, (1, 1, 8)), (2, (1, 8, 8)), (3, (8, 8, 8))],
)
def test_zero_shards_what_its_stage_says(stage: int, divisors: tuple[int, int, int]) -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis", f"train.zero_stage={stage}")
    device = memory_plan(counts, shape, recipe, world_size=8).device
    trained, everything = 7_771_353_088, 8_075_365_376
    assert device["weights"] == everything * 2 // divisors[0]
    assert device["gradients"] == trained * 4 // divisors[1]
    assert device["optimiser"] == trained * 12 // divisors[2]


def test_paper_run_fits_eight_gpus_and_not_one() -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis")
    eight = memory_plan(counts, shape, recipe, world_size=8)
    # 2.02 + 3.89 + 11.66 GB of state, 2.2 GB of layer inputs, 2.65 GB of logits: 30 to 35 GB in all.
    assert 30e9 < eight.total < 35e9
    assert memory_plan(counts, shape, recipe, world_size=1).total > 140e9
    offloaded = load_recipe(["recipe=internvl_mis", "train.offload_optimizer=true"])
    plan = memory_plan(counts, shape, offloaded, world_size=1)
    assert plan.device["optimiser"] == 0 and plan.host["optimiser"] == 12 * counts.num_trained


def test_checkpointing_keeps_one_layer() -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis")
    kept = load_recipe(["recipe=internvl_mis", "train.gradient_checkpointing=false"])
    few = memory_plan(counts, shape, recipe, world_size=8).device["activations"]
    many = memory_plan(counts, shape, kept, world_size=8).device["activations"]
    # 8,192 tokens x 32 layers x about 201 kB.
    assert 51e9 < many < 54e9 and few < many / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layer_bytes_are_what_autograd_keeps(dtype: torch.dtype) -> None:
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    layer, tokens = LlamaDecoderLayer(config, 0).to(dtype), 96
    hidden = torch.randn(1, tokens, 128, dtype=dtype, requires_grad=True)
    positions = LlamaRotaryEmbedding(config)(hidden, torch.arange(tokens)[None])
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    weights |= {part.untyped_storage().data_ptr() for part in positions}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, position_embeddings=positions)
    shape: Any = SimpleNamespace(hidden_size=128, intermediate_size=448, kv_size=64, num_heads=4)
    # sdpa repeats keys and values for grouped heads on the CPU, which a GPU's kernels do not.
    measured = sum(kept.values()) / tokens
    assert decoder_layer_bytes(shape, dtype.itemsize) == pytest.approx(measured, rel=0.12)


def test_largest_pack_is_the_last_that_fits() -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis")
    tokens = largest_pack(counts, shape, recipe, world_size=8, memory_bytes=40 * 10**9)
    assert tokens % 1024 == 0 and tokens > 8192
    assert memory_plan(counts, shape, recipe, world_size=8, pack_tokens=tokens).total <= 40e9
    assert memory_plan(counts, shape, recipe, world_size=8, pack_tokens=tokens + 1024).total > 40e9
    assert largest_pack(counts, shape, recipe, world_size=1, memory_bytes=40 * 10**9) == 0


# Work


@pytest.mark.parametrize(
    "settings",
    [
        ("model.train=vision,projector,language",),
        ("model.train=projector,language",),
        ("model.lora={rank: 1, targets: [language]}", "model.train=projector"),
    ],
)
def test_work_is_what_pytorch_counts(settings: tuple[str, ...]) -> None:
    recipe = load_recipe(["recipe=tiny_internvl_mis", *settings])
    config, _ = model_config(recipe)
    adapter = plan_adapter(recipe, config)
    counts, shape = parameter_counts(config, adapter, recipe.model), model_shape(config, adapter)
    model = FAMILIES["internvl"][1]._from_config(config, attn_implementation="eager")
    model = select_trainable(model, adapter, recipe.model, base="x", seed=0) or model
    text, images = 600, 2
    ids = torch.tensor([[config.image_token_id] * (images * 4) + [50] * text])
    pixels = torch.randn(images, 3, 56, 56)
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, use_cache=False).logits.sum().backward()
    num_tokens = ids.shape[1]
    work = sample_work(
        counts,
        shape,
        recipe,
        num_tokens=num_tokens,
        num_image_tokens=8,
        num_images=2,
        num_supervised_tokens=num_tokens,
    )
    # Eager attention computes the masked half as well, which the plan does not count.
    masked_half = 2 * shape.hidden_size * num_tokens**2 * shape.num_layers * 3
    assert work.total + masked_half == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_recomputation_costs_a_forward_pass() -> None:
    lengths = {"num_tokens": 912.0, "num_image_tokens": 512.0, "num_images": 2.0, "num_supervised_tokens": 300.0}
    recipe, counts, shape = sizes("recipe=internvl_mis")
    plain = load_recipe(["recipe=internvl_mis", "train.gradient_checkpointing=false"])
    more, less = (sample_work(counts, shape, r, **lengths) for r in (recipe, plain))
    assert more.language / less.language == pytest.approx(4 / 3, rel=0.01)
    # A frozen tower has no backward pass to recompute for.
    assert more.vision == less.vision
    # 6 FLOP a parameter and token: 7 B language parameters x 912 tokens, and the head.
    expected = 6 * 6.98e9 * 912 + 6 * 379e6 * 300
    assert less.language == pytest.approx(expected, rel=0.02)


# Data and report


def test_plan_of_the_paper_run() -> None:
    plan = make_plan(load_recipe(["recipe=internvl_mis", "data.dir=/no/such/folder"]), world_size=8)
    # 4,427 samples x 2 epochs / 128.
    assert plan.num_steps == 70 and len(plan.mixture.lengths) == 4427 and not plan.mixture.exact
    assert "/no/such/folder is not there" in plan.mixture.source and "paper's counts" in plan.mixture.source
    # A square megapixel is one tile of 256 tokens, so 512 for two pictures.
    assert set(plan.mixture.lengths.num_image_tokens.tolist()) == {512}
    assert plan.step_tokens == 128 * 912
    assert make_plan(load_recipe(["recipe=qwen2vl_mis", "data.dir=/no"]), world_size=8).num_steps == 104


def test_plan_with_data_is_exact_for_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dataset(tmp_path / "data")
    recipe = load_recipe(["recipe=tiny_internvl_mis", f"data.dir={folder}", "train.epochs=1.5"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = make_plan(recipe)
    assert plan.mixture.exact and plan.mixture.source == str(folder)
    num_samples = math.ceil(1.5 * len(plan.mixture.lengths))
    assert plan.num_steps == math.ceil(num_samples / 64) and plan.world_size == 2
    full = load_recipe(["recipe=internvl_mis", f"data.dir={folder}"])
    estimated = planned_mixture(full, model_config(full)[0])
    assert not estimated.exact and "estimated at 4 characters a token" in estimated.source


def test_plan_refuses_data_that_cannot_be_trained_on(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    recipe = load_recipe(["recipe=tiny_internvl_mis", f"data.dir={folder}", "data.pack_tokens=16"])
    with pytest.raises(UserError, match=r"data\.pack_tokens is 16"):
        make_plan(recipe)


def test_local_config_is_read_and_checked(tmp_path: Path) -> None:
    config, _ = model_config(load_recipe(["recipe=qwen2vl_mis"]))
    config.text_config.vocab_size = 512
    config.save_pretrained(tmp_path)
    found, name = model_config(load_recipe(["recipe=qwen2vl_mis", f"model.path={tmp_path}"]))
    assert found.text_config.vocab_size == 512 and name == str(tmp_path)
    with pytest.raises(UserError, match=r"model_type is 'qwen2_vl', but model\.family=internvl"):
        model_config(load_recipe(["recipe=internvl_mis", f"model.path={tmp_path}"]))
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 28', '"num_hidden_layers": 2'))
    with pytest.raises(
        UserError, match=r"config\.json: transformers cannot read it: ValueError: `num_hidden_layers` \(2\)"
    ):
        model_config(load_recipe(["recipe=qwen2vl_mis", f"model.path={tmp_path}"]))
    file.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        model_config(load_recipe(["recipe=qwen2vl_mis", f"model.path={tmp_path}"]))


def test_report_says_what_matters() -> None:
    console = Console(width=160, record=True, file=io.StringIO(), highlight=False)
    recipe = load_recipe(["recipe=internvl_mis_lora", "data.dir=/no"])
    render_plan(recipe, world_size=8, memory_bytes=80 * 10**9, console=console)
    text = console.export_text()
    for said in ("8,075,365,376", "41,943,040", "70 (2 epochs) of 128 samples", "ZeRO-3 over 8", "Fits into 80.0 GB"):
        assert said in text
    assert "A checkpoint holds adapters and the parts trained beside them" in text
    small = Console(width=160, record=True, file=io.StringIO(), highlight=False)
    render_plan(
        load_recipe(["recipe=internvl_mis", "data.dir=/no"]), world_size=1, memory_bytes=24 * 10**9, console=small
    )
    assert "Does not fit into 24.0 GB. It does with train.zero_stage=3 on 16 GPUs." in small.export_text()


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("80", 80 * 10**9), ("79.5 GiB", int(79.5 * 2**30)), ("512MB", 512 * 10**6)],
)
def test_memory_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80TBX", "0", "nan", "1e99GB"])
def test_bad_memory_sizes(text: str) -> None:
    with pytest.raises(UserError, match="must be a size such as 80GB"):
        parse_memory(text)


def test_processes_to_plan_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_world_size(load_recipe(["recipe=internvl_mis"]))[0] == 8
    assert default_world_size(load_recipe(["recipe=tiny_internvl_mis"]))[0] == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert default_world_size(load_recipe(["recipe=internvl_mis"]))[0] == 3
