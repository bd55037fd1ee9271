"""One place to send a run's numbers: wandb and the mirror on disk get the same, on the same axes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage.config.schema import TrackingConfig
from mirage.files import read_object, write_atomic
from mirage.tracking.alerts import Alert, AlertsFile
from mirage.tracking.artifacts import ArtifactCard
from mirage.tracking.mirror import MetricsFile, plain, read_metrics
from mirage.tracking.sample_table import sample_table
from mirage.tracking.wandb_run import WandbRun, say

SAMPLE_KEYS = ("id", "task", "image_paths", "question", "answer", "verdict", "reason", "category", "changed")
"""Keys of a row given to `log_samples`."""
TABLES_NAME = "tables"
SUMMARY_NAME = "summary.json"


class Tracker:
    """Receives a run's numbers on the main rank; on every other rank it does nothing.

    In the run folder: `metrics.jsonl` (every number), `tables/step-NNNNNN/NAME.jsonl` (sample rows without pictures),
    `summary.json`, `alerts.jsonl`, `wandb_id` and `wandb/`. The mirror is the exact record. wandb may show a step twice
    where a run was killed between two checkpoints: what was sent cannot be taken back.
    """

    def __init__(
        self, run_dir: Path, *, mirror: MetricsFile | None, wandb_run: WandbRun | None, config: TrackingConfig
    ) -> None:
        self._run_dir = run_dir
        self._mirror = mirror
        self._wandb = wandb_run
        self.config = config
        self._alerts = AlertsFile(run_dir) if mirror else None
        self._summary: dict[str, Any] = read_object(run_dir / SUMMARY_NAME) if mirror else {}
        self._order = max(mirror.num_records if mirror else 0, wandb_run.next_order if wandb_run else 0)

    @classmethod
    def open(
        cls, run_dir: Path, config: TrackingConfig, *, name: str, recipe: Mapping[str, Any], is_main: bool
    ) -> Tracker:
        """Open a run's tracking, or continue it: the wandb run id lives in the run folder.

        `recipe` is the resolved recipe as JSON data; secrets in it are hidden. Raises UserError for
        `tracking.wandb=online` without a key and for a damaged mirror file, never for a failure of wandb.
        """
        if not is_main:
            return cls(run_dir, mirror=None, wandb_run=None, config=config)
        run_dir.mkdir(parents=True, exist_ok=True)
        mirror = MetricsFile(run_dir)
        wandb_run = WandbRun.start(run_dir, config, name=name, recipe=recipe)
        return cls(run_dir, mirror=mirror, wandb_run=wandb_run, config=config)

    @property
    def where(self) -> str:
        """Where to look at the run: its wandb address, or how to see it offline."""
        return self._wandb.where if self._wandb else f"metrics: {self._run_dir / 'metrics.jsonl'}"

    @property
    def is_open(self) -> bool:
        """Whether this rank records anything."""
        return self._mirror is not None

    @property
    def wandb_id(self) -> str | None:
        """The wandb run's id; None without wandb."""
        return self._wandb.identity if self._wandb else None

    def rewind(self, step: int) -> None:
        """Forget the mirror's lines after `step`, from which a resumed run counts on, and send wandb what it lacks.

        A kill takes the last second from wandb's file, and a checkpoint may lie within it.
        """
        if not self._mirror:
            return
        self._mirror.rewind(step)
        if not self._wandb or not self._mirror.num_records:
            return
        for record in read_metrics(self._mirror.path):
            axis, at = record.pop("axis"), record.pop("step")
            if axis != "samples" and not self._wandb.sent.holds(axis, at, record):
                self._wandb.log(record, axis=axis, step=at, order=self._next_order())
        for alert in self._alerts.alerts if self._alerts else []:
            if not self._wandb.sent.is_gone and (alert.title, alert.text) not in self._wandb.sent.alerts:
                self._wandb.alert(alert)
        if self._summary:
            self._wandb.summary(self._summary)

    def log(self, metrics: Mapping[str, float], *, axis: str, step: int) -> None:
        """Record numbers at a step of an axis (`train`, `eval`); a name without the axis in front gets it."""
        if not self._mirror:
            return
        named = {key if key.startswith(f"{axis}/") else f"{axis}/{key}": value for key, value in metrics.items()}
        self._mirror.append(axis, step, named)
        if self._wandb:
            self._wandb.log(named, axis=axis, step=step, order=self._next_order())

    def log_samples(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Record a table of samples (keys: SAMPLE_KEYS; `parts` as well where the answer's are known).

        The first `tracking.table_rows` of them are shown, with pictures up to `tracking.table_bytes`; how many that
        are, and of how many, is recorded beside. Raises ValueError where a row lacks a key or `name` is no file name.
        """
        if not self._mirror:
            return
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@+-]*", name):
            raise ValueError(f"a table's name must be a plain file name, found {name!r}")
        shown = [_sample_row(row) for row in rows[: self.config.table_rows]]
        path = Path(TABLES_NAME) / f"step-{step:06d}" / f"{name}.jsonl"
        lines = [
            json.dumps({key: row[key] for key in SAMPLE_KEYS if key != "image_paths"}, ensure_ascii=False)
            for row in shown
        ]
        (self._run_dir / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._run_dir / path, "".join(line + "\n" for line in lines))
        counts = {f"samples/{name}_rows": len(shown), f"samples/{name}_rows_in_all": len(rows)}
        self._mirror.append("samples", step, {f"samples/{name}": path.as_posix(), **counts})
        if self._wandb and shown:
            pixels, room = self.config.picture_pixels, self.config.table_bytes
            self._wandb.log_samples(
                name,
                lambda: sample_table(shown, picture_pixels=pixels, max_bytes=room),
                counts,
                step=step,
                order=self._next_order(),
            )

    def lacks_samples(self, name: str, *, step: int) -> bool:
        """Whether wandb's files of earlier processes should hold this table and do not: a kill took it."""
        if self._wandb is None or not self.config.table_rows:
            return False
        return not self._wandb.sent.holds_table(f"samples/{name}", step)

    def log_artifact(self, card: ArtifactCard, *, used: bool = False) -> None:
        """Record a versioned artifact: what the run `used` or, without that, made. What is left out of it is said."""
        if self._wandb:
            self._wandb.log_artifact(card, used=used)
            if card.note:
                say(card.note)

    def alert(self, alert: Alert) -> None:
        """Say an alert once in the life of the run folder: on the terminal, in alerts.jsonl, to wandb."""
        if self._mirror and self._alerts and self._alerts.add(alert):
            say(f"alert: {alert.title}: {alert.text}")
            if self._wandb:
                self._wandb.alert(alert)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values that stand for the whole run; a later call adds to an earlier one."""
        if not self._mirror:
            return
        self._summary |= {key: plain(value) for key, value in values.items()}
        text = json.dumps(self._summary, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomic(self._run_dir / SUMMARY_NAME, text + "\n")
        if self._wandb:
            self._wandb.summary(values)

    def close(self, exit_code: int = 0) -> None:
        """Finish the wandb run and close the mirror; a second call does nothing."""
        if self._mirror:
            self._mirror.close()
            self._mirror = None
        if self._wandb:
            self._wandb.finish(exit_code)
            self._wandb = None

    def _next_order(self) -> int:
        """wandb's internal step: it grows over the life of the run folder."""
        self._order += 1
        return self._order - 1


def _sample_row(row: Mapping[str, Any]) -> dict[str, Any]:
    for key in SAMPLE_KEYS:
        if key not in row:
            raise ValueError(f"a sample row lacks {key!r}; it has {', '.join(sorted(row))}")
    found = {key: row[key] for key in SAMPLE_KEYS} | {"parts": row.get("parts")}
    return found | {"image_paths": [str(path) for path in row["image_paths"]]}
