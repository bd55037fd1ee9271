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
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.plan_memory import CASES, COMMON, in_process
from mirage.cli import plan as plan_command
from mirage.config import Recipe, load_recipe
from mirage.data.collate import collate
from mirage.data.lengths import index_rows
from mirage.data.pictures import PictureLoader
from mirage.data.render import render_sample
from mirage.data.sources import load_mixture
from mirage.errors import UserError
from mirage.models.attention import PACKED_SDPA, padded_positions
from mirage.models.lora import select_trainable
from mirage.models.registry import FAMILIES
from mirage.models.tiny import train_tokenizer
from mirage.training.loss import PackedLossModel
from mirage.training.plan import (
    ParameterCounts,
    Shape,
    default_world_size,
    model_config,
    model_shape,
    parameter_counts,
    parse_memory,
    plan_adapter,
    sample_work,
)
from mirage.training.plan_data import planned_mixture
from mirage.training.plan_memory import (
    Kernels,
    PackShape,
    decoder_layer_bytes,
    evaluation_bytes,
    largest_pack,
    memory_plan,
    planned_kernels,
    state_bytes_per_parameter,
)
from mirage.training.plan_report import make_plan, render_plan
from tests.support.dataset import write_dataset
from tests.support.published import FIXTURES, small_config, write_published


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
    ("stage", "gradient_bytes", "divisors"),
    # Stage 1 keeps the backward pass's bf16 gradients beside their sum in fp32.
    [(1, 6, (1, 1, 8)), (2, 4, (1, 8, 8)), (3, 4, (8, 8, 8))],
)
def test_zero_shards_what_its_stage_says(stage: int, gradient_bytes: int, divisors: tuple[int, int, int]) -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis", f"train.zero_stage={stage}")
    state = memory_plan(counts, shape, recipe, world_size=8).state
    trained, everything = 7_771_353_088, 8_075_365_376
    assert state["weights"] == everything * 2 // divisors[0]
    assert state["gradients"] == trained * gradient_bytes // divisors[1]
    assert state["optimiser"] == trained * 12 // divisors[2]


def test_paper_run_fits_eight_gpus_and_not_one() -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis")
    # The paper's rows: two pictures of a tile each, 300 of 912 tokens learnt.
    pack = PackShape(8192, image_share=512 / 912, supervised_share=300 / 912)
    eight = memory_plan(counts, shape, recipe, world_size=8, pack=pack)
    # State 2.02 + 3.89 + 11.66 GB and 0.13 of buckets; the update adds a flat copy of the gradients and AdamW's
    # denominator, 2 x 3.89. The loss comes close: 2.1 gathered, 2.6 of layer inputs and 2.27 of the head's gradient, in
    # bf16 and, on its way out, fp32 (a chunk's logits beside it are 1.14 + 0.76). With 1.5 GB of context and 5 %: 28.2.
    assert eight.peak == "optimiser step"
    assert eight.total == pytest.approx(28.24e9, rel=0.005)
    assert eight.tensor_bytes("loss") == pytest.approx(24.6e9, rel=0.005)
    assert memory_plan(counts, shape, recipe, world_size=1).total > 140e9


def test_a_checkpoint_being_written_is_on_the_host() -> None:
    name = "a checkpoint being written (the first process)"
    for recipe_name, weights in (("internvl_mis", 2 * 8.075e9), ("internvl_mis_lora", 0)):
        recipe, counts, shape = sizes(f"recipe={recipe_name}")
        found = memory_plan(counts, shape, recipe, world_size=8).host[name]
        per_trained = 12 / 8 + (0 if weights else state_bytes_per_parameter(recipe)["weights"])
        assert found == pytest.approx(weights + per_trained * counts.num_trained, rel=1e-3)


def test_offloaded_state_is_on_the_host() -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis", "train.offload_optimizer=true")
    plan = memory_plan(counts, shape, recipe, world_size=8)
    share = counts.num_trained / 8
    assert plan.state["optimiser"] == plan.state["gradients"] == 0 and plan.peak == "loss"
    assert plan.host["optimiser"] == pytest.approx(12 * share, rel=1e-6)
    assert plan.host["gradients"] == pytest.approx(8 * share, rel=1e-6)


