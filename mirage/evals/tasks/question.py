"""From a benchmark's question to a sample: VLMEvalKit's prompt layouts, with pictures where the text marks them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mirage.data.row import Choice, ImagePart, Message, TextPart
from mirage.errors import UserError
from mirage.evals.task import Sample
from mirage.evals.tasks.embedded import KeptPicture
from mirage.strict_json import JsonError, parse_literal

# Keys of `Sample.meta`.
LETTERS = "letters"
ANSWERS = "answers"
GROUP = "group"

DIRECT = "Answer with the option's letter from the given choices directly."
SELECT = "Please select the correct answer from the options above. \n"
_NUMBERED = re.compile(r"<image ([1-9]\d?)>")
_PLAIN = "<image>"


@dataclass(frozen=True)
class Question:
    """One question as published. `options` by letter, in order; an open question has none, and its right `answers`."""

    id: str
    where: str
    text: str
    pictures: tuple[KeptPicture | Path, ...]
    category: str
    sub_category: str
    options: Mapping[str, str] = field(default_factory=dict)
    answer: str | None = None
    answers: tuple[str, ...] = ()
    cluster: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict)


def vlmevalkit_prompt(text: str, options: Mapping[str, str], *, hint: str | None) -> str:
    """VLMEvalKit's default (vlmeval/dataset/image_mcq.py `ImageMCQDataset.build_prompt`), byte for byte."""
    prompt = f"Hint: {hint}\n" if hint is not None else ""
    prompt += f"Question: {text}\n"
    if options:
        prompt += "Options:\n" + "".join(f"{letter}. {option}\n" for letter, option in options.items()) + SELECT
    return prompt


def muirbench_prompt(text: str, options: Mapping[str, str]) -> str:
    """MuirBench's (upstream `MUIRDataset.build_prompt`; lmms-eval's tasks/muirbench writes the same)."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in options.items())
    return f"{text}\n{listed}\n{DIRECT}" if options else f"{text}\n"


def make_sample(question: Question, prompt: str) -> Sample:
    """The sample that asks `prompt`, a text that may mark pictures. Raises `UserError` for an answer that is no option.

    `<image k>` puts picture k there, and pictures that no mark names are left out (upstream `split_MMMU`). The n-th
    `<image>` puts the n-th picture there; pictures without a mark come first, and marks without a picture vanish
    (upstream `split_MUIR`, but for pictures without a mark, which it leaves out). Without marks all come first.
    """
    content, pictures = _place(prompt, question.pictures, where=question.where)
    return Sample(
        id=question.id,
        messages=(Message(role="user", content=tuple(content)),),
        image_paths=tuple(item.path if isinstance(item, KeptPicture) else item for item in pictures),
        image_sha256=tuple(item.sha256 if isinstance(item, KeptPicture) else None for item in pictures),
        concepts=(None,) * len(pictures),
        category=question.category,
        sub_category=question.sub_category,
        cluster=question.cluster or question.id,
        choice=_choice(question),
        meta=_meta(question),
    )


def _place(
    prompt: str, pictures: Sequence[KeptPicture | Path], *, where: str
) -> tuple[list[TextPart | ImagePart], list[KeptPicture | Path]]:
    if _NUMBERED.search(prompt):
        return _place_numbered(prompt, pictures, where=where)
    texts = prompt.split(_PLAIN)
    num_marked = min(len(texts) - 1, len(pictures))
    num_first = len(pictures) - num_marked
    content: list[TextPart | ImagePart] = [ImagePart(index=index) for index in range(num_first)]
    content += _texts(texts[0])
    for number, text in enumerate(texts[1:]):
        if number < num_marked:
            content.append(ImagePart(index=num_first + number))
        content += _texts(text)
    # The marks show the first pictures; those without a mark are the last ones and stand in front.
    return content, [*pictures[num_marked:], *pictures[:num_marked]]


def _place_numbered(
    prompt: str, pictures: Sequence[KeptPicture | Path], *, where: str
) -> tuple[list[TextPart | ImagePart], list[KeptPicture | Path]]:
    """A picture that is marked twice is shown twice."""
    content: list[TextPart | ImagePart] = []
    shown: list[KeptPicture | Path] = []
    for position, piece in enumerate(_NUMBERED.split(prompt)):
        if position % 2 == 0:
            content += _texts(piece)
            continue
        if int(piece) > len(pictures):
            raise UserError(f"{where}: the text marks <image {piece}> and there are {len(pictures)} pictures")
        content.append(ImagePart(index=len(shown)))
        shown.append(pictures[int(piece) - 1])
    return content, shown


def _texts(text: str) -> list[TextPart | ImagePart]:
    return [TextPart(text=text)] if text else []


def _choice(question: Question) -> Choice | None:
    if not question.options:
        if not question.answers:
            raise UserError(
                f"{question.where}: neither options nor an answer, so nothing can be scored; a split without answers "
                "is scored by the benchmark's own server"
            )
        return None
    letters = list(question.options)
    answer = (question.answer or "").strip()
    if answer not in letters:
        found = "none" if not answer else repr(answer[:40])
        raise UserError(
            f"{question.where}: the answer must be one of {', '.join(letters)}, found {found}; a split without answers "
            "is scored by the benchmark's own server"
        )
    if len(letters) < 2:
        raise UserError(f"{question.where}: one option only ({letters[0]})")
    return Choice(options=tuple(question.options.values()), answer=letters.index(answer))


def _meta(question: Question) -> dict[str, str]:
    meta = dict(question.meta)
    if question.options:
        meta[LETTERS] = "".join(question.options)
    else:
        meta[ANSWERS] = json.dumps(list(question.answers), ensure_ascii=False)
    return meta


def answer_list(text: str) -> tuple[str, ...]:
    """The right answers of an open question: one text, or a list as Python or JSON writes it."""
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        try:
            items = parse_literal(stripped)
        except JsonError:
            return (stripped,)
        if isinstance(items, list) and items:
            return tuple(str(item) for item in items)
    return (stripped,)
