"""Measure what `make setup` costs on a fresh checkout: seconds, size on disk, and seconds when run again."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BYTES_PER_MB = 1e6


def main() -> None:
    """Set up once for each installer, the first being the baseline, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--installer",
        action="append",
        help="installer command, e.g. 'uv pip install'; may be given more than once; pip is always measured first",
    )
    parser.add_argument("--python", default=sys._base_executable, help="interpreter that makes the environment")
    args = parser.parse_args()

    table = Table("installer", "set-up, s", "ratio", "size, MB", "again, s", "packages", "torch", title="make setup")
    baseline_seconds = None
    for installer in [None, *(args.installer or [])]:
        with tempfile.TemporaryDirectory(prefix="mirage-setup-") as folder:
            checkout = Path(folder) / "checkout"
            copy_checkout(checkout)
            seconds = timed_setup(checkout, installer=installer, python=args.python)
            baseline_seconds = baseline_seconds or seconds
            again_seconds = timed_setup(checkout, installer=installer, python=args.python)
            table.add_row(
                installer or "pip",
                f"{seconds:.1f}",
                f"{seconds / baseline_seconds:.2f}",
                f"{size_bytes(checkout / '.venv') / BYTES_PER_MB:.0f}",
                f"{again_seconds:.2f}",
                *describe_environment(checkout),
            )
    Console().print(table)


def copy_checkout(target: Path) -> None:
    """Copy the files a clean checkout would have, local changes included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def timed_setup(checkout: Path, *, installer: str | None, python: str) -> float:
    """Seconds of one `make setup` in `checkout`; raises CalledProcessError where it fails."""
    command = ["make", "setup", f"PYTHON={python}", *([f"INSTALL={installer}"] if installer else [])]
    start = time.perf_counter()
    subprocess.run(command, cwd=checkout, check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def size_bytes(folder: Path) -> int:
    """Bytes that the files below `folder` take, hard links and symbolic links not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def describe_environment(checkout: Path) -> tuple[str, str]:
    """Number of installed packages and the torch build."""
    script = (
        "import importlib.metadata as m, torch;"
        "print(len({d.metadata['Name'] for d in m.distributions()}), torch.__version__)"
    )
    python = checkout / ".venv" / "bin" / "python"
    out = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout
    num_packages, torch_version = out.split()
    return num_packages, torch_version


if __name__ == "__main__":
    main()