def test_offloaded_weights_are_on_the_host() -> None:
    offloaded = ["train.offload_optimizer=true", "train.offload_parameters=true"]
    recipe, counts, shape = sizes("recipe=internvl_mis", *offloaded)
    plan = memory_plan(counts, shape, recipe, world_size=8)
    assert plan.state["weights"] == 0 and plan.host["weights"] == pytest.approx(2 * counts.num_held / 8, rel=1e-6)


def test_layers_that_do_not_recompute_keep_their_activations() -> None:
    kept = []
    for settings in (["checkpoint_layers=null"], ["checkpoint_layers=32"], ["checkpoint_layers=31"],
                     ["checkpoint_layers=1"], ["gradient_checkpointing=false"]):  # fmt: skip
        recipe, counts, shape = sizes("recipe=internvl_mis", *(f"train.{setting}" for setting in settings))
        kept.append(memory_plan(counts, shape, recipe, world_size=8).moments["backward"]["activations"])
    assert kept[0] == kept[1] and shape.num_layers == 32
    layer = kept[2] - kept[1]
    assert (
        layer > 0 and kept[3] - kept[1] == pytest.approx(31 * layer) and kept[4] - kept[1] == pytest.approx(32 * layer)
    )


def test_one_rank_gathers_nothing() -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis")
    one, two = (memory_plan(counts, shape, recipe, world_size=size).moments["loss"] for size in (1, 2))
    assert one["gathered weights"] == 0 and two["gathered weights"] == 2 * (10**9 + 4096**2)


def test_four_bits_hold_the_decoder_alone() -> None:
    plain = ("recipe=internvl_mis_lora", "train.zero_stage=2")
    _, whole, shape = sizes(*plain)
    recipe, counts, _ = sizes(*plain, "model.quantize=4bit")
    linear = 32 * (2 * 4_096**2 + 2 * 4_096 * 1_024 + 3 * 4_096 * 14_336)
    assert (whole.num_quantised, counts.num_quantised) == (0, linear)
    full, four = (memory_plan(c, shape, r, world_size=1) for c, r in ((whole, load_recipe(plain)), (counts, recipe)))
    # QLoRA: 4.127 bits instead of 16, 10.4 GB less; one unpacked matrix of 4,096 x 14,336 comes and goes.
    assert full.state["weights"] - four.state["weights"] == pytest.approx(linear * (16 - 4.127) / 8, rel=1e-6)
    assert four.moments["loss"]["unpacked weights"] == 2 * 4_096 * 14_336


def test_checkpointing_keeps_one_layer() -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis")
    kept = load_recipe(["recipe=internvl_mis", "train.gradient_checkpointing=false"])
    few, many = (memory_plan(counts, shape, r, world_size=8).moments["backward"] for r in (recipe, kept))
    # 8,192 tokens x 32 layers x about 201 kB.
    assert 51e9 < many["activations"] < 54e9 and few["activations"] < many["activations"] / 10
    assert few["work in one layer"] == pytest.approx(8192 * 276e3, rel=0.01)


@pytest.mark.parametrize(
    ("requested", "tiny", "gpu", "kernels"),
    [
        ("auto", True, False, ("cpu", "padded")),
        ("auto", False, False, ("cuda", "flash")),
        ("sdpa", False, False, ("cuda", "padded")),
        ("eager", False, True, ("cuda", "scores")),
    ],
)
def test_kernels_of_a_plan(
    requested: str, tiny: bool, gpu: bool, kernels: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    name = "tiny_internvl_mis" if tiny else "internvl_mis"
    assert planned_kernels(load_recipe([f"recipe={name}", f"model.attention={requested}"])) == Kernels(*kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("implementation", "attention", "samples"),
    [(PACKED_SDPA, "padded", [60, 36]), ("eager", "scores", [96]), ("sdpa", "flash", [96])],
)
def test_layer_bytes_are_what_autograd_keeps(
    implementation: str, attention: str, samples: list[int], dtype: torch.dtype
) -> None:
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=implementation,
    )
    layer, tokens = LlamaDecoderLayer(config, 0).to(dtype), sum(samples)
    hidden = torch.randn(1, tokens, 128, dtype=dtype, requires_grad=True)
    positions = LlamaRotaryEmbedding(config)(hidden, torch.arange(tokens)[None])
    borders = torch.tensor([0, *samples]).cumsum(0).int()
    known = [*layer.parameters(), *positions]
    measured = kept_bytes(lambda: layer(hidden, position_embeddings=positions, cu_seq_lens_q=borders), known) / tokens
    shape: Any = SimpleNamespace(hidden_size=128, intermediate_size=448, kv_size=64, num_heads=4)
    pack = PackShape(tokens, attention_padding=padded_positions(samples) / tokens)
    # transformers' own sdpa computes in the given type, as a GPU's kernels do.
    kernels = Kernels("cuda" if implementation == "sdpa" else "cpu", attention)
    assert decoder_layer_bytes(shape, dtype.itemsize, kernels, pack) == pytest.approx(measured, rel=0.01)


