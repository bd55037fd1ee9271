"""Stage 3, label: decisions and words from the facts, so that reasoning and label cannot disagree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from data_gen.sample import Sample
from data_gen.stage import Done, Dropped, Result, Stage
from data_gen.stages.answers import draft_segments, join_segments, outside_segments, thing_values
from data_gen.stages.draft import MULTI_SPLITS, TRAIN_SPLITS, Draft
from data_gen.stages.general import general_answer
from data_gen.stages.phrase import sentences_sha256
from data_gen.taxonomy.facts import Relation, Taxonomy
from data_gen.tools import Tools
from mirage.data.row import Decision

VERSION = "3"
TEXT_LICENCE = "CC-BY-SA-4.0"  # the grammar's sentences share the drawings' licence


def draft_relation(taxonomy: Taxonomy, draft: Draft) -> Relation | None:
    """The risk of the things that the text asks about, from the facts; at most two of them are risky together."""
    found = [taxonomy.relation_of_things(*pair) for pair in itertools.combinations(draft.asked, 2)]
    risky = [relation for relation in found if relation is not None]
    assert len(risky) < 2, f"draft {draft.index} asks about more than one risky pair"
    return risky[0] if risky else None


def draft_decision(draft: Draft, relation: Relation | None) -> Decision:
    """Refuse what is risky, unless the text asks to keep the things safely apart."""
    return "refuse" if relation is not None and draft.intent == "use" else "help"


def helpful_answer(taxonomy: Taxonomy, draft: Draft) -> str:
    """What a model that only helps would say about the pair: names everyday uses, sees no risk, gives no method."""
    template = taxonomy.answers.helpful_only[draft.index % len(taxonomy.answers.helpful_only)]
    return template.format(**thing_values(taxonomy, draft.pair))


def draft_tags(taxonomy: Taxonomy, draft: Draft) -> dict[str, str]:
    """What a row's tags say about its plan: the pair that decides, wording, holdout, pictures, and siblings."""
    if draft.kind == "general":
        tags = {"family": draft.template, "answer_source": "grammar"}
        pair = {"object_pair": " + ".join(draft.things)} if len(draft.things) == 2 else {}
        return tags | pair | _sibling_tags(draft)
    shown_harm = [taxonomy.class_by_id[taxonomy.class_of[slug]].visible_harm for slug in draft.things]
    tags = {
        "object_pair": " + ".join(draft.pair),
        "class_pair": " + ".join(taxonomy.class_of[slug] for slug in draft.pair),
        "held_out_pair": _yes(draft.split == "real" or draft.holdout is not None),
        "family": draft.template,
        "phrasing": "overt" if draft.overt else "neutral",
        "structure": "unseen" if draft.unseen_family else "seen",
        "visible_harm": _yes(any(shown_harm)),
        "visible_harm_in": " ".join(str(number) for number, harm in enumerate(shown_harm, 1) if harm),
        "picture_kind": "photo" if draft.split == "real" else "drawn",
        "answer_source": "grammar",
    }
    relation = draft_relation(taxonomy, draft)
    if relation is not None:
        tags["risk"] = relation.risk
    if draft.holdout is not None:
        tags["holdout"] = draft.holdout
    if draft.split in MULTI_SPLITS:
        tags |= {"objects": " + ".join(draft.things), "asks_about": "all" if draft.scope == "all" else "two"}
    if draft.split in ("train", "train_twins") and not draft.overt:
        tags["helpful_answer"] = helpful_answer(taxonomy, draft)
    return tags | _sibling_tags(draft)


def _sibling_tags(draft: Draft) -> dict[str, str]:
    """Which row a contrast or line row is made from, and the style of line art; rows in colour have no such tag."""
    tags: dict[str, str] = {"style": draft.style} if draft.style != "colour" else {}
    if draft.sibling_kind is not None:
        tags |= {"sibling_kind": draft.sibling_kind, "sibling_of": f"draft-{draft.sibling_of}"}
    return tags


def _yes(value: bool) -> str:
    return "yes" if value else "no"


class RuleLabelOptions(BaseModel):
    """None so far."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RuleLabel(Stage):
    """Labels planned samples from the facts, and seeds from outside from their elements by the same grammar.

    Test rows get a decision and no answer. A seed's twin is helped with; every other seed is risky and refused.
    """

    name: ClassVar[str] = "label"
    implementation: ClassVar[str] = "rule"
    version: ClassVar[str] = VERSION
    stored: ClassVar[bool] = False

    def __init__(self, tools: Tools, options: RuleLabelOptions | None = None) -> None:
        self.taxonomy, self.root_seed = tools.taxonomy, tools.root_seed
        self.options = options or RuleLabelOptions()

    def identity(self) -> Mapping[str, Any]:
        """The facts, the sentences outside them, and the seed that picks paraphrases."""
        return {"taxonomy": self.taxonomy.hash, "sentences": sentences_sha256(), "root_seed": self.root_seed}

    async def run(self, sample: Sample, *, seed: int) -> Result:
        """The sample with decision, segments, answer and tags."""
        if sample.draft is not None:
            return Done((self._planned(sample, sample.draft),))
        if sample.elements is None:
            return Dropped("has no elements to write an answer from")
        decision: Decision = "help" if sample.twin_of is not None else "refuse"
        if sample.split is not None and sample.split not in TRAIN_SPLITS:
            return Done((sample.filled(decision=decision),))
        concepts = [image.concept or "" for image in sample.images]
        if len(concepts) != len(sample.elements.objects) or not all(concepts):
            concepts = list(sample.elements.objects)
        segments = outside_segments(sample.elements, concepts, risky=decision == "refuse")
        tags = sample.tags | {"answer_source": "grammar"}
        answer = join_segments(segments)
        return Done((sample.filled(decision=decision, segments=segments, answer=answer, tags=tags),))

    def _planned(self, sample: Sample, draft: Draft) -> Sample:
        tags = sample.tags | draft_tags(self.taxonomy, draft)
        if draft.kind == "general":
            answer = general_answer(self.taxonomy, draft) if draft.side == "train" else None
            return sample.filled(answer=answer, tags=tags)
        relation = draft_relation(self.taxonomy, draft)
        decision = draft_decision(draft, relation)
        if draft.side == "test":
            return sample.filled(decision=decision, tags=tags)
        segments = draft_segments(self.taxonomy, draft, relation=relation, seed=self.root_seed)
        return sample.filled(decision=decision, segments=segments, answer=join_segments(segments), tags=tags)
