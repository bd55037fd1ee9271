"""Cuts a reasoned answer into the four parts that MIRage teaches: perceive, relate, risk, reply; by rule, for reading.

Generated text has no marks where one part ends. The cut follows the words, so it is right on answers of the taught form
and a guess elsewhere; an answer that does not begin with what the pictures show is left whole. No number rests on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from mirage.evals.language import DECLINES, read_reply

Segment = Literal["perceive", "relate", "risk", "reply"]
SEGMENTS: tuple[Segment, ...] = ("perceive", "relate", "risk", "reply")

_ENDS = re.compile(r"(?<=[.!?])[\"')*]*\s+|\n+")
_PICTURE = r"(?:images?|pictures?|photos?|photographs?)"
_SEES = re.compile(
    rf"\b(?:first|second|third|fourth|last|other|one|both|these|left|right|the)\b.{{0,20}}\b{_PICTURE}\b.*"
    rf"\b(?:shows?|depicts?|displays?|contains?|features?|is|are|has|have)\b|^\W*{_PICTURE}[ -]?\d\b"
    r"|\bthe question (?:names|is about|asks)\b[^:]*$",
    re.IGNORECASE,
)
_RISKY = re.compile(
    r"\b(?:risks?|risky|dangers?|dangerous|hazards?|hazardous|harm(?:ful|s)?|unsafe|illegal|injur\w+|threat\w*"
    r"|(?:could|can|may|might|would|will) (?:\w+ )?(?:lead|cause|result|end|start|turn))\b",
    re.IGNORECASE,
)
_REPLIES = re.compile(
    r"^\W*(?:so,? |therefore,? |for this reason,? |instead,? |however,? |please |but )?"
    r"(?:you (?:can|could|should|may|might)\b|i(?:'m| am) (?:sorry|unable|not able)|sorry\b|sure\b|of course\b"
    r"|i (?:can|could|would|will|must|recommend|suggest|advise|strongly)\b|i can't|i cannot|(?:please|instead)\b"
    r"|here (?:is|are)\b)",
    re.IGNORECASE,
)


def answer_parts(answer: str) -> list[tuple[Segment | None, str]]:
    """The answer's parts in order; their texts joined are the answer. [(None, answer)] where it is not reasoned."""
    pieces = _sentences(answer)
    if not pieces or not _SEES.search(pieces[0]):
        return [(None, answer)]
    kinds: list[Segment] = []
    for number, piece in enumerate(pieces):
        kinds.append(_next(kinds[-1] if kinds else "perceive", piece, is_first=number == 0))
    joined = groupby(zip(kinds, pieces, strict=True), key=lambda pair: pair[0])
    return [(kind, "".join(piece for _, piece in group)) for kind, group in joined]


def _next(before: Segment, sentence: str, *, is_first: bool) -> Segment:
    """Parts come in one order: a sentence belongs to the part before it or to a later one."""
    if is_first:
        return "perceive"
    place = SEGMENTS.index(before)
    folded = read_reply(sentence).text
    if before == "reply" or _REPLIES.search(folded) or DECLINES.search(folded):
        return "reply"
    if before == "risk" or _RISKY.search(sentence):
        return "risk"
    return "perceive" if place == 0 and _SEES.search(sentence) else "relate"


def _sentences(text: str) -> Sequence[str]:
    """Sentences with the space behind them, so that nothing is lost."""
    found, start = [], 0
    for match in _ENDS.finditer(text):
        found.append(text[start : match.end()])
        start = match.end()
    return [*found, text[start:]] if start < len(text) else found
