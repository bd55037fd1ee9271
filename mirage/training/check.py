"""`mirage check`: on a recipe's own first packs, training computes what transformers computes on each sample alone.

The weights, rows and pictures are the recipe's; one process, no DeepSpeed, a CPU or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirage.config.schema import Recipe
from mirage.data.collate import PackedBatch, collate, reduction_weight
from mirage.data.lengths import index_rows
from mirage.data.pack import PackPlan
from mirage.data.pictures import PictureLoader
from mirage.data.render import Sample, render_sample
from mirage.data.sources import SourcedRow, load_mixture
from mirage.errors import UserError
from mirage.models.adapter import IGNORE_INDEX, ModelAdapter
from mirage.models.quantize import check_quantize
from mirage.models.registry import load_adapter
from mirage.tracking.terminal_text import SafeConsole
from mirage.training.failures import spans
from mirage.training.head_loss import choose_kernel
from mirage.training.loss import PackedLossModel
from mirage.training.pack_checks import PROMISES, Problem, expected_samples, pack_problems
from mirage.training.plan import default_world_size
from mirage.training.weights import DTYPES, find_base, load_for_training

# Packs looked at without the model: their pictures are decoded, so not all of a step of thousands.
NUM_STRUCTURE_SAMPLES = 64
# Elements of the gradient that are compared, held in fp32 on the host: 1 GiB. Larger models compare whole tensors from
# both ends of the network, whose gradients pass through all of it.
MAX_GRADIENT_ELEMENTS = 1 << 28
NUM_HEAD_CHUNKS = 5


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that rounding explains.

    `loss` of a sample, `gradient` as norm of the difference over norm, `hidden` as largest difference over largest
    value.
    """

    loss: float
    gradient: float
    hidden: float


# fp32: sums in another order; models of 2 and of 24 layers show at most 3e-7, 7e-6 and 0.
# bf16 keeps 8 bits, so one rounding is 2^-9 = 2e-3: models at transformers' initial scale, of 2 and of 24 layers, show
# at most 6e-4, 9e-3 and 0. How much a model amplifies roundings depends on its weights, so there the limit is raised to
# NOISE_FACTOR times the difference between transformers' own two kernels, each on samples alone, which packing cannot
# touch; beyond LARGEST rounding would hide what is looked for: samples that see each other move a sample's loss by 5e-2
# and more, a gradient by 3e-1 and more, hidden states by 6e-1 and more.
TOLERANCES = {"fp32": Tolerance(1e-5, 1e-4, 1e-5), "bf16": Tolerance(3e-3, 3e-2, 1e-3)}
NOISE_FACTOR = 4.0
LARGEST = Tolerance(2e-2, 2e-1, 1e-3)


@dataclass(frozen=True)
class Result:
    """One line of the table: what was compared, the largest difference, its limit, and the sample where it fails."""

    name: str
    measured: str
    limit: str
    problem: str | None = None


@dataclass(frozen=True)
class Report:
    """All results of a check, and what it was done on."""

    subject: str
    results: tuple[Result, ...]

    @property
    def problems(self) -> list[str]:
        return [result.problem for result in self.results if result.problem is not None]


