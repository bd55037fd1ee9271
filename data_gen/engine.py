"""The engine: streams samples through the stages, many at a time; asks no result twice and gives them in plan order."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import ValidationError

from data_gen.row_store import Record, RowStore, StageResults, apply_delta, identity_sha256, result_key, sample_delta
from data_gen.sample import Sample
from data_gen.seeds import derive_seed
from data_gen.stage import Done, Dropped, EndpointFailure, FailureKind, Result, Stage, Usage
from mirage.data.row import LineageStep
from mirage.errors import UserError

YIELD_SECONDS = 0.02  # how long quick stages may keep the event loop from replies that have come in
LINEAGE_KEY_DIGITS = 16  # of a content key in a row's lineage: 64 bits find the result in the store


@dataclass(frozen=True)
class EarlyStop:
    """End a run when more than `share` of a stage's last `window` calls failed transiently: the endpoint is down."""

    window: int = 50
    share: float = 0.5


@dataclass(frozen=True)
class Finished:
    """A sample that came through all stages, and what made it."""

    sample: Sample
    lineage: tuple[LineageStep, ...] = ()


@dataclass(frozen=True)
class DroppedSample:
    """A sample that a stage found not worth a row; the sample is as it was before that stage."""

    sample: Sample
    stage: str
    reason: str


@dataclass(frozen=True)
class FailedSample:
    """A sample for which a stage got no result."""

    sample: Sample
    stage: str
    kind: FailureKind
    message: str


@dataclass
class StageCounts:
    """What came of the samples that reached one stage."""

    implementation: str = ""
    done: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    """Results that were there already, by an earlier run or an equal sample; part of done, dropped and failed."""
    asked: int = 0
    """Results obtained in this run; part of done, dropped and failed."""
    usage: Usage = field(default_factory=Usage)
    """Of the results asked in this run."""
    cached_usage: Usage = field(default_factory=Usage)
    """What the results from earlier runs had cost."""

    @property
    def reached(self) -> int:
        return self.done + self.dropped.total() + self.failed.total()


@dataclass(frozen=True)
class StageEvent:
    """One result, for progress displays."""

    stage: str
    status: Literal["done", "dropped", "failed"]
    cached: bool
    usage: Usage
    num_made: int = 0
    """Samples that came of it and go on."""


@dataclass(repr=False)
class RunOutcome:
    """What became of every planned sample, each list in plan order."""

    num_planned: int
    done: list[Finished]
    dropped: list[DroppedSample]
    failed: list[FailedSample]
    num_unfinished: int
    """Samples that an interrupted run did not bring to an end."""
    counts: dict[str, StageCounts]

    def __repr__(self) -> str:
        # asyncio.run words the result of what it has run when it ends: a hundred thousand samples take seconds.
        return f"RunOutcome({len(self.done)} done, {len(self.dropped)} dropped, {len(self.failed)} failed)"

    def check(self) -> None:
        """Raise RuntimeError unless each planned sample ended exactly once."""
        ended = len(self.done) + len(self.dropped) + len(self.failed) + self.num_unfinished
        places = [entry.sample.position for entries in (self.done, self.dropped, self.failed) for entry in entries]
        if ended != self.num_planned or len(set(places)) != len(places):
            raise RuntimeError(
                f"rows were lost or doubled: planned {self.num_planned}, done {len(self.done)}, "
                f"dropped {len(self.dropped)}, failed {len(self.failed)}, unfinished {self.num_unfinished}, "
                f"{len(places) - len(set(places))} places twice"
            )


@dataclass(frozen=True)
class _Item:
    sample: Sample
    next_stage: int = 0
    lineage: tuple[LineageStep, ...] = ()


async def run_stages(
    samples: Sequence[Sample],
    stages: Sequence[Stage],
    store: RowStore | None,
    *,
    root_seed: int,
    concurrency: int = 64,
    retry_failed: Collection[FailureKind] = (),
    progress: Callable[[StageEvent], None] | None = None,
    early_stop: EarlyStop | None = None,
    is_intact: Callable[[Sample], bool] | None = None,
    stop: asyncio.Event | None = None,
) -> RunOutcome:
    """Bring every sample through the stages, at most `concurrency` in flight; a sample waits for no other.

    A result in the store is used and not asked again; stored failures only where `retry_failed` names their class.
    Stages with `stored` false run each time; without a `store` all do. `is_intact` says whether the pictures of a
    stored result still exist. Setting `stop` lets what is in flight end, stores it, and returns.

    Raises UserError from a stage, or when `early_stop` finds the endpoint down, after what is in flight is stored.
    """
    run = _Run(
        samples,
        tuple(stages),
        store,
        root_seed=root_seed,
        retry_failed=frozenset(retry_failed),
        progress=progress,
        early_stop=early_stop,
        is_intact=is_intact,
        stop=stop or asyncio.Event(),
    )
    try:
        await asyncio.gather(*(run.work() for _ in range(max(1, min(concurrency, len(samples))))))
    finally:
        if store is not None:
            store.sync()
    if run.error is not None:
        raise run.error
    return run.outcome()


