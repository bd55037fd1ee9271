"""What a run shows while it works: samples that have ended, the time left, counts by stage, calls and cost so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from data_gen.engine import StageEvent
from data_gen.run_report import dollars
from mirage.endpoint.failures import Usage
from mirage.tracking.console import Terminal
from mirage.tracking.progress import Progress


class RunDisplay:
    """Counts results as they come. Use as a context manager around the run; `on_plan` says what there is to do."""

    def __init__(self, console: Terminal) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.usage = Usage()
        self._console = console
        self._progress: Progress | None = None
        self._stages: Sequence[str] = ()
        self._num_seeds = self._num_more = 0

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, trace)

    def on_plan(self, num_samples: int, stages: Sequence[str]) -> None:
        """So many samples are about to go through these stages."""
        self._num_seeds, self._stages = num_samples, stages
        self._progress = self._console.progress("samples", num_samples, unit="samples").__enter__()

    def on_result(self, event: StageEvent) -> None:
        """Count one result. A sample ends where it is dropped, has failed, or is through the last stage."""
        self.counts.setdefault(event.stage, Counter())["cached" if event.cached else event.status] += 1
        if not event.cached:
            self.usage += event.usage
        self._num_more += max(0, event.num_made - 1)
        if self._progress is None:
            return
        is_last = bool(self._stages) and event.stage == self._stages[-1]
        num_ended = event.num_made if is_last and event.status == "done" else int(event.status != "done")
        self._progress.advance(
            num_ended,
            total=self._expected(),
            note=self.line(),
            stages={stage: dict(sorted(counts.items())) for stage, counts in self.counts.items()},
            calls=self.usage.calls,
            cost_usd=self.usage.cost_usd,
        )

    def _expected(self) -> int:
        """Samples that will end: those known, and what the seeds still to come will grow into at the rate so far."""
        begun = self.counts.get(self._stages[0], Counter()).total() if self._stages else 0
        to_come = max(0, self._num_seeds - begun)
        return self._num_seeds + self._num_more + (round(to_come * self._num_more / begun) if begun else 0)

    def line(self) -> str:
        """Counts by stage, calls and cost so far."""
        parts = [
            f"{stage} " + " ".join(f"{number} {name}" for name, number in sorted(counts.items()))
            for stage, counts in self.counts.items()
        ]
        if self.usage.calls:
            parts.append(f"{self.usage.calls} calls, {dollars(self.usage)} US dollars")
        return " | ".join(parts)