def kept_bytes(forward: Any, known: list[torch.Tensor]) -> int:
    """Bytes of the storages that `forward()` leaves for the backward pass, those of `known` tensors not counted."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(forward())
    return sum(kept.values())


@pytest.mark.parametrize("family", ["internvl", "qwen2vl"])
@pytest.mark.parametrize("lora", [False, True])
def test_activations_of_a_packed_row_are_what_autograd_keeps(family: str, lora: bool, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", edge=112)
    name = f"recipe=tiny_{family}_mis" + ("_lora" if lora else "")
    recipe, counts, shape = sizes(name, f"data.dir={folder}", "model.tiny.vocab_size=400")
    config, _ = model_config(recipe)
    rows = load_mixture(recipe.data, seed=0).rows
    texts = [message.text for entry in rows for message in entry.row.messages]
    tokenizer = train_tokenizer(texts, family=recipe.model.family, vocab_size=400)
    adapter = plan_adapter(recipe, config, tokenizer)
    rows, index, _ = index_rows(rows, adapter, recipe.data)
    chosen, loader = list(range(6)), PictureLoader(adapter, cache_bytes=0)
    batch = collate([render_sample(rows[number], adapter, loader) for number in chosen], adapter)
    model = FAMILIES[recipe.model.family][1]._from_config(config, attn_implementation=PACKED_SDPA, dtype=torch.bfloat16)
    wrapped = select_trainable(model, adapter, recipe.model, base="x", seed=0) or model
    # DeepSpeed casts adapters to the run's precision with all else.
    loss, batch = PackedLossModel(model.to(torch.bfloat16)).train(), batch.to(torch.device("cpu"), torch.bfloat16)
    known = [*wrapped.parameters(), *model.buffers(), *(v for v in batch.inputs.values() if torch.is_tensor(v))]
    measured = kept_bytes(lambda: loss(batch)[0], known)
    lengths = index.num_tokens[chosen]
    tokens = int(lengths.sum())
    pack = PackShape(
        tokens,
        image_share=index.num_image_tokens[chosen].sum() / tokens,
        supervised_share=index.num_supervised_tokens[chosen].sum() / tokens,
        attention_padding=padded_positions(lengths.tolist()) / tokens,
    )
    plan = memory_plan(counts, shape, recipe, world_size=1, pack=pack, kernels=Kernels("cpu", "padded"))
    # The log-probabilities that the loss keeps are part of its own moment.
    logits = 4 * config.text_config.vocab_size * pack.supervised_share * tokens
    assert plan.moments["loss"]["activations"] + logits == pytest.approx(measured, rel=0.05)


def test_plan_of_a_measured_step(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", edge=112, seed_rows=24)
    settings = [*CASES["tiny, checkpointing"], *COMMON, f"data.dir={folder}", f"run_dir={tmp_path / 'run'}"]
    found = in_process(settings, cache=tmp_path / "cache")
    for phase, moment in (("backward", "backward"), ("step", "optimiser step")):
        assert found["moments"][moment] == pytest.approx(found["measured"][phase], rel=0.15)
    assert found["predicted_process"] == pytest.approx(found["process"], rel=0.25)


def test_largest_pack_is_the_last_that_fits() -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis")
    tokens = largest_pack(counts, shape, recipe, world_size=8, memory_bytes=40 * 10**9)
    assert tokens % 1024 == 0 and tokens > 8192
    assert memory_plan(counts, shape, recipe, world_size=8, pack=PackShape(tokens)).total <= 40e9
    assert memory_plan(counts, shape, recipe, world_size=8, pack=PackShape(tokens + 1024)).total > 40e9
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
    with pytest.raises(UserError, match="not valid JSON"):
        model_config(load_recipe(["recipe=qwen2vl_mis", f"model.path={tmp_path}"]))


def test_published_folder_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "qwen2"
    # Sizes of a Qwen2 language model in InternVL's own layout; its weights tell how many parameters there are.
    llm = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 2}
    write_published(small, small_config(llm=llm))
    for folder in (FIXTURES / "model", small):
        settings = ["recipe=internvl_mis", f"model.path={folder}", "preprocessing.image_size=56"]
        _, counts, shape = sizes(*settings)
        stored = 0
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="np") as tensors:
                names = tensors.keys()
                stored += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
        assert counts.num_total == stored
        assert shape.num_layers == (2 if folder == small else 3) and shape.vision_window_tokens == 17
        assert plan_command([*settings, "data.dir=/no/such/folder", "gpus=2"]) == 0
        assert f"{stored:,}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"model_type is 'internvl_chat', but model\.family=qwen2_vl"):
        model_config(load_recipe(["recipe=qwen2vl_mis", f"model.path={small}"]))


def test_report_says_what_matters() -> None:
    console = Console(width=160, record=True, file=io.StringIO(), highlight=False)
    recipe = load_recipe(["recipe=internvl_mis_lora", "data.dir=/no"])
    render_plan(recipe, world_size=8, memory_bytes=80 * 10**9, console=console)
    text = console.export_text()
    for said in (
        "8,075,365,376",
        "41,943,040",
        "70 (2 epochs) of 128 samples",
        "ZeRO-3 over 8",
        "Fits into 80.0 GB",
        "The peak is at the",
    ):
        assert said in text
    assert "A checkpoint holds adapters and the parts trained beside them" in text
    small = Console(width=160, record=True, file=io.StringIO(), highlight=False)
    render_plan(
        load_recipe(["recipe=internvl_mis", "data.dir=/no"]), world_size=1, memory_bytes=24 * 10**9, console=small
    )
    assert (
        "Does not fit into 24.0 GB. It does with train.zero_stage=3 train.offload_optimizer=true."
        in small.export_text()
    )


def test_evaluation_holds_the_model_once_more_beside_training() -> None:
    recipe, counts, shape = sizes("recipe=internvl_mis_lora", "eval.batch_size=8", "eval.max_new_tokens=48")
    plan = memory_plan(counts, shape, recipe, world_size=1)
    parts = evaluation_bytes(counts, shape, recipe, plan, prompt_tokens=700)
    assert parts["the model once more"] == 2 * counts.num_held
    # 32 layers of 8 heads of 128, keys and values, two bytes each.
    assert parts["keys and values"] == 32 * 8 * 128 * 2 * 2 * 8 * (700 + 48)
    # An H100 held 34.72 GB at most up to such a run's first step, its evaluation of the base included; the prompts'
    # length is assumed. With adapters it held 36.18 GB, 4 % above this.
    assert sum(parts.values()) == pytest.approx(34.72e9, rel=0.02)
    elsewhere = sizes("recipe=internvl_mis_lora", "eval.mode=worker")[0]
    assert evaluation_bytes(counts, shape, elsewhere, plan, prompt_tokens=700) == {}


def test_report_says_that_evaluation_does_not_fit() -> None:
    quantised = ["recipe=internvl_mis_lora", "data.dir=/no", "train.zero_stage=2", "model.quantize=4bit"]

    def said(*more: str) -> str:
        console = Console(width=300, record=True, file=io.StringIO(), highlight=False)
        render_plan(load_recipe([*quantised, *more]), world_size=1, memory_bytes=24 * 10**9, console=console)
        return console.export_text()

    text = said()
    assert "Fits into 24.0 GB" in text and "Evaluation between steps (eval.mode=inline)" in text
    assert "Evaluation does not fit into 24.0 GB. eval.mode=worker measures on another GPU" in text
    assert "Evaluation" not in said("eval.mode=worker")


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
