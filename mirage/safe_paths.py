"""Files and names that come from outside: opened without waiting, kept inside their folder, shown without harm."""

from __future__ import annotations

import io
import os
import re
import stat
from functools import lru_cache
from pathlib import Path, PurePosixPath

from mirage.errors import UserError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# Another system's separators, control characters, and halves of surrogate pairs.
_NO_FILE_NAME = re.compile("[\\\\\x00-\x1f\x7f\ud800-\udfff]")


def open_regular(path: Path) -> io.BufferedReader:
    """A file opened for reading bytes. Raises `UserError` for what is none: a folder, a pipe, a device, nothing at all.

    Opening never waits: a named pipe without a writer would hold an ordinary `open` up for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)} cannot be opened ({_reason(error)})") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise UserError(f"{path} is {_KINDS.get(kind, 'no regular file')}; a regular file is needed")
    return os.fdopen(descriptor, "rb")


def _reason(error: OSError | ValueError) -> str:
    # Names with NUL or half surrogates come as ValueError, which has no strerror.
    return getattr(error, "strerror", None) or str(error)


def is_number(text: str) -> bool:
    """Whether a text is a whole number that `int` takes: ASCII digits, at most 18, where `isdigit` also takes `²`."""
    return len(text) <= 18 and text.isascii() and text.isdigit()


def printable(text: object) -> str:
    """The text as a message can hold it: control characters and what UTF-8 cannot hold are written as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


def stays_inside(name: str) -> bool:
    """Whether a path from a data file is relative, POSIX, free of `..` and control characters: it cannot leave a root.

    Links are not looked at; what is opened is checked where it matters.
    """
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or not path.parts or _NO_FILE_NAME.search(name))


def leads_outside(path: Path, root: Path) -> bool:
    """Whether a path, its links followed, is not below `root`, whose own links are followed too."""
    # realpath, for `Path.resolve` raises where links go in a circle.
    return not Path(os.path.realpath(path)).is_relative_to(_real(root.absolute()))


@lru_cache(maxsize=64)
def _real(root: Path) -> Path:
    return Path(os.path.realpath(root))


def is_file(path: Path) -> bool:
    """Whether there is a regular file; False too for names that no file can have (too long, NUL, half surrogates)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
