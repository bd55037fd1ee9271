"""Conversations: MIS_Train, LLaVA/ShareGPT and M4-Instruct files, Think-in-Safety, and `messages` of `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mirage.data.readers.build import IMAGE_MARK, REFUSED_FOR_TEXT, Role, Turn, build_row
from mirage.data.readers.entry import SourcedRow
from mirage.data.readers.images import image_list
from mirage.data.readers.records import Record, field_names
from mirage.errors import UserError

SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
MESSAGE_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}
THOUGHT = re.compile(r"\s*<think>.+?</think>.*\S", re.DOTALL)


def read_sharegpt(record: Record) -> Iterator[SourcedRow]:
    """`conversations` of {from, value} and `image` or `images`: LLaVA, InternVL, M4-Instruct (annotations file)."""
    yield build_row(
        record,
        sharegpt_turns(record),
        image_list(record, "image", "images"),
        category=str(record.value.get("category") or "General"),
        sub_category=str(record.value.get("sub_category") or ""),
    )


def read_mis_train(record: Record) -> Iterator[SourcedRow]:
    """The published MIS_Train: two pictures, one question, one reasoned answer.

    Its rows are those whose text alone is dangerous (paper section 3.2, the split rule), which the label says.
    """
    yield build_row(
        record,
        sharegpt_turns(record),
        image_list(record, "image", "images"),
        category=record.text("category"),
        sub_category=str(record.value.get("sub_category") or ""),
        label=REFUSED_FOR_TEXT,
        images_first=True,
    )


def read_think_in_safety(record: Record) -> Iterator[SourcedRow]:
    """Think-in-Safety's train_data.json: ShareGPT turns whose answers open with `<think>...</think>`, kept."""
    turns = sharegpt_turns(record)
    for turn in turns:
        if turn.role == "assistant" and not THOUGHT.fullmatch(turn.text.rstrip()):
            raise UserError(
                f"{record.location}: an answer must be <think>...</think> and then text, found {turn.text!r:.60}; "
                "read data without thoughts with format=sharegpt"
            )
    yield build_row(record, turns, image_list(record, "images", "image"))


def read_messages(record: Record) -> Iterator[SourcedRow]:
    """`messages` of {role, content} and `images` or `image`, as chat datasets in Parquet have them.

    Content is text (with `<image>` marks, if any) or a list of parts of type "text" and "image".
    """
    messages = record.value.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{record.location}: has no 'messages' list; its fields are {field_names(record.value)}")
    turns = [_message_turn(message, record) for message in messages]
    yield build_row(record, turns, image_list(record, "images", "image"))


def sharegpt_turns(record: Record) -> list[Turn]:
    """The turns of a ShareGPT record. Raises `UserError` naming it for one without roles and texts."""
    conversations = record.value.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise UserError(f"{record.location}: has no 'conversations' list; a ShareGPT record needs one")
    if record.value.get("video"):
        raise UserError(f"{record.location}: is about a video; only pictures are taken")
    turns = []
    for turn in conversations:
        role = SHAREGPT_ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise UserError(
                f"{record.location}: a turn must have 'from' (human, gpt or system) and a text 'value', "
                f"found {turn!r:.80}"
            )
        turns.append(Turn(role, text))
    return turns


def _message_turn(message: Any, record: Record) -> Turn:
    role = MESSAGE_ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if role is not None and isinstance(content, str):
        return Turn(role, content)
    if role is not None and isinstance(content, list):
        return Turn(role, "".join(_part_text(part, record) for part in content))
    raise UserError(
        f"{record.location}: a message must have a role (user, assistant or system) and content (text or a list of "
        f"parts), found {message!r:.80}"
    )


def _part_text(part: Any, record: Record) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return IMAGE_MARK
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise UserError(f"{record.location}: a part must be of type text or image, found {part!r:.80}")
