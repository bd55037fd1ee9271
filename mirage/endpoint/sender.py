"""Gets one request answered: a place among those in flight, money under the cap, and another try after a fault."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mirage.endpoint.config import EndpointConfig
from mirage.endpoint.costs import Ledger
from mirage.endpoint.failures import EndpointFailure, Usage
from mirage.endpoint.faults import Diagnosis, TransientFault
from mirage.endpoint.limiter import Limiter
from mirage.endpoint.statistics import Statistics
from mirage.endpoint.transport import Route, Transport, read_key
from mirage.errors import UserError

if TYPE_CHECKING:
    import tenacity

_tickets = itertools.count()


@dataclass
class Call:
    """One call on its way: its place in the queue, its deadline and what it has used so far."""

    ticket: int = field(default_factory=lambda: next(_tickets))
    deadline: float | None = None
    num_faults: int = 0
    usage: Usage = field(default_factory=Usage)

    def seconds_left(self) -> float:
        """Until the deadline; without end before the first request."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()


@dataclass(frozen=True)
class Request:
    """What is sent, the most it can cost, and how its reply is read: `is_complete` tells a reply from a torn one."""

    route: Route
    fields: Mapping[str, Any] = field(repr=False)
    worst_usd: float
    usage_of: Callable[[Mapping[str, Any]], Usage]
    is_complete: Callable[[Mapping[str, Any]], bool]


