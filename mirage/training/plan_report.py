"""The plan in the terminal: recipe, parameters, steps, memory and work, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirage.config.loader import recipe_hash
from mirage.config.schema import Recipe
from mirage.config.values import format_value
from mirage.data.lengths import LengthIndex
from mirage.data.pack import PackPlan
from mirage.models.attention import padded_positions
from mirage.tracking.terminal_text import SafeConsole
from mirage.training.plan import (
    PARTS,
    ParameterCounts,
    Shape,
    Work,
    default_world_size,
    model_config,
    model_shape,
    parameter_counts,
    plan_adapter,
    sample_work,
)
from mirage.training.plan_data import PlannedMixture, planned_mixture
from mirage.training.plan_memory import (
    MemoryPlan,
    PackShape,
    evaluation_bytes,
    largest_pack,
    memory_plan,
    planned_kernels,
    with_context,
)

_DEFAULT_MEMORY_BYTES = 80 * 10**9
_ATTENTION = {
    "flash": "flash attention",
    "padded": "SDPA over padded samples",
    "scores": "eager attention, scores kept",
}
# Dense bf16 peak of an A100, the paper's GPU (NVIDIA's data sheet), and the share of it that such training reaches.
_A100_FLOPS, _UTILISATION = 312e12, 0.4


@dataclass(frozen=True)
class RunPlan:
    """Everything that the report says, as values."""

    recipe: Recipe
    model_name: str
    counts: ParameterCounts
    shape: Shape
    mixture: PlannedMixture
    world_size: int
    world_note: str
    num_steps: int
    step_tokens: float
    micro_steps: int
    memory: MemoryPlan
    memory_bytes: int
    largest_pack_tokens: int
    step_work: Work


def make_plan(recipe: Recipe, *, world_size: int | None = None, memory_bytes: int | None = None) -> RunPlan:
    """Work the plan out. Raises `UserError` for data that is there and cannot be trained on."""
    config, model_name = model_config(recipe)
    adapter = plan_adapter(recipe, config)
    counts, shape = parameter_counts(config, adapter, recipe.model), model_shape(config, adapter)
    mixture = planned_mixture(recipe, config)
    note = "as asked"
    if world_size is None:
        world_size, note = default_world_size(recipe)
    if memory_bytes is None:
        gpu = torch.cuda.is_available()
        memory_bytes = torch.cuda.get_device_properties(0).total_memory if gpu else _DEFAULT_MEMORY_BYTES
    packs = PackPlan.from_recipe(mixture.lengths, recipe, world_size=world_size)
    lengths = mixture.lengths
    samples = len(lengths) * min(1 / packs.steps_per_epoch, max(1.0, recipe.train.epochs))
    pack = _largest_shape(packs, lengths, recipe.data.pack_tokens)
    work = sample_work(
        counts,
        shape,
        recipe,
        num_tokens=float(lengths.num_tokens.mean()),
        num_image_tokens=float(lengths.num_image_tokens.mean()),
        num_images=float(mixture.num_images.mean()),
        num_supervised_tokens=float(lengths.num_supervised_tokens.mean()),
    )
    sizes: dict[str, Any] = {"world_size": world_size, "pack": pack}
    return RunPlan(
        recipe=recipe,
        model_name=model_name,
        counts=counts,
        shape=shape,
        mixture=mixture,
        world_size=world_size,
        world_note=note,
        num_steps=packs.num_steps,
        step_tokens=samples * float(lengths.num_tokens.mean()),
        micro_steps=len(packs.step(0).rows),
        memory=memory_plan(counts, shape, recipe, **sizes),
        memory_bytes=memory_bytes,
        largest_pack_tokens=largest_pack(counts, shape, recipe, memory_bytes=memory_bytes, **sizes),
        step_work=Work(work.vision * samples, work.language * samples),
    )


def _largest_shape(packs: PackPlan, lengths: LengthIndex, pack_tokens: int) -> PackShape:
    """A full pack with the largest shares of any row, and the padding of the first step's fullest packs."""
    rows = [lengths.num_tokens[list(row)] for micro in packs.step(0).rows for row in micro if len(row)]
    padded, fullest = max(padded_positions(row.tolist()) for row in rows), max(int(row.sum()) for row in rows)
    return PackShape(
        pack_tokens,
        image_share=float((lengths.num_image_tokens / lengths.num_tokens).max()),
        supervised_share=float((lengths.num_supervised_tokens / lengths.num_tokens).max()),
        attention_padding=padded / fullest,
    )


