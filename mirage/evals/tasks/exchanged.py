"""A sample in one cell of an exported table: what the table's own columns cannot say, so that it reads back equal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

from mirage.data.row import Choice, Decision, ImagePart, Message, TextPart, canonical_json
from mirage.errors import UserError
from mirage.evals.task import Sample
from mirage.evals.tasks.embedded import KeptPicture
from mirage.evals.tasks.tsv import EXCHANGED
from mirage.strict_json import JsonError, parse_json


class ExchangedSample(BaseModel):
    """A sample but for its id and its pictures, which stand in columns of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    messages: Annotated[tuple[Message, ...], FailFast()]
    category: str
    sub_category: str
    cluster: str
    concepts: tuple[str | None, ...] = ()
    decision: Decision | None = None
    risk: str | None = None
    choice: Choice | None = None
    meta: dict[str, str] = {}


def dump_sample(sample: Sample) -> str:
    """The cell of a sample. What a variant is scored against is not in it: such a sample is exported as it is asked."""
    fields = ExchangedSample(
        messages=sample.messages,
        category=sample.category,
        sub_category=sample.sub_category,
        cluster=sample.cluster,
        concepts=sample.concepts,
        decision=sample.decision,
        risk=sample.risk,
        choice=sample.choice,
        meta=dict(sample.meta),
    )
    return canonical_json(fields.model_dump(mode="json", exclude_none=True))


def load_sample(cell: str, *, key: str, pictures: Sequence[KeptPicture | Path], where: str) -> Sample:
    """The sample of a cell with its pictures. Raises `UserError` for a cell of another version or a damaged one."""
    try:
        fields = ExchangedSample.model_validate(parse_json(cell))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: column {EXCHANGED} is damaged ({first['msg']}); export the task again") from error
    except JsonError as error:
        raise UserError(f"{where}: column {EXCHANGED} is damaged ({error}); export the task again") from error
    wrong = _wrong_meta(fields)
    if wrong:
        raise UserError(f"{where}: column {EXCHANGED} is damaged ({wrong}); export the task again")
    marks = [part.index for message in fields.messages for part in message.content if isinstance(part, ImagePart)]
    if sorted(set(marks)) != list(range(len(pictures))):
        raise UserError(f"{where}: {len(pictures)} pictures, and column {EXCHANGED} marks {sorted(set(marks))}")
    return Sample(
        id=key,
        messages=fields.messages,
        image_paths=tuple(item.path if isinstance(item, KeptPicture) else item for item in pictures),
        image_sha256=tuple(item.sha256 if isinstance(item, KeptPicture) else None for item in pictures),
        category=fields.category,
        sub_category=fields.sub_category,
        cluster=fields.cluster,
        concepts=fields.concepts,
        decision=fields.decision,
        risk=fields.risk,
        choice=fields.choice,
        meta=fields.meta,
    )


def _wrong_meta(fields: ExchangedSample) -> str | None:
    """What is wrong with the parts of `meta` that scoring reads."""
    letters, answers = fields.meta.get("letters"), fields.meta.get("answers")
    num_options = len(fields.choice.options) if fields.choice is not None else 0
    if num_options and letters is not None and (len(letters) != num_options or len(set(letters)) != num_options):
        return f"the letters {letters[:40]!r} are not one an option"
    if num_options > 26 and letters is None:
        return f"{num_options} options and no letters for them"
    if answers is None:
        return None
    try:
        listed = parse_json(answers)
    except JsonError as error:
        return f"answers: {error}"
    texts = isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed)
    return None if texts else "answers must be a list of texts"


def plain_question(sample: Sample) -> str:
    """The last user turn as one text. Pictures that stand elsewhere than before it all are marked `<image k>`."""
    content = sample.messages[-1].content
    leading = 0
    while leading < len(content) and isinstance(content[leading], ImagePart):
        leading += 1
    first_indices = [part.index for part in content[:leading] if isinstance(part, ImagePart)]
    if first_indices == list(range(len(sample.image_paths))):
        return "".join(part.text for part in content[leading:] if isinstance(part, TextPart))
    return "".join(part.text if isinstance(part, TextPart) else f"<image {part.index + 1}>" for part in content)


def option_columns(sample: Sample) -> dict[str, str]:
    """The options by letter; none for other samples."""
    if sample.choice is None:
        return {}
    letters = sample.meta.get("letters") or "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(sample.choice.options)]
    return dict(zip(letters, sample.choice.options, strict=True))


def right_answer(sample: Sample) -> str:
    """The right letter, the right answers of an open question as a JSON list, or nothing."""
    if sample.choice is not None:
        return list(option_columns(sample))[sample.choice.answer]
    answers: list[Any] = json.loads(sample.meta["answers"]) if "answers" in sample.meta else []
    return json.dumps(answers, ensure_ascii=False) if answers else ""


def check_exportable(samples: Sequence[Sample], *, task: str) -> None:
    """Raises `UserError` where the other tools cannot ask what the task asks."""
    for sample in samples:
        if [message.role for message in sample.messages if message.role != "user"] or len(sample.messages) != 1:
            raise UserError(
                f"task {task!r}: sample {sample.id} has {len(sample.messages)} turns, or a system turn; a table holds "
                "one question a row"
            )