class Sender:
    """Sends requests side by side, as many as the endpoint bears, in the order of their calls' tickets.

    May be used in one event loop after another, in one at a time. Raises `UserError` if the key's variable is not set.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.statistics = Statistics()
        self.limiter = Limiter(config.concurrency)
        self._config = config
        self._key = read_key(config)
        self.diagnosis = Diagnosis(config, self._key)
        self.ledger = Ledger(config.max_cost_usd, name=self.diagnosis.name)
        self._transport: Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: str | None = None
        self._was_answered = False
        self._timeouts_in_a_row = 0
        # Waits only: a generator of its own leaves everybody's random numbers as they are.
        self._jitter = random.Random(0)

    def stop(self, reason: str) -> None:
        """Send nothing more: what waits, and what comes, ends in a `UserError` with this text."""
        self._stopped = self._stopped or reason

    async def send(self, call: Call, request: Request) -> Mapping[str, Any]:
        """A complete reply, after as many tries as the faults allow.

        Raises `EndpointFailure` (transient when the tries ran out; content_filter; schema for a request that the
        endpoint cannot take) or `UserError` (address, key, model, settings, cost cap).
        """
        import tenacity

        call.num_faults = 0
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientFault),
            stop=lambda state: self._gives_up(call, state),
            wait=self._wait_seconds,
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            return await retrying(self._attempt, call, request)
        except TransientFault as error:
            fault = error
        if fault.cause == "connection" and not self._was_answered:
            raise self.diagnosis.unreachable(fault.message)
        raise EndpointFailure("transient", f"given up after {call.num_faults} faults, the last: {fault.message}")

    async def aclose(self) -> None:
        """Close the connections; the next request opens new ones."""
        transport, self._transport = self._transport, None
        if transport is not None and self._loop is asyncio.get_running_loop():
            await transport.aclose()

    async def _attempt(self, call: Call, request: Request) -> Mapping[str, Any]:
        """One request: wait for a place and for the money, send, settle."""
        transport = self._bind()
        admitted_at = await self._admission(call)
        try:
            if self._stopped is not None:
                raise UserError(self._stopped)
            self._give_up_silent()
            await self.ledger.reserve(request.worst_usd)
            # Unknown until the reply says it: a request that is torn off may have been charged.
            cost_usd: float | None = None
            try:
                outcome = await self._exchange(transport, call, request)
                cost_usd = self._book(call, request, outcome)
            finally:
                self.ledger.settle(request.worst_usd, cost_usd=cost_usd)
            if not isinstance(outcome, Exception):
                self.limiter.succeeded()
            elif isinstance(outcome, TransientFault) and outcome.is_overload:
                self.limiter.overloaded(admitted_at, pause_seconds=self._asked_seconds(outcome))
        finally:
            self.limiter.release()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _admission(self, call: Call) -> float:
        """A place among the requests in flight; the deadline begins with the first one."""
        if call.deadline is None:
            admitted_at = await self.limiter.acquire(call.ticket)
            call.deadline = time.monotonic() + self._config.deadline_seconds
            return admitted_at
        try:
            async with asyncio.timeout(max(0.0, call.seconds_left())):
                return await self.limiter.acquire(call.ticket)
        except TimeoutError:
            pass
        raise EndpointFailure("transient", f"not answered within deadline_seconds = {self._config.deadline_seconds:g}")

    async def _exchange(self, transport: Transport, call: Call, request: Request) -> Mapping[str, Any] | Exception:
        """The reply or the exception for it, counted."""
        self.statistics.requests += 1
        started = time.monotonic()
        seconds = max(0.0, min(self._config.timeout_seconds, call.seconds_left()))
        outcome = await transport.send(request.route, request.fields, timeout_seconds=seconds)
        if not isinstance(outcome, Exception):
            self.statistics.latencies_seconds.append(time.monotonic() - started)
            if not request.is_complete(outcome):
                outcome = TransientFault("invalid_body", "a body without a reply", may_be_charged=True)
        if isinstance(outcome, TransientFault):
            # Being put off is no fault: a queue at a busy endpoint is limited by the deadline alone.
            call.num_faults += not outcome.is_overload
            self._was_answered |= outcome.cause not in ("connection", "timeout")
        else:
            self._was_answered = True
        timed_out = isinstance(outcome, TransientFault) and outcome.cause == "timeout"
        self._timeouts_in_a_row = self._timeouts_in_a_row + 1 if timed_out else 0
        return outcome

    def _give_up_silent(self) -> None:
        """Raise `EndpointFailure` for an endpoint that hangs: as many requests as a full round of calls may make have
        timed out with no answer between. One request at a time finds out whether it is back."""
        most = self._config.concurrency * self._config.max_attempts
        if self._timeouts_in_a_row >= most and self.limiter.num_active > 1:
            raise EndpointFailure(
                "transient",
                f"not sent: the endpoint has answered none of the last {self._timeouts_in_a_row} requests within "
                f"timeout_seconds = {self._config.timeout_seconds:g}",
            )

    def _book(self, call: Call, request: Request, outcome: Mapping[str, Any] | Exception) -> float | None:
        """Add what the request used to its call; returns its cost, None if that is not known."""
        if not isinstance(outcome, Exception):
            usage = request.usage_of(outcome)
            call.usage += usage
            return usage.cost_usd
        call.usage += Usage(calls=1)
        return None if isinstance(outcome, TransientFault) and outcome.may_be_charged else 0.0

    def _bind(self) -> Transport:
        """The connections of the running event loop; those of a loop that has ended are gone with it."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._transport = loop, None
            self.limiter.forget_waiters()
        if self._transport is None:
            self._transport = Transport(self._config, key=self._key, diagnosis=self.diagnosis)
        return self._transport

    def _asked_seconds(self, fault: TransientFault) -> float:
        return min(fault.retry_after_seconds or 0.0, self._config.max_retry_after_seconds)

    def _wait_seconds(self, state: tenacity.RetryCallState) -> float:
        """What the endpoint asks for, or between half and all of a bound that doubles with each retry."""
        bound = self._config.backoff_seconds * 2 ** min(state.attempt_number - 1, 32)
        bound = min(bound, self._config.max_backoff_seconds)
        return max(self._asked_seconds(_fault_of(state)), bound * self._jitter.uniform(0.5, 1.0))

    def _gives_up(self, call: Call, state: tenacity.RetryCallState) -> bool:
        return call.num_faults >= self._config.max_attempts or call.seconds_left() <= state.upcoming_sleep

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        self.statistics.retries[_fault_of(state).cause] += 1


def _fault_of(state: tenacity.RetryCallState) -> TransientFault:
    fault = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(fault, TransientFault)
    return fault
