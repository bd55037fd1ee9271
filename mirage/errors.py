"""The exceptions that are messages, never tracebacks: a mistake the user can fix, and a run that a guard ended."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

MAX_MESSAGE_CHARS = 6000
# Control characters but for tabs and line ends, and halves of surrogate pairs, which no terminal or log can show.
_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
EXIT_USER_ERROR = 2
EXIT_STOPPED = 3
EXIT_INTERRUPTED = 130
# What a shell reports of a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 141
# What the system says where it takes no more, or nothing at all. Files are whole or as they were: trying again is safe.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


class UserError(Exception):
    """A mistake in the user's input. The text says where (file, row or key), what was found and what to do.

    In a run of several processes rank 0 shows it; set `one_rank_only` where only this rank can have met it.
    """

    one_rank_only: bool = False

    def __str__(self) -> str:
        """The message. Whatever a file or command line puts into it, it is of bounded length and moves no cursor."""
        text = super().__str__()
        if len(text) > MAX_MESSAGE_CHARS:
            text = f"{text[: MAX_MESSAGE_CHARS * 3 // 4]} [...] {text[-MAX_MESSAGE_CHARS // 5 :]}"
        return _NO_TEXT.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class RunStopped(Exception):
    """The run ends as its recipe says, before its last step; all ranks raise it, and nothing is damaged or lost."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with 0 or its return value, or with one message.

    2 for a `UserError`, 3 for a run that a guard ended, 130 for Ctrl-C, 141 where the reader of the output has gone, 1
    for a mistake of the program, with its traceback. In JSON mode the last line of standard output is then an event
    `error`, `stopped` or `interrupted`. A secret on the command line is refused, and none is in a message or traceback.
    """
    from mirage.tracking import json_lines
    from mirage.tracking.redact import refuse_secret_arguments

    if json_lines.asked_for(sys.argv[1:]):
        json_lines.claim_stdout()
    try:
        refuse_secret_arguments(sys.argv[1:])
        code = main()
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or error.one_rank_only:
            _say(f"error: {error}")
            _tell("error", str(error), EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            _say(f"stopped: {stopped}")
            _tell("stopped", str(stopped), EXIT_STOPPED)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        _tell("interrupted", "interrupted", EXIT_INTERRUPTED)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # `mirage tasks | head`: what Python would write when it ends has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except Exception as error:
        if (refused := describe_refusal(error)) is not None:
            # One rank may have met it, so each says so.
            _say(f"error: {refused}")
            _tell("error", refused, EXIT_USER_ERROR)
            sys.exit(EXIT_USER_ERROR)
        # A mistake of the program: where it happened, and no value of a variable.
        _say(traceback.format_exc().rstrip("\n"))
        _tell("error", f"{type(error).__name__}: {error}", 1)
        sys.exit(1)
    sys.exit(code or 0)


def describe_refusal(error: BaseException) -> str | None:
    """What the user can do about a full disk or a folder that may not be written to; None for another error.

    Libraries that write by themselves (safetensors, torch) tell the system's reason in their text alone.
    """
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number in _FULL or (number is None and ("No space left on device" in text or "StorageFull" in text)):
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return f"{where}no space left on the disk; make room, and the same command goes on"
    if number in _CLOSED or (number is None and "Read-only file system" in text):
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return f"{where}cannot be written or read ({os.strerror(number or errno.EROFS)}); see its permissions and mount"
    return None


def _say(message: str) -> None:
    from mirage.tracking.terminal_text import safe_message

    print(safe_message(message), file=sys.stderr, flush=True)


def _tell(event: str, message: str, exit_code: int) -> None:
    """The end of a command as a JSON line, in JSON mode."""
    from mirage.tracking import json_lines
    from mirage.tracking.terminal_text import safe_message

    if json_lines.is_claimed():
        json_lines.emit(event, {"message": safe_message(message), "exit_code": exit_code})