def render_plan(
    recipe: Recipe,
    *,
    world_size: int | None = None,
    memory_bytes: int | None = None,
    console: Console | None = None,
) -> None:
    """Print the resolved recipe and its plan."""
    console = console or SafeConsole(highlight=False)
    plan = make_plan(recipe, world_size=world_size, memory_bytes=memory_bytes)
    _print_recipe(console, recipe)
    _print_parameters(console, plan)
    _print_steps(console, plan)
    _print_memory(console, plan)
    _print_work(console, plan)


def _print_recipe(console: Console, recipe: Recipe) -> None:
    console.print(Text.assemble(("Recipe ", "bold"), (recipe.name, "bold cyan"), f"  {recipe_hash(recipe)}"))
    table = _table("", "")
    for name, value in recipe:
        if isinstance(value, BaseModel):
            text = "  ".join(f"{key}={format_value(item)}" for key, item in value)
            table.add_row(Text(name, style="cyan"), Text(text))
        elif name != "name":
            table.add_row(Text(name, style="cyan"), Text(format_value(value)))
    table.show_header = False
    console.print(table)


def _print_parameters(console: Console, plan: RunPlan) -> None:
    counts, lora = plan.counts, plan.recipe.model.lora is not None
    console.print(Text.assemble(("\nModel ", "bold"), plan.model_name))
    table = _table("part", "parameters", "trained", "adapters", "saved")
    for part in PARTS:
        group = "language" if part in ("embeddings", "head") else part
        adapters = counts.adapters.get(group, 0) if part == group else 0
        saved = counts.trained[part] + adapters if lora else counts.total[part]
        numbers = (counts.total[part], counts.trained[part], adapters, saved)
        table.add_row(part, *(f"{number:,}" if number else "-" for number in numbers))
    saved = counts.num_trained if lora else counts.num_total
    total = (counts.num_total, sum(counts.trained.values()), counts.num_adapters, saved)
    table.add_row("all", *(f"{number:,}" if number else "-" for number in total), style="bold")
    console.print(table)
    share = counts.num_trained / counts.num_total
    what = "adapters and the parts trained beside them (peft)" if lora else "the whole model"
    console.print(f"Trained: {share:.1%} of {_millions(counts.num_total)}. A checkpoint holds {what}.")


def _print_steps(console: Console, plan: RunPlan) -> None:
    lengths, recipe = plan.mixture.lengths, plan.recipe
    console.print(Text("\nData and steps", style="bold"))
    table = _table("", "")
    table.show_header = False
    mark = "" if plan.mixture.exact else "about "
    images = lengths.num_image_tokens.sum() / lengths.num_tokens.sum()
    supervised = lengths.num_supervised_tokens.sum() / lengths.num_tokens.sum()
    table.add_row("from", Text(plan.mixture.source))
    table.add_row("samples", f"{len(lengths):,}, {plan.mixture.num_images.mean():.2f} pictures each")
    shares = f"{images:.0%} image tokens, {supervised:.0%} supervised"
    longest = int(np.max(lengths.num_tokens))
    table.add_row("tokens a sample", f"{mark}{lengths.num_tokens.mean():,.0f} (longest {longest:,}): {shares}")
    epochs = format_value(float(recipe.train.epochs))
    limit = " (train.max_steps)" if recipe.train.max_steps == plan.num_steps else f" ({epochs} epochs)"
    table.add_row("optimiser steps", f"{plan.num_steps:,}{limit} of {_batch(recipe)}")
    table.add_row("tokens a step", f"{mark}{plan.step_tokens:,.0f}")
    packs = f"{plan.micro_steps} packs of at most {recipe.data.pack_tokens:,} tokens a step and process"
    table.add_row(
        "packing", f"{packs}, {plan.world_size} process{'es' if plan.world_size > 1 else ''} ({plan.world_note})"
    )
    console.print(table)
    if longest > recipe.data.pack_tokens:
        console.print(f"[red]The longest sample does not fit into data.pack_tokens={recipe.data.pack_tokens}.[/red]")


def _batch(recipe: Recipe) -> str:
    if recipe.train.batch_packs is not None:
        return f"{recipe.train.batch_packs} packs"
    return f"{recipe.train.batch_samples} samples"


