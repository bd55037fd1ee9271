"""Pictures by content hash: `images/ab/abcd....png` under one folder, written atomically, never changed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mirage.errors import UserError
from mirage.files import temporary_of

SUFFIXES = (".png", ".jpg", ".webp")


@dataclass(frozen=True)
class Blobs:
    """A folder of files named by the sha256 of their content."""

    root: Path

    def put(self, content: bytes, *, suffix: str = ".png") -> str:
        """Store `content`; returns its path relative to the root, which holds the hash. Storing twice is harmless."""
        assert suffix in SUFFIXES, suffix
        digest = hashlib.sha256(content).hexdigest()
        relative = f"images/{digest[:2]}/{digest}{suffix}"
        target = self.root / relative
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = temporary_of(target)
            partial.write_bytes(content)
            partial.replace(target)
        return relative

    def remove_torn(self) -> None:
        """Remove what killed processes were writing. Only while no other process writes to the store."""
        for partial in self.root.glob("images/*/.*.tmp"):
            partial.unlink()

    def path(self, relative: str) -> Path:
        """Where a stored file lies. Raises UserError if it is missing."""
        path = self.root / relative
        if not path.is_file():
            raise UserError(f"{path} is missing from the blob store; remove the store's folder and run again")
        return path

    def get(self, relative: str) -> bytes:
        """The content. Raises UserError if the file is missing or its content is not what its name says."""
        path = self.path(relative)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != path.stem:
            raise UserError(f"{path} is damaged (content and name disagree); remove it and run again")
        return content
