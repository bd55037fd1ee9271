"""The folder that a dataset is built in: set aside until whole, continued after a kill, then renamed into place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_gen.pictures import Picture
from mirage.data.row import canonical_json
from mirage.errors import UserError
from mirage.files import file_sha256
from mirage.safe_paths import is_file, stays_inside
from mirage.strict_json import json_lines, read_json_object

MANIFEST_FILE = "manifest.json"
JOURNAL_FILE = ".pictures.jsonl"  # which pictures are drawn; gone from a finished folder
KEY_FILE = ".build-key"


@dataclass(frozen=True)
class StoredPicture:
    """A picture in the folder: path relative to it, sha256 of the file, edge lengths in pixels."""

    path: str
    sha256: str
    width: int
    height: int


@dataclass
class BuildFolder:
    """The folder aside. Pictures drawn by an earlier, killed build of the same key are kept."""

    path: Path
    pictures: dict[str, StoredPicture] = field(default_factory=dict)

    def picture(self, name: str) -> StoredPicture | None:
        """The stored picture of that name, if it is drawn already."""
        return self.pictures.get(name)

    def add_picture(self, name: str, picture: Picture) -> StoredPicture:
        """Store a picture under its content hash and note its name in the journal."""
        digest = hashlib.sha256(picture.png).hexdigest()
        relative = f"images/{digest[:2]}/{digest}.png"
        stored = StoredPicture(path=relative, sha256=digest, width=picture.width, height=picture.height)
        target = self.path / relative
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            partial.write_bytes(picture.png)
            partial.replace(target)
        with (self.path / JOURNAL_FILE).open("a", encoding="utf-8") as journal:
            journal.write(_journal_line(name, stored))
        self.pictures[name] = stored
        return stored

    def write_text(self, relative: str, text: str) -> None:
        """Write a text file (UTF-8, '\\n' line ends) and its parent folders."""
        target = self.path / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode("utf-8"))

    def link_picture(self, source: str, relative: str) -> None:
        """Show a stored picture at a second path: a hard link where the file system has them, a copy otherwise."""
        self.link_file(self.path / source, relative)

    def link_file(self, source: Path, relative: str) -> None:
        """Show a file from elsewhere in the folder: a hard link where the file system has them, a copy otherwise."""
        target = self.path / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def _journal_line(name: str, stored: StoredPicture) -> str:
    size = [stored.width, stored.height]
    return canonical_json({"name": name, "path": stored.path, "sha256": stored.sha256, "size": size}) + "\n"


def _journal(folder: Path) -> dict[str, StoredPicture]:
    """Pictures that an earlier build drew and that are still whole; a torn last line is left out."""
    path = folder / JOURNAL_FILE
    found: dict[str, StoredPicture] = {}
    if not path.exists():
        return found
    for _, entry in json_lines(path):
        try:
            stored = StoredPicture(entry["path"], entry["sha256"], *entry["size"])
            file = folder / stored.path if stays_inside(stored.path) else None
            name = str(entry["name"])
        except (KeyError, TypeError):
            continue
        if file is not None and is_file(file) and file_sha256(file) == stored.sha256:
            found[name] = stored
    return found


def open_build_folder(target: Path, *, key: str) -> BuildFolder:
    """The folder aside for `target`, next to it. What a build with another key left there is removed."""
    path = target.parent / f".{target.name}.building"
    key_file = path / KEY_FILE
    if path.exists() and not (key_file.is_file() and key_file.read_text("utf-8") == key):
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    pictures = _journal(path)
    whole = {stored.path for stored in pictures.values()}
    for file in path.glob("images/*/*"):
        if file.relative_to(path).as_posix() not in whole:
            file.unlink()
    # Everything but drawn pictures is quick to make again; the journal is rewritten without its torn or stale lines.
    for entry in path.iterdir():
        if entry.name == "images" or entry.name == KEY_FILE:
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    key_file.write_text(key, "utf-8")
    lines = (_journal_line(name, stored) for name, stored in pictures.items())
    (path / JOURNAL_FILE).write_text("".join(lines), "utf-8")
    return BuildFolder(path=path, pictures=pictures)


def publish(build: BuildFolder, target: Path, *, keep: set[str]) -> None:
    """Make the build visible as `target`: drop files that are not in `keep` (relative paths), sync, rename.

    An earlier dataset at `target` is moved aside first and removed last, so that a kill never leaves a mixture.
    """
    for path in sorted(build.path.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(build.path).as_posix() not in keep:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    os.sync()  # once for all files: thousands of single fsyncs would take longer than drawing
    old = target.parent / f".{target.name}.old"
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        target.rename(old)
    build.path.rename(target)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def build_lock(target: Path) -> Iterator[None]:
    """Hold the right to build `target`. Raises UserError if another process is building it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock_path = target.parent / f".{target.name}.lock"
    lock = FileLock(lock_path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{target}: another process is building this dataset; wait for it or use another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()
        lock_path.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished folder. Raises UserError if it is missing, torn, or altered."""
    path = folder / MANIFEST_FILE
    manifest = read_json_object(path, remedy="rebuild with --overwrite")
    if manifest.get("content_sha256") != manifest_sha256(manifest):
        raise UserError(f"{path}: its content does not match its own hash; rebuild with --overwrite")
    return manifest


def manifest_sha256(manifest: dict) -> str:
    """sha256 of the manifest's canonical JSON without its `content_sha256` field."""
    content = {name: value for name, value in manifest.items() if name != "content_sha256"}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def check_files(folder: Path, manifest: dict[str, Any], *, texts_only: bool) -> list[str]:
    """What is missing or altered in a folder. With `texts_only`, pictures are only looked for, not hashed."""
    problems = []
    for relative, digest in manifest["files"].items():
        path = folder / relative
        if not stays_inside(relative) or not is_file(path):
            problems.append(f"{relative} is missing")
        elif not (texts_only and relative.endswith(".png")) and file_sha256(path) != digest:
            problems.append(f"{relative} does not match its hash in {MANIFEST_FILE}")
    return problems