class _Run:
    """State of one `run_stages`: samples waiting, samples ended, and results being asked."""

    def __init__(
        self,
        samples: Sequence[Sample],
        stages: tuple[Stage, ...],
        store: RowStore | None,
        *,
        root_seed: int,
        retry_failed: frozenset[FailureKind],
        progress: Callable[[StageEvent], None] | None,
        early_stop: EarlyStop | None,
        is_intact: Callable[[Sample], bool] | None,
        stop: asyncio.Event,
    ) -> None:
        self.stages, self.root_seed, self.retry_failed = stages, root_seed, retry_failed
        self.progress, self.early_stop, self.is_intact, self.stop = progress, early_stop, is_intact, stop
        # Hashed once: an identity may be long, and every sample's key holds it.
        self.identities = [identity_sha256(stage.identity()) for stage in stages]
        self.results: list[StageResults | None] = [
            store.stage(stage.name) if store is not None and stage.stored else None for stage in stages
        ]
        self.counts = {stage.name: StageCounts(implementation=stage.implementation) for stage in stages}
        if len(self.counts) != len(stages):
            raise ValueError("two stages have one name")
        self.source: Iterator[Sample] = iter(samples)
        self.num_waiting = self.num_planned = len(samples)
        self.stack: list[_Item] = []
        self.num_active = 0
        self.more = asyncio.Event()
        self.asking: dict[tuple[int, str], asyncio.Future[None]] = {}
        self.transient: dict[str, deque[bool]] = {}
        self.error: BaseException | None = None
        self.done: list[Finished] = []
        self.dropped: list[DroppedSample] = []
        self.failed: list[FailedSample] = []
        self.yielded_at = time.monotonic()

    @property
    def stopping(self) -> bool:
        return self.error is not None or self.stop.is_set()

    async def work(self) -> None:
        """One worker: takes samples, the furthest first, until none is left or the run stops."""
        while (item := await self._next()) is not None:
            try:
                await self._advance(item)
            except Exception as error:
                # The first error is raised when the others' results are stored.
                self.error = self.error or error
            finally:
                self.num_active -= 1
                self.more.set()
            if time.monotonic() - self.yielded_at > YIELD_SECONDS:
                await asyncio.sleep(0)
                self.yielded_at = time.monotonic()

    async def _next(self) -> _Item | None:
        while not self.stopping:
            if self.stack:
                self.num_active += 1
                return self.stack.pop()
            sample = next(self.source, None)
            if sample is not None:
                self.num_active += 1
                self.num_waiting -= 1
                return _Item(sample)
            if self.num_active == 0:
                return None
            self.more.clear()
            await self.more.wait()
        return None

    async def _advance(self, item: _Item) -> None:
        """Bring one sample through its remaining stages; siblings that arise go on the stack."""
        while item.next_stage < len(self.stages):
            if self.stopping:
                self.stack.append(item)
                return
            stage = self.stages[item.next_stage]
            key = self._key(item.next_stage, item.sample)
            outputs = await self._outputs(item, key)
            if not outputs:
                return
            step = LineageStep(
                stage=stage.name, version=f"{stage.implementation} {stage.version}", key=key[:LINEAGE_KEY_DIGITS]
            )
            items = [_Item(sample, item.next_stage + 1, (*item.lineage, step)) for sample in outputs]
            self.num_planned += len(items) - 1
            self.stack.extend(reversed(items[1:]))
            if len(items) > 1:
                self.more.set()
            item = items[0]
        self.done.append(Finished(item.sample, item.lineage))

    def _key(self, number: int, sample: Sample) -> str:
        stage = self.stages[number]
        return result_key(
            stage=stage.name,
            implementation=stage.implementation,
            version=stage.version,
            identity=self.identities[number],
            root_seed=self.root_seed,
            view=stage.view(sample),
        )

    async def _outputs(self, item: _Item, key: str) -> tuple[Sample, ...]:
        """The stage's outputs for the sample; none where it was dropped or failed, which is noted."""
        stage, results = self.stages[item.next_stage], self.results[item.next_stage]
        if results is None:
            return await self._outputs_unstored(stage, item.sample, key)
        place = (item.next_stage, key)
        if place in self.asking:
            await self.asking[place]
            # The other's result is stored by now, unless it raised, which stops the run.
        found = self._stored(results, item.sample, key, again=place in self.asking)
        if found is not None:
            return self._note(stage, item.sample, *found, cached=True)
        if self.stopping:
            return self._put_back(item)
        self.asking[place] = asyncio.get_running_loop().create_future()
        try:
            record, outputs = await self._ask(stage, item.sample, key)
            results.put(record)
        finally:
            self.asking[place].set_result(None)
        self._watch(stage, record)
        return self._note(stage, item.sample, record, outputs, cached=False)

    def _put_back(self, item: _Item) -> tuple[Sample, ...]:
        self.stack.append(item)
        return ()

    def _stored(
        self, results: StageResults, sample: Sample, key: str, *, again: bool
    ) -> tuple[Record, tuple[Sample, ...]] | None:
        """The stored record and its outputs; None if there is none, or one that is to be asked again.

        `again`: this run asked it already, so that a failure counts for equal samples too.
        """
        record = results.get(key)
        if record is None or (record.kind in self.retry_failed and not again):
            return None
        try:
            outputs = tuple(apply_delta(sample, delta) for delta in record.samples)
        except ValidationError:
            return None  # written before the sample's fields changed
        for output, delta in zip(outputs, record.samples):
            if "images" in delta and self.is_intact is not None and not self.is_intact(output):
                return None
        return record, outputs

    async def _outputs_unstored(self, stage: Stage, sample: Sample, key: str) -> tuple[Sample, ...]:
        result = await self._result(stage, sample, key)
        self._watch(stage, record := _record(key, result, ()))
        outputs = _checked_outputs(stage, sample, result)
        return self._note(stage, sample, record, outputs, cached=False)

    async def _ask(self, stage: Stage, sample: Sample, key: str) -> tuple[Record, tuple[Sample, ...]]:
        """Run the stage. Outputs pass through their stored form, so that a fresh result equals a stored one."""
        result = await self._result(stage, sample, key)
        deltas = tuple(sample_delta(sample, output) for output in _checked_outputs(stage, sample, result))
        return _record(key, result, deltas), tuple(apply_delta(sample, delta) for delta in deltas)

    async def _result(self, stage: Stage, sample: Sample, key: str) -> Result | EndpointFailure:
        try:
            return await stage.run(sample, seed=derive_seed(self.root_seed, stage.name, key))
        except EndpointFailure as failure:
            return failure

    def _note(
        self, stage: Stage, sample: Sample, record: Record, outputs: tuple[Sample, ...], *, cached: bool
    ) -> tuple[Sample, ...]:
        """Count a result and file a sample that ends here."""
        counts = self.counts[stage.name]
        if cached:
            counts.cached += 1
            counts.cached_usage += record.usage
        else:
            counts.asked += 1
            counts.usage += record.usage
        if record.status == "done":
            counts.done += 1
        elif record.status == "dropped":
            counts.dropped[record.reason] += 1
            self.dropped.append(DroppedSample(sample, stage.name, record.reason))
        else:
            assert record.kind is not None
            counts.failed[record.kind] += 1
            self.failed.append(FailedSample(sample, stage.name, record.kind, record.message))
        if self.progress is not None:
            self.progress(StageEvent(stage.name, record.status, cached, record.usage, len(outputs)))
        return outputs

    def _watch(self, stage: Stage, record: Record) -> None:
        """Stop the run if the stage's last calls mostly failed transiently."""
        if self.early_stop is None or (record.kind is None and record.usage.calls == 0):
            return
        window = self.transient.setdefault(stage.name, deque(maxlen=self.early_stop.window))
        window.append(record.kind == "transient")
        if len(window) == window.maxlen and sum(window) > self.early_stop.share * len(window):
            self.error = self.error or UserError(
                f"stage {stage.name}: {sum(window)} of the last {len(window)} results failed because the endpoint was "
                f"busy, down or slow (the last one: {record.message or 'answered'}); every result so far is kept. "
                "See to the endpoint, then run the same command with --retry-failed transient"
            )

    def outcome(self) -> RunOutcome:
        """All that ended, in plan order. Raises RuntimeError if a sample is lost or doubled."""
        outcome = RunOutcome(
            num_planned=self.num_planned,
            done=sorted(self.done, key=lambda entry: entry.sample.position),
            dropped=sorted(self.dropped, key=lambda entry: entry.sample.position),
            failed=sorted(self.failed, key=lambda entry: entry.sample.position),
            num_unfinished=len(self.stack) + self.num_waiting,
            counts=self.counts,
        )
        outcome.check()
        return outcome


def _record(key: str, result: Result | EndpointFailure, deltas: tuple[dict, ...]) -> Record:
    record = Record(key=key, status="done", samples=deltas, usage=result.usage)
    if isinstance(result, Dropped):
        return replace(record, status="dropped", reason=result.reason)
    if isinstance(result, EndpointFailure):
        return replace(record, status="failed", kind=result.kind, message=result.message)
    return record


def _checked_outputs(stage: Stage, sample: Sample, result: Result | EndpointFailure) -> tuple[Sample, ...]:
    """The outputs of a result. Raises RuntimeError if a stage that is done gives none, or two at one place."""
    if not isinstance(result, Done):
        return ()
    places = {output.position for output in result.samples}
    if not places or len(places) != len(result.samples):
        raise RuntimeError(f"stage {stage.name} gave {len(result.samples)} samples at {len(places)} places")
    return result.samples
