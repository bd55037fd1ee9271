"""The small models that come with the package: `model.path=shipped:internvl` and `shipped:qwen2_vl`.

They see pictograms, name them, choose, and help with every request: what the experiment in miniature makes safe
(docs/experiment.md). `mirage/miniature/base.py` makes them.
"""

from __future__ import annotations

from pathlib import Path

from mirage.errors import UserError

PREFIX = "shipped:"
BASE_FILE = "base.json"  # how the weights were made, and what they can do
_FOLDER = Path(__file__).parent / "shipped"


def shipped_folder(name: str) -> Path:
    """Where the package keeps a family's small base, whether or not it is there."""
    return _FOLDER / name


def find_shipped(path: str) -> Path:
    """The folder of `shipped:NAME`. Raises `UserError` naming what there is."""
    name = path.removeprefix(PREFIX)
    found = sorted(folder.name for folder in _FOLDER.glob("*") if (folder / "config.json").is_file())
    if name not in found:
        raise UserError(f"model.path={path!r}: no such model comes with MIRage; there are {', '.join(found) or 'none'}")
    return shipped_folder(name)