def check_recipe(recipe: Recipe, *, num_samples: int = 4, world_size: int | None = None) -> Report:
    """Check the first packs of a run of `recipe` on `world_size` processes; `num_samples` go through the model.

    Raises `UserError` for what would stop the run itself: data, weights, settings.
    """
    if num_samples < 2:
        raise UserError(f"samples={num_samples}: it takes at least 2 to show that they do not see each other")
    check_quantize(recipe.model)
    base = find_base(recipe)
    adapter = load_adapter(base, preprocessing=recipe.preprocessing, trust_remote_code=recipe.model.trust_remote_code)
    rows, index, _ = index_rows(load_mixture(recipe.data, seed=recipe.train.seed).rows, adapter, recipe.data)
    world_size = world_size or default_world_size(recipe)[0]
    plan = PackPlan.from_recipe(index, recipe, world_size=world_size)
    loader = PictureLoader(adapter, cache_bytes=recipe.data.picture_cache_bytes)
    packs = first_packs(plan, limit=NUM_STRUCTURE_SAMPLES)
    results = _structure(recipe, [[rows[number] for number in pack] for pack in packs], adapter, loader)
    chosen = choose_samples([number for pack in packs for number in pack], rows, count=num_samples)
    entries = [rows[number] for number in chosen]
    samples = [render_sample(entry, adapter, loader) for entry in entries]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_for_training(recipe, adapter, base=base)
    checker = Checker(model.to(device), adapter, samples, entries, recipe=recipe)
    tokens = sum(sample.num_tokens for sample in samples)
    subject = (
        f"{recipe.name}: {len(packs)} packs, {sum(map(len, packs))} samples; {len(samples)} of them "
        f"({tokens:,} tokens) through {base.name} in {recipe.train.precision} on {device.type}"
    )
    return Report(subject, (*results, *checker.results()))


def first_packs(plan: PackPlan, *, limit: int) -> list[tuple[int, ...]]:
    """Packs of all ranks from step 1 on, until they hold `limit` samples or the run ends; never an empty one."""
    packs: list[tuple[int, ...]] = []
    for step in range(plan.num_steps):
        for pack in (pack for micro_step in plan.step(step).rows for pack in micro_step if pack):
            if sum(map(len, packs)) >= limit:
                return packs
            packs.append(pack)
    return packs


def choose_samples(numbers: Sequence[int], rows: Sequence[SourcedRow], *, count: int) -> list[int]:
    """The first of `numbers`, but with and without pictures, and several beside one, where there are such."""
    kinds: dict[int, int] = {}
    for number in numbers:
        kinds.setdefault(min(2, len(rows[number].row.images)), number)
    chosen = list(dict.fromkeys([*(kinds[kind] for kind in (2, 0, 1) if kind in kinds), *numbers]))[:count]
    if len(chosen) < 2:
        raise UserError(f"the first packs hold {len(chosen)} sample; a check needs at least 2 to pack together")
    return chosen


# Without the model


def _structure(
    recipe: Recipe, packs: Sequence[Sequence[SourcedRow]], adapter: ModelAdapter, loader: PictureLoader
) -> list[Result]:
    problems: list[Problem] = []
    reduction = recipe.train.loss_reduction
    for entries in packs:
        samples = [render_sample(entry, adapter, loader) for entry in entries]
        batch = collate(samples, adapter, reduction=reduction)
        counts = [float(sample.num_supervised_tokens) for sample in samples]
        problems += pack_problems(batch, expected_samples(entries, counts, reduction), adapter)
    results = []
    for promise, meaning in PROMISES.items():
        broken = [problem for problem in problems if problem.promise == promise]
        more = f" ({len(broken)} such)" if len(broken) > 1 else ""
        results.append(
            Result(f"{promise}: {meaning}", f"{len(broken)} broken", "0", f"{broken[0]}{more}" if broken else None)
        )
    return results


# Through the model


