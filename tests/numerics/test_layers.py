"""Layers that recompute their activations or are compiled give the same gradients; the former hold less memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from mirage.config.schema import TinyConfig, TrainConfig
from mirage.data.collate import PackedBatch, collate
from mirage.errors import UserError
from mirage.models.tiny import build_tiny
from mirage.training.layers import checkpoint_layers, compile_layers, compiled_graphs, gather_by_layer
from mirage.training.loss import PackedLossModel
from tests.support.models import PREPROCESSING, flat_gradients, fresh, relative_difference, samples

FAMILIES = ("internvl", "qwen2_vl")
DEEP = TinyConfig(
    hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=128, vision_hidden_size=32,
    vision_layers=2, vocab_size=400, warmup_steps=0,
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "model"
    folder.mkdir()
    build_tiny(folder, request.param, DEEP, PREPROCESSING, data_dir=shapes, seed=0)
    return folder


def settings(**options: Any) -> TrainConfig:
    return TrainConfig(**{"zero_stage": 2, "gradient_checkpointing": False, **options})


def live_bytes() -> int:
    """Bytes of all storages that tensors which Python can see hold, and what autograd keeps through them."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Kept:
    """Bytes that a forward pass leaves for the backward pass, those of the model and the batch not counted.

    Tensors of layers that recompute never reach this hook: what they hold are their inputs, which `live_bytes` sees.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        alias = tensor.detach()
        self._tensors.append(alias)
        return alias

    def measure(self, wrapped: PackedLossModel, batch: PackedBatch) -> tuple[int, dict[str, torch.Tensor]]:
        before = live_bytes()
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda alias: alias):
            loss, _, _ = wrapped(batch)
        kept = live_bytes() - before
        self._tensors.clear()
        loss.backward()
        return kept, flat_gradients(wrapped.hf)


def test_gradients_are_the_same_and_memory_falls_with_each_layer(deep: Path, shapes: Path) -> None:
    kept, gradients, counts = {}, {}, {}
    for number in (0, 1, 2, 3, 4, None):
        model, adapter = fresh(deep)
        options = {"gradient_checkpointing": number != 0, "checkpoint_layers": number or None}
        counts[number] = checkpoint_layers(model, adapter, settings(**options))
        batch = collate(samples(shapes, deep, adapter, [0, 9, 16, 17, 3, 19]), adapter)
        kept[number], gradients[number] = Kept().measure(PackedLossModel(model), batch)
    assert all(torch.equal(found[name], gradients[0][name]) for found in gradients.values() for name in found), (
        "recomputing repeats the same operations"
    )
    # Both layers of the vision tower recompute too.
    assert [counts[number] for number in (0, 1, 2, 3, 4, None)] == [0, 3, 4, 5, 6, 6]
    steps = [kept[number] - kept[number + 1] for number in (1, 2, 3)]
    assert min(steps) > 0.1 * kept[0] and kept[None] == kept[4]
    assert max(steps) < 1.1 * min(steps), "each layer saves as much"


def test_more_layers_than_there_are_is_refused(deep: Path) -> None:
    model, adapter = fresh(deep)
    with pytest.raises(UserError, match=r"train\.checkpoint_layers=5 and the language model has 4 layers"):
        checkpoint_layers(model, adapter, settings(gradient_checkpointing=True, checkpoint_layers=5))


def test_zero_3_gathers_layers_and_nothing_larger_or_smaller(deep: Path) -> None:
    from deepspeed.utils import get_z3_leaf_modules

    model, _ = fresh(deep)
    assert gather_by_layer(model) == DEEP.num_layers + DEEP.vision_layers
    names = {type(module).__name__ for module in get_z3_leaf_modules(model)}
    assert len(get_z3_leaf_modules(model)) == DEEP.num_layers + DEEP.vision_layers
    assert names in ({"LlamaDecoderLayer", "InternVLVisionLayer"}, {"Qwen2VLDecoderLayer", "Qwen2VLVisionBlock"})


def test_what_is_compiled_is_what_the_recipe_names(deep: Path) -> None:
    for mode in ("off", "language", "vision", "all"):
        model, adapter = fresh(deep)
        count = compile_layers(model, adapter, settings(compile=mode))
        compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
        assert len(compiled) == count and (count == 0) == (mode == "off")
        groups = {adapter.group_of(name) for name in compiled}
        assert groups == {"off": set(), "all": {"language", "vision"}}.get(mode, {mode})
        assert all(name.endswith("mlp") or "norm" in name for name in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_train_the_same_and_are_built_once(deep: Path, shapes: Path, recompute: bool) -> None:
    plain, adapter = fresh(deep)
    model, _ = fresh(deep)
    config = settings(compile="all", gradient_checkpointing=recompute)
    checkpoint_layers(model, adapter, config)
    compile_layers(model, adapter, config)
    graphs = []
    for numbers in ([0, 9, 16], [1, 2, 3, 17], [4, 5], [6, 7, 19, 18, 10]):
        batch = collate(samples(shapes, deep, adapter, numbers), adapter)
        losses = []
        for each in (plain, model):
            each.zero_grad()
            loss, _, _ = PackedLossModel(each)(batch)
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        assert relative_difference(flat_gradients(model), flat_gradients(plain)) < 1e-5
        graphs.append(compiled_graphs())
    # Packs of other lengths take the graphs of the first, and layers share them.
    assert graphs[0] == graphs[-1] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
