"""What a run will take: calls, tokens and dollars by stage, before the first call is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from data_gen.pipeline import Pipeline, StageChoice, is_local
from data_gen.row_store import Record
from data_gen.sample import MIN_OBJECTS
from mirage.endpoint.failures import Usage
from mirage.errors import UserError
from mirage.tracking.console import Terminal

# Of a stage that has no stored results to go by: a prompt of this project's length, and a picture or two.
ASSUMED = Usage(prompt_tokens=1500, completion_tokens=400, calls=1)
IMAGES_API = "images_api"


@dataclass(frozen=True)
class StageEstimate:
    """Of one stage and one of its endpoints: calls still to make, tokens, and dollars (None: a price is unknown)."""

    stage: str
    endpoint: str
    num_stored: int
    num_calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    is_measured: bool
    """By the stored results of the stage rather than by assumption."""


@dataclass(frozen=True)
class Estimate:
    """All stages that call an endpoint."""

    stages: tuple[StageEstimate, ...]

    @property
    def num_calls(self) -> int:
        return sum(stage.num_calls for stage in self.stages)

    @property
    def cost_usd(self) -> float | None:
        """Dollars in all; None where one price is unknown."""
        costs = [stage.cost_usd for stage in self.stages]
        return None if None in costs else sum(cost for cost in costs if cost is not None)


def estimate(pipeline: Pipeline, num_samples: int, stored: Mapping[str, Sequence[Record]]) -> Estimate:
    """Calls, tokens and cost still to come for `num_samples` seeds.

    Shares of drops, offspring and tokens are those of the stored results where there are any; without, nothing is
    dropped, each sample has one offspring (a twin too, after `twins`), and calls are as `ASSUMED`.
    """
    found = []
    reached = float(num_samples)
    for choice in pipeline.stages:
        records = list(stored.get(choice.name, ()))
        to_do = max(0, round(reached) - len(records))
        for name in choice.endpoints:
            found.append(_of_endpoint(pipeline, choice, name, records, to_do))
        reached *= _growth(choice, records)
    return Estimate(tuple(found))


def _growth(choice: StageChoice, records: Sequence[Record]) -> float:
    if records:
        return sum(len(record.samples) for record in records) / len(records)
    return 2.0 if choice.name == "twins" else 1.0


def _of_endpoint(
    pipeline: Pipeline, choice: StageChoice, name: str, records: Sequence[Record], to_do: int
) -> StageEstimate:
    config = pipeline.config.endpoints[name]
    spent = sum((record.usage for record in records), Usage())
    is_measured = spent.calls > 0 and len(choice.endpoints) == 1
    each = spent if is_measured else ASSUMED
    share = to_do / len(records) if is_measured else float(to_do)
    calls, prompt, completion = (round(share * n) for n in (each.calls, each.prompt_tokens, each.completion_tokens))
    cost = config.cost_usd(prompt_tokens=prompt, completion_tokens=completion)
    if choice.use == IMAGES_API and getattr(choice.options, "endpoint", None) == name:
        calls = calls if is_measured else to_do * MIN_OBJECTS
        prompt = completion = 0
        cost = None if config.price_per_image_usd is None else calls * config.price_per_image_usd
    return StageEstimate(choice.name, name, len(records), calls, prompt, completion, cost, is_measured)


def require_known_cost(pipeline: Pipeline, expected: Estimate) -> None:
    """Raise UserError if calls go to an endpoint that is not on this machine and has no cap."""
    for stage in expected.stages:
        config = pipeline.config.endpoints[stage.endpoint]
        if stage.num_calls and config.max_cost_usd is None and not is_local(config):
            raise UserError(
                f"endpoint {stage.endpoint} has no max_cost_usd, so nothing bounds the cost of about "
                f"{expected.num_calls} calls. Give it prices and max_cost_usd in {pipeline.path}, or add --yes"
            )


def print_estimate(expected: Estimate, console: Terminal) -> None:
    """A table of what is to come, in JSON mode an event `estimate`; nothing where no endpoint is asked."""
    if not expected.stages:
        return
    table = Table(title=None, box=None, pad_edge=False)
    for name in ("stage", "endpoint", "stored", "calls to make", "tokens in", "out", "USD", "by"):
        table.add_column(name, justify="left" if name in ("stage", "endpoint", "by") else "right", no_wrap=True)
    for stage in expected.stages:
        cost = "unknown" if stage.cost_usd is None else f"{stage.cost_usd:.2f}"
        numbers = (stage.num_stored, stage.num_calls, stage.prompt_tokens, stage.completion_tokens)
        by = "stored results" if stage.is_measured else "assumption"
        table.add_row(stage.stage, stage.endpoint, *map(str, numbers), cost, by)
    stages = [asdict(stage) for stage in expected.stages]
    console.summary(
        table, event="estimate", num_calls=expected.num_calls, cost_usd=expected.cost_usd, stages=stages
    )  # fmt: skip
    cost = (
        "an unknown cost (a price is missing)" if expected.cost_usd is None else f"{expected.cost_usd:.2f} US dollars"
    )
    if console.mode != "json":
        console.say(f"about {expected.num_calls} calls to make, {cost}")