class Checker:
    """Computes the same samples packed and alone, and compares. `entries[i]` is the row of `samples[i]`."""

    def __init__(
        self,
        model: Any,
        adapter: ModelAdapter,
        samples: Sequence[Sample],
        entries: Sequence[SourcedRow],
        *,
        recipe: Recipe,
    ) -> None:
        self.model, self.adapter, self.samples, self.entries = model, adapter, samples, entries
        self.reduction = recipe.train.loss_reduction
        self.precision = recipe.train.precision
        self.tolerance = TOLERANCES[self.precision]
        self.device = next(model.parameters()).device
        # Eager is the plainest; its L x L matrices are slow on a GPU.
        self.references = ("eager", "sdpa") if self.device.type == "cpu" else ("sdpa", "eager")
        model.train()
        # Recomputed activations need training mode; dropout would make two passes two results.
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        self.names = _compared(model)
        self.weights = [
            sample.weight * float(reduction_weight(float(sample.num_supervised_tokens), self.reduction))
            for sample in samples
        ]
        kernel, _ = choose_kernel(recipe.train.loss_kernel, device_type=self.device.type)
        self.packed_model = PackedLossModel(model, kernel=kernel)

    def results(self) -> Iterator[Result]:
        """All comparisons, cheapest first."""
        yield self._features()
        batch = self._pack(self.samples)
        with torch.no_grad():
            hidden = self._hidden(batch)
        yield from self._losses(batch, hidden)
        yield self._isolation(batch, hidden)
        yield self._head(batch)
        yield from self._gradients()

    # What training computes

    def _pack(self, samples: Sequence[Sample]) -> PackedBatch:
        batch = collate(samples, self.adapter, reduction=self.reduction)
        return batch.to(self.device, DTYPES[self.precision])

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden state [L, H] of a packed row."""
        return self.model.model(**batch.inputs, use_cache=False).last_hidden_state[0]

    # What transformers computes on one sample, with its own positions, mask and attention

    def _packed_loss(self, samples: Sequence[Sample]) -> torch.Tensor:
        return self.packed_model(self._pack(samples))[0]

    def _weighted_alone(self, sample: Sample, weight: float) -> torch.Tensor:
        return self._alone(sample) * weight

    def _alone(self, sample: Sample) -> torch.Tensor:
        """Sum of the sample's token losses, from the plain model's `loss`."""
        ids = sample.input_ids.unsqueeze(0)
        inputs = {
            "input_ids": ids,
            "labels": sample.labels.unsqueeze(0),
            **self.adapter.token_inputs(ids),
            **self.adapter.picture_inputs(sample.pictures),
        }
        inputs = {key: self._on_device(value) for key, value in inputs.items()}
        return self.model(**inputs, use_cache=False).loss * sample.num_supervised_tokens

    def _on_device(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, DTYPES[self.precision] if value.is_floating_point() else None)

    def _as_transformers_does(self, compute: Callable[[], Any], *, attention: str | None = None) -> Any:
        own = self.model.config._attn_implementation
        self.model.set_attn_implementation(attention or self.references[0])
        try:
            return compute()
        finally:
            self.model.set_attn_implementation(own)

    # Comparisons

    def _features(self) -> Result:
        """Rows that the vision tower gives for each sample's pictures, against its placeholders."""
        problem, total = None, 0
        for entry, sample in zip(self.entries, self.samples):
            placeholders = int((sample.input_ids == self.adapter.image_token_id).sum())
            total += placeholders
            found = 0
            if sample.pictures:
                inputs = {k: self._on_device(v) for k, v in self.adapter.picture_inputs(sample.pictures).items()}
                with torch.no_grad():
                    output = self.model.model.get_image_features(**inputs, return_dict=True).pooler_output
                features = output if isinstance(output, (tuple, list)) else [output.flatten(0, -2)]
                found = sum(len(part) for part in features)
            if found != placeholders and problem is None:
                problem = f"{_place(entry)}: its pictures give {found} features for {placeholders} placeholders"
        return Result("features: the vision tower fills every placeholder", f"{total} both", "equal", problem)

    def _losses(self, batch: PackedBatch, hidden: torch.Tensor) -> Iterator[Result]:
        with torch.no_grad():
            alone = self._as_transformers_does(self._losses_alone)
            limit = self._loss_limit(alone)
            packed = [self._plain_loss(batch, hidden, *span) for span in spans(batch)[: len(self.samples)]]
            total = float(self.packed_model(batch)[0])
        differences = [_relative(ours, theirs) for ours, theirs in zip(packed, alone)]
        worst = max(range(len(differences)), key=lambda number: _bad_first(differences[number]))
        problem = None
        if not differences[worst] <= limit:
            counts = self.samples[worst].num_supervised_tokens
            problem = (
                f"{_place(self.entries[worst])}: its mean loss is {packed[worst] / counts:.6f} in a pack and "
                f"{alone[worst] / counts:.6f} alone (transformers)"
            )
        yield Result("loss: packed = each sample alone", f"{differences[worst]:.1e}", f"{limit:.0e}", problem)
        expected = sum(weight * loss for weight, loss in zip(self.weights, alone))
        difference = _relative(total, expected)
        rows = ", ".join(_place(entry) for entry in self.entries)
        problem = f"the trainer's loss sum is {total:.6f}, {expected:.6f} from samples alone; {rows}"
        yield Result(
            f"loss sum: the trainer's, weighted by {self.reduction}",
            f"{difference:.1e}",
            f"{limit:.0e}",
            None if difference <= limit else problem,
        )

    def _losses_alone(self) -> list[float]:
        return [float(self._alone(sample)) for sample in self.samples]

    def _loss_limit(self, alone: Sequence[float]) -> float:
        if self.precision == "fp32":
            return self.tolerance.loss
        others = self._as_transformers_does(self._losses_alone, attention=self.references[1])
        noise = max(_relative(other, loss) for other, loss in zip(others, alone))
        return min(LARGEST.loss, max(self.tolerance.loss, NOISE_FACTOR * noise))

    def _gradient_limit(self, alone: dict[str, torch.Tensor], losses: Sequence[Callable[[], torch.Tensor]]) -> float:
        if self.precision == "fp32":
            return self.tolerance.gradient
        other = self._as_transformers_does(lambda: self._gradient(losses), attention=self.references[1])
        noise, _ = _gradient_difference(alone, other)
        return min(LARGEST.gradient, max(self.tolerance.gradient, NOISE_FACTOR * noise))

    def _plain_loss(self, batch: PackedBatch, hidden: torch.Tensor, start: int, end: int) -> float:
        """Sum of one packed sample's token losses, by the plainest formula."""
        labels = batch.labels[start + 1 : end]
        learnt = labels != IGNORE_INDEX
        logits = self.model.lm_head(hidden[start : end - 1][learnt]).float()
        return float(F.cross_entropy(logits, labels[learnt], reduction="sum"))

    def _isolation(self, batch: PackedBatch, hidden: torch.Tensor) -> Result:
        """Change one sample of the pack; the others' hidden states must not move."""
        borders, scale = spans(batch), float(hidden.abs().max())
        worst, problem = 0.0, None
        for changed in range(len(self.samples)):
            others = [changed_sample(s, self.adapter) if n == changed else s for n, s in enumerate(self.samples)]
            with torch.no_grad():
                moved = (self._hidden(self._pack(others)) - hidden).abs().amax(dim=1)
            for number, (start, end) in enumerate(borders[: len(self.samples)]):
                difference = float(moved[start:end].max()) / scale
                if number == changed or difference <= worst:
                    continue
                worst = difference
                if not difference <= self.tolerance.hidden:
                    problem = (
                        f"{_place(self.entries[number])}: its hidden states change when its neighbour "
                        f"{_place(self.entries[changed])} changes: samples of a pack see each other"
                    )
        name = "isolation: a changed neighbour changes nothing"
        return Result(name, f"{worst:.1e}", f"{self.tolerance.hidden:.0e}", problem)

    def _head(self, batch: PackedBatch) -> Result:
        """The output head in one piece and in chunks."""
        with torch.no_grad():
            whole = float(self.packed_model(batch)[0])
            chunked = float(self.packed_model(replace(batch, num_loss_chunks=NUM_HEAD_CHUNKS))[0])
        difference, limit = _relative(chunked, whole), self.tolerance.loss
        problem = f"the head gives {chunked:.6f} in {NUM_HEAD_CHUNKS} chunks and {whole:.6f} in one"
        return Result(
            f"head: {NUM_HEAD_CHUNKS} chunks = one",
            f"{difference:.1e}",
            f"{limit:.0e}",
            None if difference <= limit else problem,
        )

    def _gradients(self) -> Iterator[Result]:
        count = len(self.samples)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.names)
        one_row = self._gradient([partial(self._packed_loss, self.samples)])
        rows = self._gradient([partial(self._packed_loss, [sample]) for sample in self.samples])
        losses_alone = [partial(self._weighted_alone, s, w) for s, w in zip(self.samples, self.weights)]
        alone = self._as_transformers_does(lambda: self._gradient(losses_alone))
        limit = self._gradient_limit(alone, losses_alone)
        places = ", ".join(_place(entry) for entry in self.entries)
        tensors = f"{len(self.names)} tensors"
        for name, other in ((f"1 pack of {count} = {count} of 1", rows), ("packed = transformers alone", alone)):
            difference, parameter = _gradient_difference(one_row, other)
            problem = f"gradients differ by {difference:.1e}, most in {parameter}; samples {places}"
            measured = f"{difference:.1e} over {tensors}"
            yield Result(f"gradient: {name}", measured, f"{limit:.0e}", None if difference <= limit else problem)

    def _gradient(self, losses: Sequence[Callable[[], torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Gradient of the sum of the losses, summed in fp32 as the trainer does, on the host."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in self.names}
        total = {name: torch.zeros(p.shape) for name, p in parameters.items()}
        for compute in losses:
            self.model.zero_grad(set_to_none=True)
            compute().backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    total[name] += parameter.grad.float().cpu()
        self.model.zero_grad(set_to_none=True)
        return total


def _compared(model: Any) -> frozenset[str]:
    """Names of the trained tensors whose gradients are compared: all, or within the limit from both ends in turn."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if sum(sizes.values()) <= MAX_GRADIENT_ELEMENTS:
        return frozenset(sizes)
    names = list(sizes)
    order = [names[i // 2] if i % 2 == 0 else names[-1 - i // 2] for i in range(len(names))]
    chosen, room = [], MAX_GRADIENT_ELEMENTS
    for name in order:
        if sizes[name] <= room // 2:
            chosen.append(name)
            room -= sizes[name]
    return frozenset(chosen)


def changed_sample(sample: Sample, adapter: ModelAdapter) -> Sample:
    """The sample with other words and negated pictures; placeholders, lengths and positions stay."""
    is_text = sample.input_ids != adapter.image_token_id
    ids = sample.input_ids.clone()
    ids[is_text] = ids[is_text].roll(1)
    pictures = tuple(
        replace(picture, tensors={k: -v if v.is_floating_point() else v for k, v in picture.tensors.items()})
        for picture in sample.pictures
    )
    return replace(sample, input_ids=ids, pictures=pictures)


def _gradient_difference(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, str]:
    """(norm of the difference over the norm, name of the tensor that differs most)."""
    squares = {name: float(((ours[name] - other[name]).double() ** 2).sum()) for name in other}
    norm = sum(float((tensor.double() ** 2).sum()) for tensor in other.values())
    worst = max(squares, key=lambda name: _bad_first(squares[name]))
    return math.sqrt(sum(squares.values()) / norm) if norm > 0 else math.nan, worst


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference) if reference else abs(value - reference)


def _bad_first(value: float) -> float:
    """Orders what is not a number as the largest."""
    return math.inf if math.isnan(value) else value


def _place(entry: SourcedRow) -> str:
    return f"row {entry.row.id} ({entry.location})"


# Output


def print_report(report: Report, *, console: Console | None = None) -> None:
    """The table of results; plain text where the output is no terminal."""
    console = console or SafeConsole(highlight=False)
    if not console.is_terminal:
        # Wide enough that no line of a log file is folded.
        console = SafeConsole(file=console.file, highlight=False, no_color=True, width=160)
    console.print(Text(report.subject))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in ("check", "found", "limit", ""):
        table.add_column(header, justify="right" if header in ("found", "limit") else "left")
    for result in report.results:
        state = Text("ok", style="green") if result.problem is None else Text("FAILED", style="bold red")
        table.add_row(Text(result.name), result.measured, result.limit, state)
    console.print(table)


def run(recipe: Recipe, *, num_samples: int, world_size: int | None) -> None:
    """Check and print. Raises `UserError` with the first problem when any promise is broken."""
    report = check_recipe(recipe, num_samples=num_samples, world_size=world_size)
    print_report(report)
    if report.problems:
        more = f" ({len(report.problems)} checks failed)" if len(report.problems) > 1 else ""
        raise UserError(f"training would not compute what it should: {report.problems[0]}{more}")
