"""Planned rows: the offline plan's drafts as samples, brought through the same rule stages as seeds from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from data_gen.assemble import assemble
from data_gen.blobs import Blobs
from data_gen.engine import Finished, run_stages
from data_gen.pictures import generator_versions
from data_gen.sample import Sample, Seed
from data_gen.settings import Settings
from data_gen.stage import Done, Result, Stage
from data_gen.stages import illustrate, plan
from data_gen.stages.classify import RuleClassify
from data_gen.stages.compose import RuleCompose
from data_gen.stages.draft import Draft
from data_gen.stages.label import TEXT_LICENCE, RuleLabel, draft_relation
from data_gen.stages.pairs import size_pairs
from data_gen.stages.verify import RuleVerify
from data_gen.store import StoredPicture
from data_gen.taxonomy.facts import Taxonomy
from data_gen.tools import Tools
from mirage.data.row import LineageStep, Row
from mirage.errors import UserError

SOURCE = "MIRage offline plan"
ATTRIBUTION = "MIRage taxonomy and grammar"
GENERAL = "General"
MAX_SHOWN = 3


def planned_samples(taxonomy: Taxonomy, drafts: Sequence[Draft]) -> list[Sample]:
    """A sample for each draft, in plan order. A benign draft has the category of the risky one that it mirrors."""
    categories: dict[int, tuple[str, str]] = {}
    samples = []
    for draft in drafts:
        categories[draft.index] = category, sub_category = _category(taxonomy, draft, categories)
        seed = Seed(
            id=f"draft-{draft.index}",
            kind="draft",
            category=category,
            sub_category=sub_category,
            source=SOURCE,
            licence=TEXT_LICENCE,
            attribution=ATTRIBUTION,
        )
        samples.append(
            Sample(
                position=(draft.index,),
                seed=seed,
                draft=draft,
                twin_of=None if draft.twin_of is None else (draft.twin_of,),
                twin_kind=draft.twin_kind,
            )
        )
    return samples


def _category(taxonomy: Taxonomy, draft: Draft, categories: Mapping[int, tuple[str, str]]) -> tuple[str, str]:
    if draft.kind == "general":
        return GENERAL, taxonomy.phrasings.general[draft.template].sub_category
    relation = draft_relation(taxonomy, draft)
    if relation is not None:
        return relation.category, relation.sub_category
    assert draft.twin_of is not None, "a benign pair row always has a risky sibling"
    return categories[draft.twin_of]


def from_plan(finished: Sequence[Finished], *, key: str) -> list[Finished]:
    """The samples with the plan before their first stage; `key` names the settings that they were planned by."""
    step = LineageStep(stage="plan", version=f"rule {plan.VERSION}", key=key)
    return [replace(entry, lineage=(step, *entry.lineage)) for entry in finished]


class PlacedPictures(Stage):
    """Illustrate, for a build that has drawn all pictures of the plan beforehand, in several processes."""

    name: ClassVar[str] = "illustrate"
    implementation: ClassVar[str] = "draw"
    version: ClassVar[str] = illustrate.VERSION
    stored: ClassVar[bool] = False

    def __init__(self, taxonomy: Taxonomy, settings: Settings, stored: Callable[[str], StoredPicture]) -> None:
        self.taxonomy, self.settings, self.picture = taxonomy, settings, stored
        self.versions = generator_versions()

    def identity(self) -> Mapping[str, Any]:
        """Packages that draw, and the size of a picture."""
        return {"generators": self.versions, "pixels": self.settings.size.image_pixels}

    async def run(self, sample: Sample, *, seed: int) -> Result:
        """The sample with the pictures that its draft names."""
        assert sample.draft is not None
        refs = illustrate.image_refs(
            self.taxonomy, self.settings, sample.draft, stored=self.picture, versions=self.versions
        )
        return Done((sample.filled(images=refs),))


def planned_rows(
    taxonomy: Taxonomy,
    settings: Settings,
    drafts: Sequence[Draft],
    *,
    stored: Callable[[str], StoredPicture],
    key: str,
) -> tuple[Row, ...]:
    """The rows of all drafts, in plan order. `stored` finds a drawn picture by its order's name.

    Raises UserError naming the first rows that contradict the facts: planned data is whole or not written at all.
    """
    # Nothing is stored: the rules are quicker to run again than to read, and pictures are the build's.
    tools = Tools(taxonomy=taxonomy, blobs=Blobs(Path()), root_seed=settings.seed)
    verify = RuleVerify(tools)
    verify.pairs = size_pairs(taxonomy, settings.size, seed=settings.seed)
    stages = [
        RuleCompose(tools),
        PlacedPictures(taxonomy, settings, stored),
        RuleClassify(tools),
        RuleLabel(tools),
        verify,
    ]
    outcome = asyncio.run(run_stages(planned_samples(taxonomy, drafts), stages, None, root_seed=settings.seed))
    assembled = assemble(from_plan(outcome.done, key=key))
    lost = [(drop.sample, drop.stage, drop.reason) for drop in outcome.dropped]
    lost += [(drop.sample, drop.step, drop.reason) for drop in assembled.dropped]
    if lost:
        shown = [f"row {sample.position[0] + 1}: {stage}: {reason}" for sample, stage, reason in lost[:MAX_SHOWN]]
        more = f" (and {len(lost) - MAX_SHOWN} more)" if len(lost) > MAX_SHOWN else ""
        raise UserError(
            f"generated rows contradict the taxonomy, so nothing was written: {'; '.join(shown)}{more}. "
            "Correct the taxonomy entry or sentence that the message shows"
        )
    return assembled.rows
