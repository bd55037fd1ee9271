"""What is said once, aloud: numbers that are none, stalled data, rates that rise. Kept in alerts.jsonl."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mirage.config.schema import AlertsConfig
from mirage.strict_json import parse_json
from mirage.tracking.mirror import is_finite
from mirage.tracking.redact import redact

ALERTS_NAME = "alerts.jsonl"
MAX_TITLE_CHARS = 64
"""wandb's limit for an alert's title."""
_WATCHED = ("train/loss", "train/grad_norm")
_NOT_FINITE = re.compile(r"^the (loss|gradient norm) of step (\d+) is (nan|-?inf)\b")


@dataclass(frozen=True)
class Alert:
    """One alert. An alert with the same `key` is said once in the life of a run folder."""

    key: str
    step: int
    level: Literal["INFO", "WARN", "ERROR"]
    title: str
    text: str


class StepAlerts:
    """Looks at the training metrics of each step that is logged."""

    def __init__(self, config: AlertsConfig) -> None:
        self._config = config
        self._stalled_steps = 0

    def look(self, metrics: Mapping[str, float], *, step: int) -> list[Alert]:
        """The alerts that these metrics raise."""
        found = []
        if self._config.not_finite:
            found += [_not_finite(name, step) for name in _WATCHED if name in metrics and not is_finite(metrics[name])]
        share = metrics.get("train/data_wait_share")
        if share is not None and self._config.data_wait_steps:
            self._stalled_steps = self._stalled_steps + 1 if share >= self._config.data_wait_share else 0
            if self._stalled_steps == self._config.data_wait_steps:
                found.append(self._stalled(share, step))
        return found

    def _stalled(self, share: float, step: int) -> Alert:
        return Alert(
            key="stalled data",
            step=step,
            level="WARN",
            title="Training waits for data",
            text=f"In the last {self._stalled_steps} logged steps up to step {step} at least "
            f"{self._config.data_wait_share:.0%} of the time went into waiting for data (now {share:.0%}): more "
            "data.num_workers, or data.tile_cache.",
        )


def stop_alert(error: BaseException, *, step: int) -> Alert:
    """The alert of a run that an error ends after `step` steps."""
    text = str(error) or type(error).__name__
    match = _NOT_FINITE.match(text)
    title = f"Step {match[2]}: the {match[1]} is not a number" if match else f"Training stopped after step {step}"
    key = f"not finite: step {match[2]}" if match else f"stopped: step {step}"
    return Alert(key=key, step=step, level="ERROR", title=title, text=redact(text)[:2000])


def _not_finite(name: str, step: int) -> Alert:
    words = {"train/loss": "loss", "train/grad_norm": "gradient norm"}[name]
    return Alert(
        key=f"not finite: step {step}",
        step=step,
        level="ERROR",
        title=f"Step {step}: the {words} is not a number",
        text=f"{name} of step {step} is not finite. Lower train.lr, or look at the rows of the step: mirage replay.",
    )


class AlertsFile:
    """`alerts.jsonl` of a run folder: each alert once, one JSON line each."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ALERTS_NAME
        self.alerts = _read(self._path)

    def add(self, alert: Alert) -> bool:
        """Write an alert down; False for one whose key is there already."""
        if any(known.key == alert.key for known in self.alerts):
            return False
        self.alerts.append(alert)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(alert), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return True


def _read(path: Path) -> list[Alert]:
    if not path.exists():
        return []
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        # A kill tore the last line off; the alert is raised again by what raised it.
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    found = []
    for line in content.splitlines():
        try:
            found.append(Alert(**parse_json(line)))
        except (ValueError, TypeError):
            continue
    return found
