"""Open questions by normalised match, as MMMU scores them: a number equals a number, a text lies in the claim.

What the functions do is that of MMMU-Benchmark/MMMU eval/eval_utils.py (`parse_open_response`, `eval_open`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# The claim is what follows the last of these in a sentence; '=' counts in the last sentence only.
_MARKS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
# A run of digits is tried from its start alone, so that a long one takes no time by its square.
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])")

Normal = str | float


def matches(reply: str, answers: Sequence[str]) -> bool:
    """Whether the reply gives one of the right answers: a number equal to two decimals, or a text inside a claim."""
    right = [normal for answer in answers for normal in normalise(answer)]
    for claim in claims(reply):
        if isinstance(claim, str):
            if any(isinstance(answer, str) and answer in claim for answer in right):
                return True
        elif claim in right:
            return True
    return False


def equals(reply: str, answers: Sequence[str]) -> bool:
    """Whether the whole reply is one of the right answers, numbers to two decimals and case apart."""
    whole = normalise(reply.strip().strip("."))
    return any(whole == normalise(answer) for answer in answers)


def normalise(text: str) -> list[Normal]:
    """A number rounded to two decimals, or the text in lower case; a single letter must stand beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def claims(reply: str) -> list[Normal]:
    """What the reply may be taken to answer: the ends of its sentences and the numbers in them, normalised."""
    texts = _claim_texts(reply)
    found = texts + [number for text in texts for number in _numbers(text)]
    return list(dict.fromkeys(normal for text in found for normal in normalise(text)))


def _claim_texts(reply: str) -> list[str]:
    lower = reply.strip().strip(".").lower()
    # Upstream splits after lowering, so that only line ends part sentences; kept, as numbers depend on it.
    sentences = _SENTENCES.split(lower)
    found = []
    for number, sentence in enumerate(sentences):
        marks = (*_MARKS, "=") if number == len(sentences) - 1 else _MARKS
        tails = [sentence.rsplit(mark, 1)[1].strip() for mark in marks if mark in sentence]
        shortest = _shortest(tails)
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found or [lower]


def _shortest(tails: Sequence[str]) -> str:
    """The shortest tail; an empty one gives way to the next, as upstream has it."""
    kept = ""
    for tail in tails:
        if not kept or len(tail) < len(kept):
            kept = tail
    return kept


def _numbers(text: str) -> list[str]:
    return [*_WITH_COMMAS.findall(text), *_SCIENTIFIC.findall(text), *_SIMPLE.findall(text)]
