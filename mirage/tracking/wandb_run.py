"""The wandb side of a run: start or continue it, send numbers and tables, and never stop the training."""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mirage.config.schema import TrackingConfig
from mirage.errors import UserError
from mirage.files import temporary_of
from mirage.tracking.alerts import MAX_TITLE_CHARS, Alert
from mirage.tracking.artifacts import ArtifactCard, make_artifact
from mirage.tracking.code_version import code_version
from mirage.tracking.names import summary_of
from mirage.tracking.redact import redact
from mirage.tracking.sample_table import SampleTable
from mirage.tracking.wandb_file import Sent, read_sent

ID_NAME = "wandb_id"
FLUSH_SECONDS = 1.0
"""How often wandb's file is flushed, and so the most that a kill takes from it; a restart sends that again."""
START_SECONDS = 120
"""Longest wait for wandb's own process. Its default of 30 is too short for a machine busy with loading models."""
GIVE_UP_FAILURES = 20
"""Failures in a row after which wandb is left alone for the rest of the run."""

Mode = Literal["online", "offline", "off"]
_MODE_OF_ENVIRONMENT: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}


def choose_mode(wanted: str) -> Mode:
    """Mode for a recipe's `tracking.wandb`: auto follows WANDB_MODE if set, else is online when a key is set.

    Raises UserError for `online` without a key: the run would otherwise wait at a prompt nobody sees.
    """
    if wanted == "off":
        return "off"
    if wanted == "offline":
        return "offline"
    if wanted == "auto":
        from_environment = os.environ.get("WANDB_MODE", "")
        if from_environment and from_environment not in _MODE_OF_ENVIRONMENT:
            raise UserError(f"WANDB_MODE={from_environment!r}: must be online, offline or disabled")
        if from_environment:
            return _MODE_OF_ENVIRONMENT[from_environment]
        return "online" if has_key() else "offline"
    if not has_key():
        raise UserError(
            "tracking.wandb=online, but no wandb key is set: run `wandb login`, set WANDB_API_KEY, "
            "or use tracking.wandb=offline"
        )
    return "online"


def has_key() -> bool:
    """Whether wandb finds credentials for its host: WANDB_API_KEY, an identity token, netrc or its own settings."""
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    try:
        return wbauth.authenticate_session(host=host, source="mirage", prompt=False, update_session=False) is not None
    except Exception as error:
        # A malformed key: wandb cannot use it, so the numbers stay here, and the user is told.
        say(f"the wandb key is not usable ({_one_line(error)}); tracking offline")
        return False


