"""Which code a run was made with: the package's version, and the commit where it lies in a git checkout."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGE = "mirage-vlm"
_SECONDS = 20


def code_version() -> dict[str, Any]:
    """`version` of the package; in a checkout also `commit`, and `dirty`: whether tracked files differ from it."""
    found: dict[str, Any] = {"version": _package_version(), "commit": None, "dirty": None}
    commit = _git("rev-parse", "HEAD")
    if commit:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        found |= {"commit": commit, "dirty": None if changed is None else bool(changed)}
    return found


def describe_code() -> str:
    """The same in words: `0.1, commit 0123456789ab with changes`."""
    own = code_version()
    commit = f", commit {own['commit'][:12]}{' with changes' if own['dirty'] else ''}" if own["commit"] else ""
    return f"{own['version']}{commit}"


def _package_version() -> str:
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:
        return "unknown"


def _git(*words: str) -> str | None:
    """What git says about the checkout that this file is tracked in; None outside of one, and without git."""
    folder = Path(__file__).resolve().parent
    try:
        # The package may lie in a virtual environment inside a checkout of something else.
        subprocess.run(
            ["git", "-C", folder, "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=True,
            timeout=_SECONDS,
        )
        done = subprocess.run(
            ["git", "-C", folder, *words], capture_output=True, text=True, check=True, timeout=_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
