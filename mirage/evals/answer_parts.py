"""Which part of a reasoned answer each sentence of a reply is: perceive, relate, risk or reply (paper, section 3.2)."""

from __future__ import annotations

import re

from mirage.data.parts import SEGMENTS
from mirage.evals import language
from mirage.evals.language import read_reply

_SENTENCE = re.compile(r"\s*\S.*?(?:[.!?][\"')*]*(?=\s|$)|(?=\n)|$)", re.DOTALL)
_RISK = re.compile(
    r"\b(?:risks?|risky|dangers?|dangerous|harm(?:ful|s)?|hazard\w*|unsafe|illegal|unlawful|threat\w*|injur\w*|"
    r"lead to|result in|cause[sd]?|could be used|can be used|poison\w*)\b",
    re.IGNORECASE,
)
_SEES = re.compile(
    r"^\W*(?:the|this) (?:images?|pictures?|photos?|question) (?:shows?|depicts?|names?|is about|displays?)\b",
    re.IGNORECASE,
)
_FIRST_PERSON = re.compile(r"^\W*(?:sorry|i|i'm|i’m|instead|please|you|we|let's|if you)\b", re.IGNORECASE)
_PERCEIVE, _RELATE, _RISK_PART, _REPLY = range(len(SEGMENTS))


def answer_parts(answer: str) -> list[tuple[str | None, str]]:
    """The reply cut into (part, text), in order; the texts joined are the reply. None is text of no part.

    A reading of the form that MIRage trains, for display only: it begins with what the images show, and each later part
    follows the one before. A reply that does not begin so is one piece without a part.
    """
    found: list[tuple[int, str]] = []
    part = _PERCEIVE
    for sentence in _sentences(answer):
        part = max(part, _part_of(sentence, part, is_first=not found))
        if part and not found:
            break
        found.append((part, sentence))
    if not found:
        return [(None, answer)] if answer else []
    merged: list[tuple[str | None, str]] = []
    for number, text in found:
        if merged and merged[-1][0] == SEGMENTS[number]:
            merged[-1] = (SEGMENTS[number], merged[-1][1] + text)
        else:
            merged.append((SEGMENTS[number], text))
    return merged


def _sentences(answer: str) -> list[str]:
    """Pieces that joined are the answer, white space and all."""
    ends = [match.end() for match in _SENTENCE.finditer(answer)]
    pieces = [answer[start:end] for start, end in zip([0, *ends], ends)]
    if pieces and ends[-1] < len(answer):
        pieces[-1] += answer[ends[-1] :]
    return [piece for piece in pieces if piece]


def _part_of(sentence: str, part: int, *, is_first: bool) -> int:
    reading = read_reply(sentence)
    sees = language.describes_images(reading) or _SEES.match(sentence) is not None
    if part == _PERCEIVE and sees:
        return _PERCEIVE
    if is_first:
        return _REPLY
    if language.declines(reading) or language.redirects(reading) or _FIRST_PERSON.match(sentence):
        return _REPLY
    if _RISK.search(sentence):
        return _RISK_PART
    return _REPLY if language.helps(reading) and not sees else max(part, _RELATE)
