"""Assemble: finished samples become rows, with ids, siblings by id, licences and what made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from data_gen.engine import Finished
from data_gen.run_report import SetDrop
from data_gen.sample import Sample
from data_gen.stages.answers import join_segments
from data_gen.stages.classify import follow_siblings
from data_gen.stages.draft import TRAIN_SPLITS
from data_gen.stages.licences import UNKNOWN_ATTRIBUTIONS, UNKNOWN_LICENCES
from mirage.data.row import (
    Choice,
    ImagePart,
    ImageRef,
    Label,
    LineageStep,
    Message,
    Row,
    TextPart,
    row_id,
)
from mirage.data.views import REQUEST_TAG
from mirage.errors import UserError

STEP = "assemble"
NO_SIBLING = "its sibling did not become a row"


@dataclass(frozen=True)
class Assembled:
    """Rows in plan order with the places of their samples, and the samples that became none."""

    rows: tuple[Row, ...]
    places: tuple[tuple[int, ...], ...]
    dropped: tuple[SetDrop, ...]


def assemble(finished: Sequence[Finished]) -> Assembled:
    """The rows of all samples, which must be in plan order.

    A twin is put on the side (train or test) of its risky sibling; without one among the samples it is left out, as is
    a row that equals an earlier one. Raises UserError naming the first sample that is no whole row: a stage is missing,
    or a licence.
    """
    lineage = {entry.sample.position: entry.lineage for entry in finished}
    samples, lost = _with_siblings([entry.sample for entry in finished])
    dropped = [SetDrop(sample, STEP, reason) for sample, reason in lost]
    rows: dict[tuple[int, ...], Row] = {}
    place_of: dict[str, tuple[int, ...]] = {}
    # A row names its siblings by their ids; they stand before it in every plan.
    for sample in samples:
        needed = _sibling_places(sample)
        if any(place not in rows for place in needed.values()):
            dropped.append(SetDrop(sample, STEP, NO_SIBLING))
            continue
        ids = {name: rows[place].id for name, place in needed.items()}
        row = to_row(sample, lineage=lineage[sample.position], **ids)
        if row.id in place_of:
            dropped.append(SetDrop(sample, STEP, f"equals row {_place(place_of[row.id])} of the plan"))
            continue
        place_of[row.id] = sample.position
        rows[sample.position] = row
    return Assembled(tuple(rows.values()), tuple(rows), tuple(dropped))


def _with_siblings(samples: Sequence[Sample]) -> tuple[list[Sample], list[tuple[Sample, str]]]:
    """Twins of seeds from outside follow their siblings' split; planned ones are where the plan has put them."""
    kept, dropped = follow_siblings([sample for sample in samples if sample.draft is None])
    followed = {sample.position: sample for sample in kept}
    gone = {sample.position for sample, _ in dropped}
    rest = [followed.get(sample.position, sample) for sample in samples if sample.position not in gone]
    return rest, list(dropped)


def _sibling_places(sample: Sample) -> dict[str, tuple[int, ...]]:
    """Places of the rows that the sample's row names: `twin_of`, and `sibling_of` of contrast and line rows."""
    places = {} if sample.twin_of is None else {"twin_of": sample.twin_of}
    if sample.draft is not None and sample.draft.sibling_of is not None:
        places["sibling_of"] = (sample.draft.sibling_of,)
    return places


def to_row(
    sample: Sample, *, lineage: tuple[LineageStep, ...], twin_of: str | None = None, sibling_of: str | None = None
) -> Row:
    """The row of a finished sample. `twin_of` is the id of its risky sibling's row, `sibling_of` of the row that a
    contrast or line row was made from.

    Training rows end with the answer, test rows with the question. Raises UserError naming the sample and what it
    lacks: the split, the question, the label or the answer of a stage that the pipeline leaves out, or a licence.
    """
    split, query = _needed(sample, "split", "classify"), _needed(sample, "query", "compose")
    is_train = split in TRAIN_SPLITS
    answer = _answer(sample) if is_train else None
    messages = _messages(query, len(sample.images), answer)
    category, sub_category = _category(sample)
    try:
        return Row(
            id=row_id(sample.images, messages, split=split),
            split=split,
            category=category,
            sub_category=sub_category,
            images=sample.images,
            messages=messages,
            label=_label(sample),
            segments=sample.segments if is_train else None,
            choice=_choice(sample),
            twin_of=twin_of,
            twin_kind=sample.twin_kind,
            tags=sample.tags | _origin(sample) | ({} if sibling_of is None else {"sibling_of": sibling_of}),
            lineage=lineage,
            checks=sample.checks,
            licence=row_licence(sample),
        )
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"{_named(sample)} is no valid row: {problems}") from None


