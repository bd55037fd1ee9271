"""What went wrong with a request: worth another try, this call's failure, or the user's to put right."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mirage.endpoint.config import EndpointConfig
from mirage.endpoint.failures import EndpointFailure
from mirage.errors import UserError
from mirage.tracking.redact import strike

# 529: "overloaded" of some hosts.
_OVERLOAD = frozenset({429, 503, 529})
_TRANSIENT = frozenset({408, 409, 425, *_OVERLOAD})
_CONTENT_CODES = frozenset(
    {
        "content_filter",  # Azure OpenAI
        "content_policy_violation",  # OpenAI images
        "responsibleaipolicyviolation",  # Azure OpenAI, inner error
        "moderation_blocked",  # OpenAI images
        "invalid_prompt",  # OpenAI reasoning models
        "data_inspection_failed",  # Alibaba
        "sensitive_words_detected",
    }
)
_QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
_TOO_LONG = re.compile(
    r"context_length_exceeded|context length|maximum context|too many tokens|prompt is too long", re.I
)
_SETTINGS = re.compile(
    r"\b(response_format|json_schema|guided_json|temperature|seed|max_tokens|max_completion_tokens)\b", re.I
)
_MAX_DETAIL_CHARS, _MAX_ERROR_BYTES = 300, 65_536


class TransientFault(Exception):
    """A request that may well succeed when it is sent again.

    cause: short word for the statistics; is_overload: the endpoint asks for fewer calls; may_be_charged: the reply was
    lost, not refused.
    """

    def __init__(
        self, cause: str, message: str, *, retry_after_seconds: float | None = None,
        is_overload: bool = False, may_be_charged: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.cause = cause
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.is_overload = is_overload
        self.may_be_charged = may_be_charged


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Diagnosis:
    """Tells faults apart. Holds the key only to strike it out of what the endpoint says."""

    def __init__(self, config: EndpointConfig, key: str) -> None:
        self._config = config
        self._key = key

    def __repr__(self) -> str:
        return f"Diagnosis({self._config.base_url!r}, {self._config.model!r})"

    @property
    def name(self) -> str:
        """The endpoint in words."""
        return f"{self._config.model!r} at {self._config.base_url}"

    def refused_request(self, answer: Answer, error: Mapping[str, Any]) -> Exception:
        """The exception for a status of 300 or more; `error` is its body's error object, empty if there is none."""
        status, codes = answer.status, _codes(error)
        detail = self._detail(answer, error)
        if status < 400:
            return UserError(f"endpoint {self.name} redirects (status {status}); write the final address into base_url")
        if status == 402 or codes & _QUOTA_CODES:
            return UserError(f"endpoint {self.name} refuses to go on without payment (status {status}): {detail}")
        if status in _TRANSIENT or status >= 500:
            return TransientFault(
                str(status),
                f"status {status}: {detail}",
                retry_after_seconds=retry_after_seconds(answer.headers),
                is_overload=status in _OVERLOAD,
            )
        if codes & _CONTENT_CODES or _is_flagged(error) or status == 451:
            return EndpointFailure("content_filter", f"the endpoint's filter stopped the prompt: {detail}")
        if status in (401, 403, 404):
            return self._access(status, detail)
        return self._bad_request(status, detail)

    def _access(self, status: int, detail: str) -> UserError:
        variable = self._config.api_key_env
        if status == 404:
            return UserError(
                f"endpoint {self.name} was not found (status 404): {detail}; check base_url (it ends with the version, "
                "as in /v1) and the model's name"
            )
        key = f"the key in {variable}" if variable else "a request without a key (name its variable in api_key_env)"
        return UserError(f"endpoint {self.name} does not accept {key} (status {status}): {detail}")

    def _bad_request(self, status: int, detail: str) -> Exception:
        if _TOO_LONG.search(detail) or status == 413:
            return EndpointFailure("schema", f"the prompt does not fit the model (status {status}): {detail}")
        if match := _SETTINGS.search(detail):
            setting = match.group(1).lower()
            advice = {
                "seed": "set image_seed: false if this is the images API",
                "temperature": "set temperature: null or a value that it takes",
                "max_tokens": "set max_tokens_field: max_completion_tokens, or a smaller max_tokens",
                "max_completion_tokens": "set max_tokens_field: max_tokens, or a smaller max_tokens",
            }.get(setting, "set structured: json_object or prompt (image_response_format: null for the images API)")
            return UserError(f"endpoint {self.name} does not take {setting} (status {status}): {detail}; {advice}")
        return EndpointFailure("schema", f"the endpoint refused the request (status {status}): {detail}")

    def unreachable(self, cause: str) -> UserError:
        """Nothing ever answered: not a busy endpoint but a wrong address or a server that is not there."""
        return UserError(f"nothing answers at {self._config.base_url} ({cause}); start the server or correct base_url")

    def _detail(self, answer: Answer, error: Mapping[str, Any]) -> str:
        message = error.get("message") if error else None
        text = str(message or error or answer.body[:_MAX_ERROR_BYTES].decode("utf-8", "replace"))
        return self.clean(text) or "no reason given"

    def clean(self, text: str) -> str:
        """Foreign text for a message: one line, short, without the key."""
        return " ".join(self.without_key(text).split())[:_MAX_DETAIL_CHARS]

    def without_key(self, value: Any) -> Any:
        """What the endpoint sent (text, or JSON data), without the key."""
        return strike(value, self._key) if self._key else value


def _codes(error: Mapping[str, Any]) -> set[str]:
    inner = error.get("innererror")
    values = [error.get("code"), error.get("type"), inner.get("code") if isinstance(inner, dict) else None]
    return {str(value).lower() for value in values if value}


def _is_flagged(error: Mapping[str, Any]) -> bool:
    """OpenRouter reports moderation as metadata with reasons."""
    metadata = error.get("metadata")
    return isinstance(metadata, dict) and bool(metadata.get("reasons") or metadata.get("flagged_input"))


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """How long an endpoint asks to wait: retry-after-ms, or Retry-After in seconds or as an HTTP date; None: unsaid."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (TypeError, ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
