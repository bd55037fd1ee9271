"""Answers of a model behind an OpenAI-compatible server: the same store as answers in process, failures included."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mirage.config.schema import AnswerEndpointConfig, EvalConfig
from mirage.data.row import ImagePart, canonical_json
from mirage.endpoint.client import Endpoint
from mirage.endpoint.failures import EndpointFailure
from mirage.endpoint.messages import ChatMessage, PictureInput
from mirage.evals.answers import Answer, AnswerStore
from mirage.evals.generate import OnAnswers, Prompt
from mirage.evals.judges.verdict_cache import TRANSIENT
from mirage.evals.picture_inputs import picture_hashes, picture_inputs, shown_order
from mirage.evals.task import Sample

# Samples whose pictures are in memory, for each call in flight.
_WAITING_PER_CALL = 2


class EndpointDecoding(BaseModel):
    """Everything besides model, messages and pictures that is asked of the server. What it does itself is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Literal["endpoint"] = "endpoint"
    do_sample: bool = Field(description="false: temperature 0 is asked for; true: the model takes no temperature")
    max_new_tokens: int = Field(gt=0)
    extra: str = Field(description="further request fields, canonical JSON")

    @classmethod
    def of(cls, config: EvalConfig) -> EndpointDecoding:
        """As the settings ask for it."""
        assert config.endpoint is not None
        extra = config.endpoint.endpoint_config(max_tokens=1).extra_body
        return cls(
            do_sample=not config.endpoint.send_temperature,
            max_new_tokens=config.max_new_tokens,
            extra=canonical_json(dict(extra)),
        )


class ServerSpec(BaseModel):
    """Pictures and chat template are the server's own: how it numbers, cuts and scales pictures is not known here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Literal["server"] = "server"
    model: str


def endpoint_fingerprint(config: AnswerEndpointConfig) -> str:
    """Stands for the weights, which a server does not show: a hash of its address and the model's name.

    Other weights under the same name at the same address are not noticed.
    """
    return hashlib.sha256(canonical_json(["endpoint", config.base_url, config.model]).encode()).hexdigest()


def make_endpoint_prompts(samples: Sequence[Sample], *, fingerprint: str, decoding: BaseModel) -> list[Prompt]:
    """The samples as they are sent: messages as JSON with each picture's hash in its place. Raises `UserError`."""
    identity = [fingerprint, decoding.model_dump(mode="json")]
    prompts = []
    for sample in samples:
        text = canonical_json(_turns(sample))
        key = hashlib.sha256(canonical_json([*identity, text]).encode()).hexdigest()
        prompts.append(Prompt(sample, [], text, key))
    return prompts


def _turns(sample: Sample) -> list[Any]:
    hashes = iter(picture_hashes(sample))
    return [
        [
            message.role,
            [{"image": next(hashes)} if isinstance(part, ImagePart) else part.text for part in message.content],
        ]
        for message in sample.messages
    ]


def chat_messages(sample: Sample) -> list[ChatMessage]:
    """The sample's messages with its pictures where they stand. Raises `UserError` for an unreadable picture."""
    pictures = dict(zip(shown_order(sample), picture_inputs(sample), strict=True))
    messages = []
    for message in sample.messages:
        parts: list[str | PictureInput] = [
            pictures[part.index] if isinstance(part, ImagePart) else part.text for part in message.content
        ]
        messages.append(ChatMessage(message.role, tuple(parts)))
    return messages


async def ask_for_answers(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    *,
    decoding: EndpointDecoding,
    store: AnswerStore,
    on_answers: OnAnswers = lambda count, kept: None,
) -> dict[str, Answer]:
    """Answers by prompt key: those in the store, and the missing ones from the server, stored one by one.

    A call that brings no answer is an answer with a `failure`. One by faults of the line (class transient) is not
    stored, so the same command asks for it again. Raises `UserError` where no further call can succeed.
    """
    have = store.read()
    missing = {prompt.key: prompt for prompt in prompts if prompt.key not in have}
    places, writing = asyncio.Semaphore(_WAITING_PER_CALL * endpoint.config.concurrency), asyncio.Lock()
    on_answers(len({prompt.key for prompt in prompts}) - len(missing), True)

    async def fetch(prompt: Prompt) -> None:
        async with places:
            answer = await _answer(endpoint, prompt, max_new_tokens=decoding.max_new_tokens)
        have[prompt.key] = answer
        if answer.failure is None or not answer.failure.startswith(TRANSIENT):
            async with writing:
                await asyncio.to_thread(store.append, [answer])
        on_answers(1, False)

    try:
        async with asyncio.TaskGroup() as group:
            for prompt in missing.values():
                group.create_task(fetch(prompt))
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    return have


async def _answer(endpoint: Endpoint, prompt: Prompt, *, max_new_tokens: int) -> Answer:
    try:
        completion = await endpoint.complete(chat_messages(prompt.sample), max_tokens=max_new_tokens)
    except EndpointFailure as failure:
        return Answer(prompt.key, "", 0, "stop", failure=f"{failure.kind}: {failure.message}")
    return Answer(prompt.key, completion.text.strip(), completion.usage.completion_tokens, completion.finish)


def _first(errors: BaseExceptionGroup) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
