"""Requests over HTTP by the `openai` client: one at a time, never retried here, every outcome a value."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

from mirage.endpoint.config import EndpointConfig
from mirage.endpoint.faults import Answer, Diagnosis, TransientFault
from mirage.errors import UserError
from mirage.strict_json import parse_json

Route = Literal["chat", "images"]
# Local servers want no key, the client wants one.
_NO_KEY = "not-needed"
_PATHS: Mapping[Route, str] = {"chat": "/chat/completions", "images": "/images/generations"}


def read_key(config: EndpointConfig) -> str:
    """The key from its environment variable, or an empty text where none is configured. Raises `UserError`."""
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"endpoint {config.model!r} at {config.base_url}: the environment variable {config.api_key_env} "
            "(api_key_env) is not set; export the key in it, or remove api_key_env for a server that wants none"
        )
    # Anything else fails inside the HTTP library with a message that quotes the header.
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"endpoint {config.model!r} at {config.base_url}: the key in {config.api_key_env} holds characters that no "
            "key has (spaces, line breaks or letters outside ASCII); export it again"
        )
    return key


class Transport:
    """One `openai` client for all requests. Belongs to the event loop it is first used in."""

    def __init__(self, config: EndpointConfig, *, key: str, diagnosis: Diagnosis) -> None:
        import httpx
        import openai

        from mirage.endpoint.lanes import Lanes, needs_proxy

        for name in ("openai", "httpx", "httpcore"):
            # Their debug lines hold headers as they are, and a server may repeat the key in its own.
            logger = logging.getLogger(name)
            logger.setLevel(max(logger.level, logging.INFO))
        self._openai = openai
        self._diagnosis = diagnosis
        self._reply_type = httpx.Response
        # Time is limited around the whole request: these limits begin anew with each byte that trickles in.
        http_client = httpx.AsyncClient(
            # A pool of its own knows no proxies; httpx's does.
            transport=None if needs_proxy(config.base_url) else Lanes(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
            timeout=httpx.Timeout(None, connect=config.timeout_seconds),
            follow_redirects=False,
        )
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url, api_key=key or _NO_KEY, max_retries=0, timeout=None, http_client=http_client
        )

    async def send(self, route: Route, fields: Mapping[str, Any], *, timeout_seconds: float) -> Any:
        """The reply's JSON object, or the exception that says why there is none. Raises nothing but cancellation.

        Returning what others raise keeps the request, and with it the key, out of every traceback.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                # The body as it came: the client's own models take a torn one for a reply, and cost time.
                response = await self._client.post(_PATHS[route], body=dict(fields), cast_to=self._reply_type)
        except TimeoutError:
            return TransientFault("timeout", f"no answer within {timeout_seconds:.3g} seconds", may_be_charged=True)
        except self._openai.APIStatusError as error:
            body = error.response.content
            answer = Answer(error.status_code, error.response.headers, body)
            return self._diagnosis.refused_request(answer, _error_object(body))
        except self._openai.APITimeoutError:
            return TransientFault("connection", "no connection in time")
        except self._openai.APIConnectionError as error:
            cause = type(error.__cause__ or error).__name__
            # A connection that was never made was never charged.
            return TransientFault("connection", f"connection failed: {cause}", may_be_charged=cause != "ConnectError")
        return self._read(response.content)

    def _read(self, body: bytes) -> Any:
        try:
            reply = parse_json(body, any_number=True)
        except ValueError:
            return TransientFault("invalid_body", f"{len(body)} bytes that are not JSON", may_be_charged=True)
        if not isinstance(reply, dict) or reply.get("error"):
            detail = self._diagnosis.clean(str(reply.get("error") if isinstance(reply, dict) else reply))
            return TransientFault("invalid_body", f"no reply in the body: {detail}", may_be_charged=True)
        # Answers and reasons are stored and shown, and a server may send back the key that it was sent.
        return self._diagnosis.without_key(reply)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()


def _error_object(body: bytes) -> Mapping[str, Any]:
    """The error in a body, in OpenAI's form, vLLM's older one or FastAPI's; empty if there is none."""
    try:
        found = parse_json(body, any_number=True)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    inner = found.get("error", found)
    return inner if isinstance(inner, dict) else {"message": str(inner)}
