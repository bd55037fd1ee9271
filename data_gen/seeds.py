"""Seeds: every random choice has its own generator, derived from the root seed and the choice's name."""

from __future__ import annotations

import hashlib
import random

from mirage.data.row import canonical_json


def derive_seed(root: int, *name: str | int) -> int:
    """63-bit seed of the choice called `name`: the first bytes of sha256 over root seed and name.

    Adding a choice elsewhere does not move it, and Python's salted `hash` is never used.
    """
    digest = hashlib.sha256(canonical_json([root, *name]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def rng(root: int, *name: str | int) -> random.Random:
    """A generator seeded by `derive_seed`."""
    return random.Random(derive_seed(root, *name))
