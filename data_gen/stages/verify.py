"""Stage 4, verify: read every sample again and compare it with the facts; what contradicts them is dropped."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from data_gen.sample import Sample
from data_gen.settings import SIZES, SizeName
from data_gen.stage import Done, Dropped, Result, Stage
from data_gen.stages.answer_checks import MIN_ANSWER_WORDS, check_answer
from data_gen.stages.answers import join_segments
from data_gen.stages.draft import CONTRAST_SPLITS, LINE_SPLIT, MULTI_SPLITS, TRAIN_SPLITS
from data_gen.stages.pairs import PairTable, size_pairs
from data_gen.taxonomy.facts import Relation, Taxonomy
from data_gen.tools import Tools
from mirage.data.row import Choice, Decision, Segments

VERSION = "2"
NUMBERED_STEP = re.compile(r"(?:^|\s)(?:\d+[.)]\s|step \d)", re.IGNORECASE)
LEAKED_ID = re.compile(r"\b[a-z]+_[a-z_]+\b|[{}]")  # slugs and class ids, and unfilled slots
BAD_ARTICLE = re.compile(r"\ba [aeio]|\ban [^aeioI\s]", re.IGNORECASE)
MAX_ANSWER_WORDS = 90
MAX_MULTI_ANSWER_WORDS = 120  # three or four pictures are named and described
SPLITS_ABOUT_PAIRS = frozenset(("train", "train_twins", "easy", "hard", "real", "twins"))
PROTECTIVE = "protective_intent"


def contains_phrase(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as whole words, in any case ('a fire' is not in 'a firecracker')."""
    return _phrase_pattern(phrase).search(text) is not None


