"""What is done to layers before training: which recompute their activations, what is compiled, what ZeRO-3 gathers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from mirage.config.schema import TrainConfig
from mirage.errors import UserError
from mirage.models.adapter import ModelAdapter


def checkpoint_layers(model: Any, adapter: ModelAdapter, config: TrainConfig) -> int:
    """Make layers recompute their activations in the backward pass; returns how many do.

    All layers, or of the language model the first `train.checkpoint_layers` alone: the later a layer, the sooner the
    backward pass frees what it kept. Raises `UserError` when there are not so many.
    """
    if not config.gradient_checkpointing:
        return 0
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # transformers gives the output of every embedding a gradient, pixels' too, which only reentrant recomputing needs:
    # a frozen vision tower would keep its activations, run again and be gone back through for nothing.
    model.disable_input_require_grads()
    layers = _layers(model)
    language = [layer for name, layer in layers.items() if adapter.group_of(name) == "language"]
    if config.checkpoint_layers is not None:
        if config.checkpoint_layers > len(language):
            raise UserError(
                f"train.checkpoint_layers={config.checkpoint_layers} and the language model has {len(language)} "
                "layers; lower it, or set it to null for all"
            )
        for layer in language[config.checkpoint_layers :]:
            layer.gradient_checkpointing = False
    return sum(layer.gradient_checkpointing for layer in layers.values())


def _layers(model: Any) -> dict[str, GradientCheckpointingLayer]:
    """Layers by name, in order; peft wraps modules inside them, not the layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}


def gather_by_layer(model: Any) -> int:
    """Make ZeRO-3 gather and release each layer's weights at once; returns how many layers. Same bits.

    DeepSpeed otherwise hooks every module inside them, which costs the host more than small kernels cost a GPU
    (deepspeed.utils.z3_leaf_module).
    """
    from deepspeed.utils import set_z3_leaf_module

    layers = _layers(model)
    for layer in layers.values():
        set_z3_leaf_module(layer, True)
    return len(layers)


def compile_layers(model: Any, adapter: ModelAdapter, config: TrainConfig) -> int:
    """Compile the feed-forward block and the RMS norms of each layer with torch.compile; returns how many modules.

    They are chains of small operations (torch's own LayerNorm is one kernel).

    Attention stays as it is: it is a fused kernel already, and packed rows hand it a list of lengths that differs in
    every row, for which a compiled layer would be built again and again. Lengths are dynamic, so one build serves all.
    """
    groups = {"off": (), "language": ("language",), "vision": ("vision",), "all": ("language", "vision")}[
        config.compile
    ]
    parts = [
        module
        for name, layer in _layers(model).items()
        if adapter.group_of(name) in groups
        for part, module in layer.named_modules()
        if part == "mlp" or type(module).__name__.endswith("RMSNorm")
    ]
    for module in parts:
        module.compile(dynamic=True)
    return len(parts)


def compiled_graphs() -> int:
    """Graphs that torch.compile has built in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
