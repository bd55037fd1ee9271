"""The wandb side of a run: start or continue it, send numbers and tables, and never stop the training."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mirage.config.schema import TrackingConfig
from mirage.errors import UserError
from mirage.tracking.redact import redact

ID_NAME = "wandb_id"
PICTURE_PIXELS = 384
"""Longest edge of a picture in a table; the originals stay in the dataset folder."""
FLUSH_SECONDS = 1.0
"""How often wandb's file is flushed, and so the most that a kill takes from it (the mirror loses nothing)."""
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
_TEXT_COLUMNS = ("id", "task", "question", "answer", "verdict", "reason", "category", "changed")


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
        _say(f"the wandb key is not usable ({_one_line(error)}); tracking offline")
        return False


def run_id(run_dir: Path) -> str:
    """The run's wandb id, created once and kept in the run folder, so that a restart continues the same run."""
    path = run_dir / ID_NAME
    if not path.exists():
        temporary = run_dir / f".{ID_NAME}.{os.getpid()}.tmp"
        with temporary.open("w") as file:
            file.write(secrets.token_hex(6) + "\n")
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

    def __init__(self, run: Any, *, run_dir: Path, mode: Mode) -> None:
        self._run = run
        self._run_dir = run_dir
        self.mode = mode
        self.num_calls = 0
        self.num_failures = 0
        self._failures_in_a_row = 0

    @classmethod
    def start(cls, run_dir: Path, config: TrackingConfig, *, name: str, recipe: Mapping[str, Any]) -> WandbRun | None:
        """Start or continue the run; falls back from online to offline, and to None where wandb cannot start at all."""
        mode = choose_mode(config.wandb)
        identity = run_id(run_dir) if mode != "off" else ""
        attempts: dict[Mode, tuple[Mode, ...]] = {"online": ("online", "offline"), "offline": ("offline",), "off": ()}
        for attempt in attempts[mode]:
            try:
                run = _init(run_dir, config, identity=identity, name=name, recipe=recipe, mode=attempt)
            except Exception as error:
                _say(f"wandb did not start {attempt}: {_one_line(error)}")
                continue
            return cls(run, run_dir=run_dir, mode=attempt)
        if mode != "off":
            _say("the run goes on without wandb; every number is in metrics.jsonl")
        return None

    @property
    def where(self) -> str:
        """One line for the terminal: where to look at the run."""
        if self.mode == "online":
            return f"wandb: {self._run.url}"
        return f"wandb: offline, run {self._run.id}; `wandb leet {self._run_dir / 'wandb'}` shows it here"

    def log(self, metrics: Mapping[str, float], *, axis: str, step: int, order: int) -> None:
        """Send numbers on their own axis. `order` is wandb's internal step and must grow over the life of the run."""
        self._call("log", lambda: self._run.log({**metrics, f"{axis}/step": step}, step=order, commit=True))

    def log_samples(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int, order: int) -> None:
        """Send a table: one line a sample, its pictures side by side before the text."""

        def send() -> None:
            self._run.log({f"samples/{name}": _table(rows), "eval/step": step}, step=order, commit=True)

        self._call(f"table {name}", send)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's summary values."""
        self._call("summary", lambda: self._run.summary.update(redact(dict(values))))

    def finish(self, exit_code: int) -> None:
        """Close the run and say what failed on the way, if anything did."""
        self._failures_in_a_row = 0
        self._call("finish", lambda: self._run.finish(exit_code=exit_code))
        if self.num_failures:
            _say(
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
                _say(f"wandb failed ({what}: {_one_line(error)}); the run goes on, its numbers are in metrics.jsonl")


def _init(
    run_dir: Path, config: TrackingConfig, *, identity: str, name: str, recipe: Mapping[str, Any], mode: Mode
) -> Any:
    import wandb

    online = mode == "online"
    with _files_in(run_dir), _redacted_command_line():
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
            config=redact(dict(recipe)),
            # Standard output belongs to the progress line. Uploads that never end must not hold the machine.
            settings=wandb.Settings(
                console="off",
                save_code=False,
                x_save_requirements=False,
                silent=not online,
                show_info=False,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
                init_timeout=60,
                finish_timeout=600,
            ),
        )
    for axis in ("train", "eval"):
        run.define_metric(f"{axis}/step", hidden=True)
        run.define_metric(f"{axis}/*", step_metric=f"{axis}/step")
    run.define_metric("samples/*", step_metric="eval/step")
    return run


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


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    num_pictures = max((len(row["image_paths"]) for row in rows), default=0)
    pictures = [f"picture_{index + 1}" for index in range(num_pictures)]
    table = wandb.Table(columns=["id", "task", *pictures, *_TEXT_COLUMNS[2:]])
    for row in rows:
        texts = [None if row[column] is None else str(row[column]) for column in _TEXT_COLUMNS]
        images = [_picture(Path(path)) for path in row["image_paths"]]
        table.add_data(*texts[:2], *images, *[None] * (num_pictures - len(images)), *texts[2:])
    return table


def _picture(path: Path) -> Any:
    """The picture, at most PICTURE_PIXELS on its longest edge; None where it cannot be read: the text still counts."""
    import wandb
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
            return wandb.Image(image.convert("RGB"))
    except OSError:
        return None


def _one_line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))[:300] or type(error).__name__


def _say(message: str) -> None:
    print(f"tracking: {message}", file=sys.stderr, flush=True)
