"""Checks of an answer in free text, whoever wrote it: pure functions that return None or what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from data_gen.stages.answers import join_segments
from data_gen.words import head_noun, names
from mirage.data.row import Decision, Segments

MIN_ANSWER_WORDS, MAX_ANSWER_WORDS = 20, 400
MIN_SEGMENT_WORDS = 3


def _any_of(*patterns: str, flags: re.RegexFlag = re.IGNORECASE) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), flags)


STEP_WORD = r"(?:step|phase)\s+(?:\d+|one|two|three)\b"
LINE_LIST = re.compile(
    rf"^[ \t]*(?:\*\*)?(?:\(?\d{{1,2}}[.):]\)?(?=\s)|{STEP_WORD}|[-*•–](?=\s))", re.IGNORECASE | re.MULTILINE
)
INLINE_STEP = re.compile(rf"(?:(?<=\s)|^)(?:\(?\d{{1,2}}[.)](?=\s+\S)|{STEP_WORD})", re.IGNORECASE)
# 'First, ... Then, ...' tells an order of acts; 'the first image' does not.
SEQUENCE = re.compile(
    r"(?:^|[.;:!?]\s+)first(?:ly)?,.{1,600}?"
    r"(?:[.;:!?]\s+|,?\s+and\s+)(?:then|next|second(?:ly)?|after that|finally),?\s",
    re.IGNORECASE | re.DOTALL,
)

_I = r"\b(?:i(?:'m| am)?|we(?:'re| are)?)\s+(?:\w+\s+){0,2}?"
DECLINE = _any_of(
    rf"{_I}(?:can't|cannot|can not|won't|will not|could not|couldn't)\b(?!\s+help but)",
    rf"{_I}(?:must )?(?:decline|refuse)\b",
    rf"{_I}(?:unable to|not able to|not going to|not willing to|not comfortable|don't feel comfortable)\b",
    r"\b(?:sorry|apologi[sz]e),? but\b",
    r"\b(?:not something|nothing) (?:that )?i (?:can|could|will|would|should)\b",
)
REDIRECT = _any_of(
    r"\binstead\b",
    r"\brather than\b",
    r"\b(?:safe|safer|legal|lawful) (?:option|alternative|way|choice|approach)\b",
    r"\b(?:please|consider|try)\s+(?:reach|contact|talk|speak|call|report)(?:ing)?\b",
    r"\bi(?:'d| would)?\s+(?:\w+\s+){0,2}?(?:advise|urge|recommend|caution|warn)\s+(?:you\s+)?(?:against|not to)\b",
    r"\bi (?:don't|do not) (?:recommend|advise)\b",
    r"\b(?:please (?:do not|don't|never|avoid)|you should(?:n't| not| never))\b",
    r"\bi can explain why\b",
)
COMPLY = _any_of(
    r"^\W*(?:sure|certainly|of course|absolutely|yes|okay|ok|here(?:'s| is| are))\b", r"\bhere(?:'s| is| are) how\b"
)

LEAK_PHRASES = _any_of(
    r"\bas (?:i was |i am )?(?:instructed|requested|required|told)\b",
    r"\bas you (?:asked|instructed|told|requested|said)\b",
    r"\bas (?:noted|stated|described|given|mentioned) (?:in|by) the (?:prompt|hint|instruction|label|annotation|task)",
    r"\b(?:the|your|this|a|given) hint\b",
    r"\byou(?:'ve| have)? told me\b",
    r"\bi (?:was|am|have been|'ve been|'m) (?:told|instructed|given|asked to)\b",
    r"\b(?:system|user|teacher|labell?ing) (?:prompt|message)\b",
    r"\b(?:my|the|these|your) (?:instructions?|guidelines|rules) (?:say|state|ask|tell|require)s?\b",
    r"\b(?:the|this) (?:provided|given|stated|labell?ed|annotated|known|listed) (?:risk|category|label|reason)\b",
    r"\bharmful (?:question|query|request|prompt|instruction)\b",
    r"\b(?:under|in|into|to) the category\b",
    r"\b(?:sub-?category|taxonomy|json|schema|annotator|annotation|red[- ]team\w*|benign (?:twin|sibling))\b",
    r"\btraining (?:data|set|samples?|examples?|rows?)\b",
    r"\b(?:perceive|relate|risk|reply) (?:segment|section|field|part)\b",
)
LEAK_MARKS = _any_of(r"\[(?:begin|end) [0-9a-f]{4,}\]", r"[{}]", r"<\|[^|]*\|>", r"</?[a-z_]+>")
LEAK_IDS = re.compile(r"\b[a-z]+(?:_[a-z0-9]+)+\b")
# A run of signs and spaces that begins a line is taken whole and once.
LEAK_HEADINGS = re.compile(
    r"(?:\A|(?<![#*\s])(?>[#*\s]*?\n))[#*\s]*+(?:perceive|relate|risk|reply|analysis|perception|reasoning|decision"
    r"|safety (?:response|analysis))\s*\**:",
    re.IGNORECASE,
)


def segments_problem(segments: Segments | None) -> str | None:
    """All four parts are there, each says something, and none repeats another."""
    if segments is None:
        return "has no segments"
    parts = segments.model_dump()
    short = [name for name, text in parts.items() if len(text.split()) < MIN_SEGMENT_WORDS]
    if short:
        return f"segment {', '.join(short)} has fewer than {MIN_SEGMENT_WORDS} words"
    folded = [" ".join(text.lower().split()) for text in parts.values()]
    return "two segments are the same" if len(set(folded)) < len(folded) else None


def joining_problem(answer: str, segments: Segments) -> str | None:
    """The answer is its segments and nothing else."""
    return None if answer == join_segments(segments) else "the answer is not its segments joined by single spaces"


def objects_problem(text: str, objects: Sequence[str]) -> str | None:
    """The text names each object by its head noun, in singular or plural, as a whole word ('car' is not in 'card')."""
    missing = [name for name in objects if not names(text, name)]
    return f"does not name {', '.join(head_noun(name) for name in missing)}" if missing else None


def leak_problem(text: str, *, secrets: Iterable[str] = ()) -> str | None:
    """Nothing tells that a teacher was told the risk: no talk of prompts or hints, no marks, no ids, none of `secrets`.

    `secrets` are strings that only the teacher saw, such as the nonce of its prompt.
    """
    for secret in secrets:
        if secret and secret.lower() in text.lower():
            return f"repeats the teacher's text {secret!r}"
    patterns = {"talks of the teacher's task": LEAK_PHRASES, "holds a mark": LEAK_MARKS}
    patterns |= {"holds an identifier": LEAK_IDS, "holds a heading": LEAK_HEADINGS}
    for what, pattern in patterns.items():
        if found := pattern.search(text):
            return f"{what}: {found.group().strip()!r}"
    return None


def steps_problem(text: str) -> str | None:
    """The text holds no list and no ordered steps; for answers to risky requests only."""
    if found := LINE_LIST.search(text):
        return f"holds a list: {found.group().strip()!r}"
    marks = INLINE_STEP.findall(text)
    if len(marks) > 1 or any(mark.lower().startswith("step") for mark in marks):
        return f"holds numbered steps: {marks[0]!r}"
    return "tells an order of acts" if SEQUENCE.search(text) else None


def decision_problem(reply: str, decision: Decision) -> str | None:
    """The reply declines or redirects if and only if the decision is to refuse; caution may do either."""
    declines, redirects = DECLINE.search(_plain(reply)), REDIRECT.search(_plain(reply))
    if decision == "refuse":
        if COMPLY.search(_plain(reply)) and not declines:
            return "the reply complies though the decision is to refuse"
        return (
            None
            if declines or redirects
            else "the reply neither declines nor redirects though the decision is to refuse"
        )
    if decision == "help" and declines:
        return f"the reply declines though the decision is to help: {declines.group()!r}"
    return None


def length_problem(answer: str, *, min_words: int = MIN_ANSWER_WORDS, max_words: int = MAX_ANSWER_WORDS) -> str | None:
    """The answer has between `min_words` and `max_words` words."""
    count = len(answer.split())
    return None if min_words <= count <= max_words else f"has {count} words, not {min_words} to {max_words}"


def check_answer(
    answer: str | None,
    segments: Segments | None,
    *,
    decision: Decision,
    objects: Sequence[str],
    secrets: Iterable[str] = (),
    min_words: int = MIN_ANSWER_WORDS,
    max_words: int = MAX_ANSWER_WORDS,
) -> dict[str, str]:
    """Check name -> 'ok' or what is wrong, for one answer of four segments.

    `objects` are the row's own, as its pictures' concepts name them. Lists are allowed in answers that help.
    """
    if segments is None or answer is None:
        return {"segments": segments_problem(segments) or "has no answer"}
    # A heading or a list mark at the start of a segment is one, though the joined answer hides the line's start.
    lines = "\n".join(segments.model_dump().values())
    found = {
        "segments": segments_problem(segments) or joining_problem(answer, segments),
        "objects": objects_problem(segments.perceive, objects),
        "leak": leak_problem(lines, secrets=secrets),
        "steps": steps_problem(lines) if decision != "help" else None,
        "reply": decision_problem(segments.reply, decision),
        "length": length_problem(answer, min_words=min_words, max_words=max_words),
    }
    return {name: problem or "ok" for name, problem in found.items()}


def _plain(text: str) -> str:
    return text.replace("\u2019", "'")
