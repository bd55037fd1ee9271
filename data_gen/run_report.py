"""The report of a run: what became of each planned row, and per stage what was done, dropped, failed and paid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from data_gen.engine import RunOutcome, StageCounts
from data_gen.sample import Sample
from mirage.data.row import canonical_json
from mirage.endpoint.failures import Usage
from mirage.files import write_atomic
from mirage.tracking.console import Terminal

REPORT_FILE = "report.jsonl"
MAX_REASONS_SHOWN = 5


@dataclass(frozen=True)
class SetDrop:
    """A sample that was finished and then left out by a step over the whole set (assemble, deduplicate, ...)."""

    sample: Sample
    step: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """What became of one planned row: one line of the report."""

    position: tuple[int, ...]
    seed_id: str
    status: Literal["done", "dropped", "failed"]
    stage: str = ""
    reason: str = ""
    kind: str = ""
    row_id: str = ""

    def plain(self) -> dict[str, Any]:
        """The fields that say something."""
        content = {"position": list(self.position), "seed": self.seed_id, "status": self.status}
        more = {"stage": self.stage, "reason": self.reason, "kind": self.kind, "row": self.row_id}
        return content | {name: value for name, value in more.items() if value}


@dataclass(frozen=True)
class Report:
    """All entries in plan order, and the counts behind them."""

    entries: tuple[Entry, ...]
    num_planned: int
    counts: Mapping[str, StageCounts]
    num_unfinished: int = 0
    set_drops: Mapping[str, Counter[str]] = field(default_factory=dict)

    def total(self, status: str) -> int:
        """How many planned rows ended so."""
        return sum(entry.status == status for entry in self.entries)

    @property
    def failed_kinds(self) -> Counter[str]:
        """Failed rows by class."""
        return Counter(entry.kind for entry in self.entries if entry.status == "failed")

    @property
    def usage(self) -> Usage:
        """Calls, tokens and cost of this run."""
        return sum((counts.usage for counts in self.counts.values()), Usage())

    def figures(self) -> dict[str, Any]:
        """The counts that the same results always give, however the run was cut: for the manifest."""
        stages = {
            name: {
                "implementation": counts.implementation,
                "done": counts.done,
                "dropped": counts.dropped.total(),
                "failed": dict(sorted(counts.failed.items())),
            }
            for name, counts in self.counts.items()
        }
        stages |= {name: {"dropped": reasons.total()} for name, reasons in self.set_drops.items()}
        totals = {status: self.total(status) for status in ("done", "dropped", "failed")}
        return {"planned": self.num_planned, **totals, "stages": stages}


def make_report(
    outcome: RunOutcome, *, row_ids: Mapping[tuple[int, ...], str], set_drops: Sequence[SetDrop] = ()
) -> Report:
    """The report of an outcome whose finished samples became rows (`row_ids`, by position) or were left out.

    Raises RuntimeError unless done, dropped and failed (and unfinished, after an interruption) add up to the plan.
    """
    entries = [
        Entry(drop.sample.position, drop.sample.seed.id, "dropped", stage=drop.stage, reason=drop.reason)
        for drop in outcome.dropped
    ]
    entries += [
        Entry(drop.sample.position, drop.sample.seed.id, "dropped", stage=drop.step, reason=drop.reason)
        for drop in set_drops
    ]
    entries += [
        Entry(f.sample.position, f.sample.seed.id, "failed", stage=f.stage, reason=f.message, kind=f.kind)
        for f in outcome.failed
    ]
    left_out = {drop.sample.position for drop in set_drops}
    entries += [
        Entry(f.sample.position, f.sample.seed.id, "done", row_id=row_ids.get(f.sample.position, ""))
        for f in outcome.done
        if f.sample.position not in left_out
    ]
    reasons: dict[str, Counter[str]] = {}
    for drop in set_drops:
        reasons.setdefault(drop.step, Counter())[drop.reason] += 1
    report = Report(
        entries=tuple(sorted(entries, key=lambda entry: entry.position)),
        num_planned=outcome.num_planned,
        counts=outcome.counts,
        num_unfinished=outcome.num_unfinished,
        set_drops=reasons,
    )
    _check(report, row_ids)
    return report


def _check(report: Report, row_ids: Mapping[tuple[int, ...], str]) -> None:
    places = [entry.position for entry in report.entries]
    if len(places) + report.num_unfinished != report.num_planned or len(set(places)) != len(places):
        raise RuntimeError(
            f"the report does not add up: planned {report.num_planned}, done {report.total('done')}, dropped "
            f"{report.total('dropped')}, failed {report.total('failed')}, unfinished {report.num_unfinished}, "
            f"{len(places) - len(set(places))} places twice"
        )
    done = {entry.position for entry in report.entries if entry.status == "done"}
    if row_ids and done != set(row_ids):
        raise RuntimeError(f"{len(done)} samples are done but {len(row_ids)} rows were made")


def write_report(report: Report, folder: Path) -> Path:
    """Write one line a planned row; returns the file."""
    path = folder / REPORT_FILE
    write_atomic(path, "".join(canonical_json(entry.plain()) + "\n" for entry in report.entries))
    return path


def print_report(report: Report, console: Terminal) -> None:
    """A table of the stages, the commonest reasons, and one line that adds up; in JSON mode one `summary`."""
    reasons_by_stage = [*((n, c.dropped) for n, c in report.counts.items()), *report.set_drops.items()]
    usage = report.usage
    console.summary(
        _stage_table(report),
        what="run",
        **report.figures(),
        unfinished=report.num_unfinished,
        dropped_reasons={name: dict(reasons) for name, reasons in reasons_by_stage if reasons},
        calls=usage.calls,
        cost_usd=usage.cost_usd,
    )
    if console.mode == "json":
        return
    for name, reasons in reasons_by_stage:
        for reason, number in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:MAX_REASONS_SHOWN]:
            console.say(f"{name} dropped {number}: {reason}")
    console.say(summary(report))


def _stage_table(report: Report) -> Table:
    table = Table(title=None, box=None, pad_edge=False)
    columns = (
        "stage",
        "by",
        "done",
        "dropped",
        "failed",
        "from store",
        "calls",
        "tokens in",
        "tokens out",
        "US dollars",
    )
    for name in columns:
        table.add_column(name, justify="left" if name in ("stage", "by") else "right", no_wrap=True)
    for name, counts in report.counts.items():
        usage = counts.usage
        table.add_row(
            name,
            counts.implementation,
            str(counts.done),
            str(counts.dropped.total()),
            str(counts.failed.total()),
            str(counts.cached),
            str(usage.calls),
            str(usage.prompt_tokens),
            str(usage.completion_tokens),
            dollars(usage),
        )
    for name, reasons in report.set_drops.items():
        table.add_row(name, "rule", "", str(reasons.total()))
    return table


def summary(report: Report) -> str:
    """One line: planned = done + dropped + failed, what is left, and what this run took."""
    failed = ", ".join(f"{kind} {number}" for kind, number in sorted(report.failed_kinds.items()))
    parts = [
        f"{report.num_planned} planned: {report.total('done')} done, {report.total('dropped')} dropped, "
        f"{report.total('failed')} failed" + (f" ({failed})" if failed else "")
    ]
    if report.num_unfinished:
        parts.append(f"{report.num_unfinished} unfinished")
    if report.usage.calls:
        parts.append(f"{report.usage.calls} calls in this run, {dollars(report.usage)} US dollars")
    if failed:
        parts.append(f"ask again with --retry-failed {','.join(sorted(report.failed_kinds))}")
    return "; ".join(parts)


def dollars(usage: Usage) -> str:
    """The cost, or that a price is unknown."""
    return "unknown" if usage.cost_usd is None else f"{usage.cost_usd:.4f}"