def row_licence(sample: Sample) -> str:
    """The licences of the pictures and of the seed, joined by AND. Raises UserError where one is missing."""
    parts = [("its seed", sample.seed.licence, sample.seed.attribution)]
    parts += [(f"picture {n}", image.licence, image.attribution) for n, image in enumerate(sample.images, 1)]
    for what, licence, attribution in parts:
        wanted = (("licence", licence, UNKNOWN_LICENCES), ("attribution", attribution, UNKNOWN_ATTRIBUTIONS))
        for name, value, unknown in wanted:
            if value.strip().lower() in unknown:
                raise UserError(
                    f"{_named(sample)}: {what} has no {name} ({value!r}), and rows need both; give it in the "
                    "seed file or in the options of illustrate"
                )
    licences = {licence for _, licence, _ in parts}
    return " AND ".join(sorted(f"({name})" if " OR " in name else name for name in licences))


def _named(sample: Sample) -> str:
    return f"seed {sample.seed.id!r} (row {_place(sample.position)} of the plan)"


def _place(position: tuple[int, ...]) -> str:
    return ".".join(map(str, position))


def _needed(sample: Sample, field: str, stage: str):
    value = getattr(sample, field)
    if value is None or value == "":
        raise UserError(f"{_named(sample)} has no {field}; put the stage {stage} into the pipeline")
    return value


def _answer(sample: Sample) -> str:
    if sample.answer is not None:
        return sample.answer
    if sample.segments is None:
        raise UserError(f"{_named(sample)} has no answer; put the stage label into the pipeline")
    return join_segments(sample.segments)


def _messages(question: str, num_images: int, answer: str | None) -> tuple[Message, ...]:
    marks = tuple(ImagePart(index=index) for index in range(num_images))
    user = Message(role="user", content=(*marks, TextPart(text=question)))
    if answer is None:
        return (user,)
    return user, Message(role="assistant", content=(TextPart(text=answer),))


def _category(sample: Sample) -> tuple[str, str]:
    if sample.elements is not None and sample.draft is None:
        return sample.elements.category, sample.elements.sub_category
    if sample.seed.category is None or sample.seed.sub_category is None:
        raise UserError(f"{_named(sample)} has no category; put the stage extract into the pipeline")
    return sample.seed.category, sample.seed.sub_category


def _label(sample: Sample) -> Label | None:
    """What a good answer does; none for general rows, which are about no risk."""
    if sample.draft is not None and sample.draft.kind == "general":
        return None
    decision = _needed(sample, "decision", "label")
    if decision == "help":
        return Label(decision=decision, risk_in="none")
    return Label(decision=decision, risk_in=_risk_in(sample), risk=sample.tags.get("risk") or _risk(sample))


def _risk(sample: Sample) -> str | None:
    return sample.elements.risk if sample.elements is not None else None


def _risk_in(sample: Sample) -> Literal["text", "image", "conjunction"]:
    if sample.draft is not None:
        return "text" if sample.draft.overt or sample.draft.named else "conjunction"
    if sample.text_is_dangerous:
        return "text"
    return "image" if sample.harm_is_visible else "conjunction"


def _choice(sample: Sample) -> Choice | None:
    draft = sample.draft
    return Choice(options=draft.options, answer=draft.answer) if draft is not None and draft.options else None


def _origin(sample: Sample) -> dict[str, str]:
    """Which seed a row is from, and what was asked in words; the plan's own samples say it by their other tags."""
    if sample.seed.kind == "draft":
        return {}
    seed = sample.seed
    tags = {"seed": seed.id, "seed_source": seed.source, "seed_licence": seed.licence, "seed_by": seed.attribution}
    return tags | ({REQUEST_TAG: sample.elements.request} if sample.elements is not None else {})


def pictures_of(rows: Sequence[Row]) -> dict[str, ImageRef]:
    """Path -> picture, of all rows."""
    return {image.path: image for row in rows for image in row.images}