def _print_memory(console: Console, plan: RunPlan) -> None:
    train = plan.recipe.train
    kernels = planned_kernels(plan.recipe)
    place = "GPU" if kernels.device_type == "cuda" else "process"
    how = f"ZeRO-{train.zero_stage} over {plan.world_size}, {train.precision}"
    how += ", gradient checkpointing" if train.gradient_checkpointing else ""
    how += ", language layers in 4 bits" if plan.counts.num_quantised else ""
    how += f", {_ATTENTION[kernels.attention]}"
    console.print(Text.assemble((f"\nMemory a {place} ", "bold"), f"(estimate; {how})"))
    memory = plan.memory
    table = _table("GB", *memory.moments)
    for name, size in memory.state.items():
        table.add_row(name, *[_gigabytes(size)] * len(memory.moments))
    for name in dict.fromkeys(part for parts in memory.moments.values() for part in parts):
        sizes = [parts.get(name, 0) for parts in memory.moments.values()]
        if any(sizes):
            table.add_row(name, *(_gigabytes(size) if size else "-" for size in sizes))
    table.add_row("all", *(_gigabytes(memory.tensor_bytes(moment)) for moment in memory.moments), style="bold")
    console.print(table)
    tensors = f"{_gigabytes(memory.tensor_bytes(memory.peak))} GB of tensors"
    beside = "context and fragmentation" if kernels.device_type == "cuda" else "the process itself"
    console.print(f"The peak is at the {memory.peak}: {tensors}, {_gigabytes(memory.total)} GB with {beside}.")
    for name, size in plan.memory.host.items():
        console.print(f"Host memory a process, {name}: {_gigabytes(size)} GB")
    available = _gigabytes(plan.memory_bytes)
    if plan.recipe.model.tiny is not None:
        return
    if plan.memory.total > plan.memory_bytes:
        console.print(f"[red]Does not fit into {available} GB.[/red] {_remedy(plan)}")
    else:
        console.print(f"Fits into {available} GB; data.pack_tokens could be up to {plan.largest_pack_tokens:,}.")
    _print_evaluation(console, plan)


def _print_evaluation(console: Console, plan: RunPlan) -> None:
    """What answering between steps needs, which holds the model twice."""
    config, kernels = plan.recipe.eval, planned_kernels(plan.recipe)
    # The test's prompts are not read here: the longest training sample, answer and all, stands for them.
    prompt_tokens = int(np.max(plan.mixture.lengths.num_tokens))
    parts = evaluation_bytes(plan.counts, plan.shape, plan.recipe, plan.memory, prompt_tokens=prompt_tokens)
    if not parts:
        return
    total = with_context(sum(parts.values()), device_type=kernels.device_type)
    told = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())
    console.print(f"Evaluation between steps (eval.mode={config.mode}): {_gigabytes(total)} GB, of it {told}.")
    if total > plan.memory_bytes:
        console.print(
            f"[red]Evaluation does not fit into {_gigabytes(plan.memory_bytes)} GB.[/red] eval.mode=worker measures on "
            f"another GPU; a smaller eval.batch_size (now {config.batch_size}) saves keys and values."
        )


def _remedy(plan: RunPlan) -> str:
    """The first change that makes the run fit, the cheapest first."""
    recipe = plan.recipe
    if plan.largest_pack_tokens:
        return f"It does with data.pack_tokens={plan.largest_pack_tokens}."
    sharded = _with_train(recipe, zero_stage=3)
    options = [
        ("train.zero_stage=3", sharded, plan.world_size),
        (
            "train.zero_stage=3 train.offload_optimizer=true",
            _with_train(sharded, offload_optimizer=True),
            plan.world_size,
        ),
        *(
            (f"train.zero_stage=3 on {size} GPUs", sharded, size)
            for size in (2, 4, 8, 16, 32, 64)
            if size > plan.world_size
        ),
    ]
    fitting = [
        name
        for name, changed, world_size in options
        if memory_plan(plan.counts, plan.shape, changed, world_size=world_size).total <= plan.memory_bytes
    ]
    adapters = "" if recipe.model.lora is not None else " A *_lora recipe needs the least."
    return (f"It does with {fitting[0]}." if fitting else "Take larger GPUs.") + adapters


def _with_train(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _print_work(console: Console, plan: RunPlan) -> None:
    work = plan.step_work
    console.print(Text("\nWork", style="bold"))
    share = work.vision / work.total
    console.print(
        f"A step: {_flops(work.total)} ({_flops(work.language)} language, {_flops(work.vision)} vision, {share:.0%})"
    )
    total = work.total * plan.num_steps
    console.print(f"The run: {_flops(total)}")
    if plan.recipe.model.tiny is None:
        hours = total / (_A100_FLOPS * _UTILISATION * plan.world_size) / 3600
        where = f"{plan.world_size} A100 at {_UTILISATION:.0%} of their peak"
        console.print(f"About {hours:.1f} h on {where}, evaluation not counted.")


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number and len(header) else "left")
    return table


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size >= 5e7 else f"{size / 1e9:,.3f}"


def _millions(number: int) -> str:
    return f"{number / 1e9:.2f} B parameters" if number >= 1e9 else f"{number / 1e6:.2f} M parameters"


def _flops(number: float) -> str:
    for size, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} FLOP"