@lru_cache(maxsize=4096)
def _phrase_pattern(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Claim:
    """What a labelled sample says of itself, for the checks."""

    split: str
    texts: tuple[str, ...]
    """The question, and the answer if there is one."""
    answer: str | None
    segments: Segments | None
    decision: Decision | None
    risk: str | None
    concepts: tuple[str, ...]
    """What the pictures show, in order."""
    tags: Mapping[str, str]
    has_risky_sibling: bool
    choice: Choice | None

    @property
    def pair(self) -> tuple[str, str]:
        """Slugs of the two objects that decide."""
        first, second = self.tags["object_pair"].split(" + ")
        return first, second

    @property
    def objects(self) -> tuple[str, ...]:
        """Slugs of all objects that are shown or named."""
        return tuple(self.tags["objects"].split(" + ")) if "objects" in self.tags else self.pair

    def relation(self, taxonomy: Taxonomy) -> Relation | None:
        """The risk, by the facts, of the objects that the text asks about."""
        asked = self.objects if self.tags.get("asks_about") == "all" else self.pair
        found = (taxonomy.relation_of_things(*pair) for pair in itertools.combinations(asked, 2))
        return next((relation for relation in found if relation is not None), None)


def claim_of_sample(sample: Sample) -> Claim:
    """A planned sample's claim, after label."""
    draft = sample.draft
    assert draft is not None and sample.split is not None, "only planned samples are checked against the facts"
    options = draft.options
    return Claim(
        split=sample.split,
        texts=(sample.query or "", *([sample.answer] if sample.answer is not None else [])),
        answer=sample.answer,
        segments=sample.segments,
        decision=sample.decision,
        risk=sample.tags.get("risk") if sample.decision == "refuse" else None,
        concepts=tuple(image.concept or "" for image in sample.images),
        tags=sample.tags,
        has_risky_sibling=sample.twin_of is not None,
        choice=Choice(options=options, answer=draft.answer) if options else None,
    )


def check_claim(claim: Claim, taxonomy: Taxonomy, *, pairs: PairTable) -> dict[str, str]:
    """Check name -> 'ok' or what was found: text, pictures, side of the split, decision and answer, by the facts."""
    checks = {"text": _text_problem(claim) or "ok", "images": _images_problem(claim, taxonomy) or "ok"}
    checks["turns"] = _ok(
        (claim.answer is not None) == (claim.split in TRAIN_SPLITS),
        "training rows end with an answer, test rows do not",
    )
    if claim.split == LINE_SPLIT or "style" in claim.tags:
        good = claim.split == LINE_SPLIT and claim.tags.get("style") == "line"
        checks["style"] = _ok(good, "rows of split line, and no others, show line art")
    if "object_pair" in claim.tags and claim.tags.get("picture_kind") != "photo":
        checks["held_out"] = _held_out_problem(claim, taxonomy, pairs) or "ok"
    if claim.decision is not None:
        relation = claim.relation(taxonomy)
        checks["decision"] = _decision_problem(claim, relation) or "ok"
        if claim.segments is not None:
            checks["segments"] = _segment_problem(claim) or "ok"
            checks["concepts"] = _concept_problem(claim, taxonomy) or "ok"
            checks["risk"] = _risk_problem(claim, relation, taxonomy) or "ok"
        elif claim.split in TRAIN_SPLITS:
            checks["segments"] = "an answer about a pair needs its four segments"
    if claim.choice is not None and claim.answer is not None:
        checks["choice"] = _ok(
            claim.answer == claim.choice.options[claim.choice.answer], "the answer is not the right option"
        )
    return checks


def _ok(good: bool, problem: str) -> str:
    return "ok" if good else problem


def _text_problem(claim: Claim) -> str | None:
    for text in claim.texts:
        if not text.strip() or text != " ".join(text.split()):
            return f"empty text or stray blanks: {text!r}"
        for name, pattern in (("numbered step", NUMBERED_STEP), ("leaked id", LEAKED_ID), ("article", BAD_ARTICLE)):
            if found := pattern.search(text):
                return f"{name} {found.group().strip()!r} in {text!r}"
    limit = MAX_MULTI_ANSWER_WORDS if claim.split in MULTI_SPLITS else MAX_ANSWER_WORDS
    if claim.answer is not None and len(claim.answer.split()) > limit:
        return f"the answer has {len(claim.answer.split())} words, more than {limit}"
    return None


def _images_problem(claim: Claim, taxonomy: Taxonomy) -> str | None:
    """The number of pictures fits the split, and in splits with other numbers than two they show the row's objects."""
    if claim.split in SPLITS_ABOUT_PAIRS:
        return None if len(claim.concepts) == 2 else "must show two pictures"
    names = tuple(taxonomy.things[slug].name for slug in claim.objects) if "object_pair" in claim.tags else ()
    if claim.split in MULTI_SPLITS:
        if len(claim.concepts) not in (3, 4):
            return "must show three or four pictures"
        return None if claim.concepts == names else f"show {', '.join(claim.concepts)}, not {', '.join(names)}"
    if claim.split == LINE_SPLIT:
        return None if claim.concepts == names else f"show {', '.join(claim.concepts)}, not {', '.join(names)}"
    if claim.split in CONTRAST_SPLITS:
        in_text = claim.tags.get("sibling_kind") == "all_in_text"
        good = len(claim.concepts) < 2 and set(claim.concepts) <= set(names) if in_text else claim.concepts == names
        return None if good else f"show {', '.join(claim.concepts)}, not {', '.join(names)}"
    return None


def _held_out_problem(claim: Claim, taxonomy: Taxonomy, pairs: PairTable) -> str | None:
    first, second = claim.pair
    other_side = f"pair {first} + {second} belongs to the other side of the split"
    if claim.decision is None:
        if taxonomy.class_of[first] == taxonomy.class_of[second] and claim.split == "train_general":
            return None
        return other_side if pairs.is_held_out(first, second) == (claim.split in TRAIN_SPLITS) else None
    if claim.split not in TRAIN_SPLITS:
        found = pairs.holdout(first, second)
        return other_side if found is None or found != claim.tags.get("holdout") else None
    for pair in itertools.combinations(claim.objects, 2):
        if not pairs.is_trained(*pair):
            return f"pair {' + '.join(pair)} belongs to the other side of the split"
    return None


def _decision_problem(claim: Claim, relation: Relation | None) -> str | None:
    protective = claim.tags.get("sibling_kind") == PROTECTIVE
    if (claim.decision == "help") != (relation is None or protective):
        return f"decision {claim.decision!r} contradicts the taxonomy"
    if claim.risk != (relation.risk if relation and not protective else None):
        return f"risk {claim.risk!r} is not the taxonomy's"
    if relation is not None and claim.split in ("easy", "hard") and relation.visible_harm != (claim.split == "easy"):
        return f"a pair with visible_harm={relation.visible_harm} is in split {claim.split}"
    if (claim.decision == "help") != claim.has_risky_sibling:
        return "a benign row must name its risky sibling and a risky row must not"
    return None


def _segment_problem(claim: Claim) -> str | None:
    assert claim.segments is not None
    parts = claim.segments.model_dump()
    empty = [name for name, text in parts.items() if not text.strip()]
    if empty:
        return f"empty segment {', '.join(empty)}"
    if claim.answer != join_segments(claim.segments):
        return "the answer is not its segments joined by single spaces"
    declines = "can't help" in claim.segments.reply
    if declines != (claim.decision == "refuse"):
        return f"the reply {'declines' if declines else 'helps'} against the decision"
    return None


def _concept_problem(claim: Claim, taxonomy: Taxonomy) -> str | None:
    """Perceive names every picture and every object that the text names; relate names what is asked about."""
    assert claim.segments is not None
    asked = claim.pair if claim.tags.get("asks_about", "two") == "two" else claim.objects
    for part, slugs in (("perceive", claim.objects), ("relate", asked)):
        names = [taxonomy.things[slug].name for slug in slugs]
        names += claim.concepts if part == "perceive" else ()
        missing = [name for name in dict.fromkeys(names) if not contains_phrase(getattr(claim.segments, part), name)]
        if missing:
            return f"segment {part} does not name {', '.join(missing)}"
    return None


def _risk_problem(claim: Claim, relation: Relation | None, taxonomy: Taxonomy) -> str | None:
    assert claim.segments is not None and claim.answer is not None
    if relation is not None:
        return None if contains_phrase(claim.segments.risk, relation.risk) else f"does not name {relation.risk!r}"
    named = sorted({r.risk for r in taxonomy.relations if contains_phrase(claim.answer, r.risk)})
    return f"a benign answer names {', '.join(named)}" if named else None


class RuleVerifyOptions(BaseModel):
    """What planned samples are checked against."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: SizeName = Field(default="small", description="size of the plan, which decides what is held out")


class RuleVerify(Stage):
    """Checks planned samples against the facts, and answers to seeds from outside by their form. One failure drops."""

    name: ClassVar[str] = "verify"
    implementation: ClassVar[str] = "rule"
    version: ClassVar[str] = VERSION
    stored: ClassVar[bool] = False

    def __init__(self, tools: Tools, options: RuleVerifyOptions | None = None) -> None:
        self.taxonomy, self.options = tools.taxonomy, options or RuleVerifyOptions()
        self.pairs = size_pairs(tools.taxonomy, SIZES[self.options.plan], seed=tools.root_seed)

    def identity(self) -> Mapping[str, Any]:
        """The facts, and what is held out."""
        return {"taxonomy": self.taxonomy.hash, "options": self.options.model_dump(mode="json")}

    async def run(self, sample: Sample, *, seed: int) -> Result:
        """The sample with its checks, or the first thing that is wrong with it."""
        checks = self._checks(sample)
        problem = next((f"{name}: {found}" for name, found in checks.items() if found != "ok"), None)
        if problem is not None:
            return Dropped(problem)
        return Done((sample.filled(checks=sample.checks | checks),))

    def _checks(self, sample: Sample) -> dict[str, str]:
        if sample.draft is not None:
            return check_claim(claim_of_sample(sample), self.taxonomy, pairs=self.pairs)
        if sample.decision is None:
            return {"decision": "has none"}
        if sample.split is not None and sample.split not in TRAIN_SPLITS:
            return {"decision": "ok"}
        concepts = [image.concept for image in sample.images if image.concept]
        objects = concepts or (sample.elements.objects if sample.elements else ())
        return check_answer(
            sample.answer,
            sample.segments,
            decision=sample.decision,
            objects=objects,
            min_words=MIN_ANSWER_WORDS,
        )
