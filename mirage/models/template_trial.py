"""A chat template from others is tried once in a child process with bounds, before it is used in this one.

transformers renders it in Jinja's sandbox, which keeps it away from Python and files, and lets it loop and grow without
end all the same.
"""

from __future__ import annotations

import os
import resource
import select
import time
from collections.abc import Callable
from pathlib import Path

from mirage.errors import UserError

MAX_SECONDS = 10
MAX_BYTES = 1 << 30
# A template adds marks and a system turn to what is said, not a book.
MAX_CHARS = 1_000_000
_ENDS = {1: "fails", 2: f"gives more than {MAX_CHARS:,} characters", 3: f"takes more than {MAX_BYTES >> 20} MiB"}


def try_template(render: Callable[[], str], where: str) -> None:
    """Call `render` on a short conversation in a forked child that may take 10 s and 1 GiB beyond what is in use.

    Raises `UserError` naming `where` for a template that takes more, or gives more than a million characters. One that
    cannot take the conversation is no fault here: what it says of it comes where it is used.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _child(render, writer)
    os.close(writer)
    try:
        ended = select.select([reader], [], [], MAX_SECONDS)[0]
        if not ended:
            os.kill(child, 9)
        status = os.read(reader, 1) if ended else b""
    finally:
        os.close(reader)
        os.waitpid(child, 0)
    code = status[0] if status else -1
    if code not in (0, 1):
        why = _ENDS.get(code, f"takes more than {MAX_SECONDS} seconds")
        raise UserError(f"{where}: its chat template {why} on a short conversation; it is damaged, or means harm")


def _child(render: Callable[[], str], writer: int) -> None:
    code = 1
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
        seconds = int(time.process_time()) + MAX_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        code = 2 if len(render()) > MAX_CHARS else 0
    except MemoryError:
        code = 3
    except BaseException:
        code = 1
    finally:
        os.write(writer, bytes([code]))
        os._exit(0)