def run_id(run_dir: Path) -> str:
    """The run's wandb id, created once and kept in the run folder, so that a restart continues the same run.

    Under a sweep it is the id that the sweep's agent gave this process: wandb knows the sweep's runs by it.
    """
    path = run_dir / ID_NAME
    if not path.exists():
        given = os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""
        temporary = temporary_of(path)
        with temporary.open("w") as file:
            file.write((given or secrets.token_hex(6)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link fails where the name exists, so of two starters only one sets the id.
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    found = path.read_text().strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found):
        raise UserError(f"{path}: expected a wandb run id, found {found!r}; remove the file to start a new wandb run")
    return found


class WandbRun:
    """One wandb run. A failure inside wandb is counted, said once, and reported by `finish`; nothing is raised."""

    def __init__(self, run: Any, *, run_dir: Path, mode: Mode, sent: Sent | None = None) -> None:
        self._run = run
        self._run_dir = run_dir
        self.mode = mode
        self.sent = sent or Sent()
        """What the files of earlier processes hold already."""
        self._defined: set[str] = set()
        self.num_calls = 0
        self.num_failures = 0
        self._failures_in_a_row = 0

    @classmethod
    def start(cls, run_dir: Path, config: TrackingConfig, *, name: str, recipe: Mapping[str, Any]) -> WandbRun | None:
        """Start or continue the run; falls back from online to offline, and to None where wandb cannot start at all."""
        mode = choose_mode(config.wandb)
        began = (run_dir / ID_NAME).exists()
        identity = run_id(run_dir) if mode != "off" else ""
        sent = _read_sent(run_dir, identity, began=began)
        attempts: dict[Mode, tuple[Mode, ...]] = {"online": ("online", "offline"), "offline": ("offline",), "off": ()}
        for attempt in attempts[mode]:
            try:
                run = _init(run_dir, config, identity=identity, name=name, recipe=recipe, mode=attempt)
            except Exception as error:
                say(f"wandb did not start {attempt}: {_one_line(error)}")
                continue
            for folder in sent.cut_short:
                say(f"an earlier part of this run was cut off; `wandb sync {folder}` sends what did not get through")
            return cls(run, run_dir=run_dir, mode=attempt, sent=sent)
        if mode != "off":
            say("the run goes on without wandb; every number is in metrics.jsonl")
        return None

    @property
    def where(self) -> str:
        """One line for the terminal: where to look at the run."""
        if self.mode == "online":
            return f"wandb: {self._run.url}"
        return f"wandb: offline, run {self._run.id}; `wandb leet {self._run_dir / 'wandb'}` shows it here"

    @property
    def identity(self) -> str:
        """The run's id."""
        return str(self._run.id)

    @property
    def next_order(self) -> int:
        """The least `order` that wandb still takes."""
        known = getattr(self._run, "step", 0)
        return max(self.sent.last_order + 1, known if isinstance(known, int) else 0)

    def log(self, metrics: Mapping[str, float], *, axis: str, step: int, order: int) -> None:
        """Send numbers on their own axis. `order` is wandb's internal step and must grow over the life of the run."""

        def send() -> None:
            self._define(metrics, step_metric=f"{axis}/step")
            self._run.log({**metrics, f"{axis}/step": step}, step=order, commit=True)

        self._call("log", send)

    def log_samples(
        self, name: str, build: Callable[[], SampleTable], counts: Mapping[str, int], *, step: int, order: int
    ) -> None:
        """Send a table: one line a sample, its pictures side by side before the text; what was left out beside it."""

        def send() -> None:
            table = build()
            left_out = {f"samples/{name}_pictures_left_out": table.num_pictures_left_out}
            self._run.log(
                {f"samples/{name}": table.table, **counts, **left_out, "eval/step": step}, step=order, commit=True
            )

        self._call(f"table {name}", send)

    def log_artifact(self, card: ArtifactCard, *, used: bool) -> None:
        """Send an artifact that the run used or made, unless this very version is there already."""

        def send() -> None:
            artifact = make_artifact(card)
            if (card.kind, card.name, artifact.digest) in self.sent.artifacts:
                return
            if not used:
                self._run.log_artifact(artifact, aliases=list(card.aliases) or None)
            elif self.mode == "online":
                self._run.use_artifact(artifact)
            else:
                # `use_artifact` refuses to work offline, though a file can hold what it would say.
                self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
            self.sent.artifacts.add((card.kind, card.name, artifact.digest))

        self._call(f"artifact {card.name}", send)

    def alert(self, alert: Alert) -> None:
        """Send an alert: wandb mails it or posts it, as the user's settings there say."""
        title = alert.title[:MAX_TITLE_CHARS]
        self._call("alert", lambda: self._run.alert(title=title, text=redact(alert.text), level=alert.level))

    def _define(self, metrics: Mapping[str, float], *, step_metric: str) -> None:
        """Tell wandb what of a new name stands for the run, where that is not its last value."""
        for name in metrics:
            if name not in self._defined and (best := summary_of(name)) != "last":
                self._run.define_metric(name, step_metric=step_metric, summary=f"{best},last")
            self._defined.add(name)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's summary values."""
        self._call("summary", lambda: self._run.summary.update(redact(dict(values))))

    def finish(self, exit_code: int) -> None:
        """Close the run and say what failed on the way, if anything did."""
        self._failures_in_a_row = 0
        self._call("finish", lambda: self._run.finish(exit_code=exit_code))
        if self.num_failures:
            say(
                f"{self.num_failures} of {self.num_calls} calls to wandb failed; what they carried is in metrics.jsonl "
                "and tables/ of the run folder"
            )

    def _call(self, what: str, call: Callable[[], Any]) -> None:
        self.num_calls += 1
        if self._failures_in_a_row >= GIVE_UP_FAILURES:
            self.num_failures += 1
            return
        try:
            with _files_in(self._run_dir):
                call()
            self._failures_in_a_row = 0
        except Exception as error:
            self.num_failures += 1
            self._failures_in_a_row += 1
            if self.num_failures == 1:
                say(f"wandb failed ({what}: {_one_line(error)}); the run goes on, its numbers are in metrics.jsonl")


def _init(
    run_dir: Path, config: TrackingConfig, *, identity: str, name: str, recipe: Mapping[str, Any], mode: Mode
) -> Any:
    import wandb

    online = mode == "online"
    with _files_in(run_dir), _redacted_command_line():
        wandb.setup(wandb.Settings(x_service_wait=START_SECONDS))
        _wait_for_a_folder_of_its_own(run_dir, identity)
        run = wandb.init(
            mode="online" if online else "offline",
            id=identity,
            resume="allow",
            reinit="create_new",
            dir=run_dir,
            project=config.project,
            entity=config.entity,
            tags=list(config.tags),
            name=name,
            config={**redact(dict(recipe)), "code": code_version()},
            # Standard output belongs to the progress line. Uploads that never end must not hold the machine.
            settings=wandb.Settings(
                console="off",
                save_code=False,
                x_save_requirements=False,
                silent=not online,
                show_info=False,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
                init_timeout=START_SECONDS,
                finish_timeout=600,
            ),
        )
    for axis in ("train", "eval"):
        run.define_metric(f"{axis}/step", hidden=True)
        run.define_metric(f"{axis}/*", step_metric=f"{axis}/step")
    run.define_metric("samples/*", step_metric="eval/step")
    return run


def _wait_for_a_folder_of_its_own(run_dir: Path, identity: str) -> None:
    """wandb names a folder by the second and the run: a restart in the same second would write over the file there."""
    while list((run_dir / "wandb").glob(f"*-{datetime.now():%Y%m%d_%H%M%S}-{identity}")):
        time.sleep(0.05)


@contextmanager
def _files_in(run_dir: Path) -> Iterator[None]:
    """Keep the files of tables in the run folder too; wandb's default is the home folder, which clean-ups empty."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str((run_dir / "wandb").resolve())
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """wandb records `sys.argv`; show it one without secrets."""
    original = sys.argv
    sys.argv = redact(list(original))
    try:
        yield
    finally:
        sys.argv = original


def _read_sent(run_dir: Path, identity: str, *, began: bool) -> Sent:
    if not identity:
        return Sent()
    if began and not any((run_dir / "wandb").glob(f"*run-*-{identity}")):
        return Sent(is_gone=True)
    try:
        sent = read_sent(run_dir, identity)
        for folder in sent.empty:
            # One of them among others, and `wandb sync` would send none.
            folder.rename(folder.with_name(f"empty-{folder.name}"))
        return sent
    except Exception as error:
        say(f"wandb's earlier files cannot be read ({_one_line(error)}); what a kill took from them stays missing")
        return Sent(is_gone=True)


def _one_line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))[:300] or type(error).__name__


def say(message: str) -> None:
    """One line on standard error."""
    print(f"tracking: {message}", file=sys.stderr, flush=True)
