"""Which option a multiple-choice reply gives: by the option's text or by its letter; None when it is not one."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Extraction:
    """Index of the option the reply gives, or None; and how it was read."""

    index: int | None
    reason: str


# A letter counts only where nothing else can be meant: 'A person is standing' is not option A, 'the answer is a tram'
# is not either.
_LETTER = r"[*_(\[]*([a-z])[*_)\]]*"
_END = r"(?=\s*(?:$|[.,;:!?)-]|because\b|since\b|as\b))"
_IS_RIGHT = r"\s+is\s+(?:the\s+)?(?:right|correct|answer|best)\b"
_LETTER_FORMS = tuple(
    re.compile(form)
    for form in (
        r"\\boxed\{\s*\(?([a-z])\)?\s*\}",
        rf"\b(?:answer|option|choice)(?: is|:| would be)+\s*(?:option\s+)?{_LETTER}{_END}",
        rf"(?:^|[\s,;:]){_LETTER}{_IS_RIGHT}",
        rf"\bso\s+{_LETTER}\s*[.!]?\s*$",
    )
)
_WHOLE_LETTER = re.compile(r"^\W*(?:(?:option|answer)\s*:?\s*)?([a-z])\W*$")
_LEADING_LETTER = re.compile(r"^\W*([a-z])\s*[.):]\s*(?=\S)")
_DENIED = re.compile(r"\b(?:not|isn't|no|neither|nor)\s+(?:an?\s+|the\s+)?$")


def extract_choice(reply: str, options: Sequence[str]) -> Extraction:
    """The option that `reply` gives.

    Text and letter are read apart. One of them is enough; if both are there and differ, the reply gives no option,
    and neither does one that names several options without saying which is the answer.
    """
    text = _fold(reply)
    if not text:
        return Extraction(None, "the reply is empty")
    letters = _letters(text, num_options=len(options))
    by_text = _options_in(_claim(text), options) or _options_in(text, options)
    if len(letters) > 1:
        return Extraction(
            None, f"the reply gives several letters: {', '.join(string.ascii_uppercase[i] for i in letters)}"
        )
    letter = letters[0] if letters else None
    if len(by_text) == 1:
        if letter is not None and letter != by_text[0]:
            return Extraction(
                None, f"the reply names {options[by_text[0]]!r} and the letter {string.ascii_uppercase[letter]}"
            )
        return Extraction(by_text[0], f"names the option {options[by_text[0]]!r}")
    if letter is not None:
        return Extraction(letter, f"gives the letter {string.ascii_uppercase[letter]}")
    if by_text:
        return Extraction(None, f"the reply names several options: {', '.join(repr(options[i]) for i in by_text)}")
    return Extraction(None, "the reply names no option")


def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return " ".join(folded.split())


def _claim(text: str) -> str:
    """What follows the last 'answer is' or 'answer:', or nothing."""
    found = list(re.finditer(r"\banswer(?: is|:)\s*", text))
    return text[found[-1].end() :] if found else ""


def _letters(text: str, *, num_options: int) -> list[int]:
    valid = string.ascii_lowercase[:num_options]
    whole = _WHOLE_LETTER.match(text)
    if whole and whole.group(1) in valid:
        return [valid.index(whole.group(1))]
    found = [match.group(1) for form in _LETTER_FORMS for match in form.finditer(text)]
    leading = _LEADING_LETTER.match(text)
    if leading and not found:
        found.append(leading.group(1))
    return sorted({valid.index(letter) for letter in found if letter in valid})


def _options_in(text: str, options: Sequence[str]) -> list[int]:
    """Indices of the options whose text occurs in `text` as whole words; a longer option hides one inside it."""
    spans: list[tuple[int, int, int]] = []
    for index, option in enumerate(options):
        words = re.escape(_fold(option))
        found = re.finditer(rf"(?<!\w){words}(?!\w)", text) if words else ()
        spans += [(m.start(), m.end(), index) for m in found if not _DENIED.search(text[: m.start()])]
    kept = [
        span
        for span in spans
        if not any(other[0] <= span[0] and span[1] <= other[1] and other[:2] != span[:2] for other in spans)
    ]
    return sorted({index for _, _, index in kept})
