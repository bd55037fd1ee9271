"""A user's folder of pictures with its licence file: every picture known by content, names, caption and licence.

`library.yaml` in the folder's root says what the pictures are and who may use them; each value holds for the whole
folder, for a folder below it, or for one file, the nearest one counting:

    licence: CC-BY-4.0
    attribution: "photographs by Ann Example"
    visible_harm: false                              # optional: is something overtly harmful to be seen?
    folders:
      - {folder: knives, names: [knife, blade]}
    pictures:
      - {file: knives/bread.jpg, names: [bread knife], licence: CC0-1.0, url: "https://example.org/bread"}

`captions.jsonl` (one object a line: file, caption, and optionally the keys above) and `<picture>.txt` beside a picture
hold captions for the retrieval.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_gen.illustrators.base import NO_LICENCE
from data_gen.illustrators.decode import SUFFIXES, VERSION, check_header, decode_picture, read_picture_bytes
from data_gen.pictures import Picture
from mirage.config.yaml_tree import read_plain_yaml
from mirage.data.row import canonical_json
from mirage.errors import UserError
from mirage.strict_json import read_json_lines

LICENCE_FILE = "library.yaml"
CAPTIONS_FILE = "captions.jsonl"
MAX_CAPTION_CHARACTERS = 2000
NUM_SHOWN = 5  # problems that a message spells out
_TERMS = ("licence", "attribution", "url", "visible_harm")


class _Terms(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    licence: str | None = None
    attribution: str | None = None
    url: str | None = None
    visible_harm: bool | None = None

    @field_validator("licence", "attribution")
    @classmethod
    def _says_something(cls, value: str | None) -> str | None:
        if value is not None and NO_LICENCE.match(value):
            raise ValueError(f"must be named or left out, found {value!r}")
        return value


def _inside(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\\" in value or not path.parts:
        raise ValueError(f"must be a path inside the folder, with '/' between its parts, found {value!r}")
    return path.as_posix()


class _FileEntry(_Terms):
    file: str
    names: tuple[str, ...] = ()
    caption: str = Field(default="", max_length=MAX_CAPTION_CHARACTERS)

    _file_is_inside = field_validator("file")(classmethod(lambda cls, value: _inside(value)))


class _FolderEntry(_Terms):
    folder: str
    names: tuple[str, ...] = ()

    _folder_is_inside = field_validator("folder")(classmethod(lambda cls, value: _inside(value)))


class _LicenceFile(_Terms):
    folders: tuple[_FolderEntry, ...] = ()
    pictures: tuple[_FileEntry, ...] = ()


@dataclass(frozen=True)
class FolderPicture:
    """One picture of the folder; `sha256` is that of the file."""

    file: str
    sha256: str
    names: tuple[str, ...]
    caption: str
    licence: str
    attribution: str
    url: str | None
    visible_harm: bool | None

    def facts(self) -> dict[str, Any]:
        """As JSON, for content keys."""
        return asdict(self) | {"names": list(self.names)}


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder in order of their paths."""

    root: Path
    pictures: tuple[FolderPicture, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of all pictures' content and facts; where the folder lies does not matter."""
        return hashlib.sha256(canonical_json([picture.facts() for picture in self.pictures]).encode()).hexdigest()

    def content(self, picture: FolderPicture) -> bytes:
        """The file's bytes. Raises UserError if it is gone or was changed since the folder was read."""
        path = self.root / picture.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); restore it and run again") from error
        if hashlib.sha256(content).hexdigest() != picture.sha256:
            raise UserError(f"{path} was changed while the run was using it; run again")
        return content

    def load(self, picture: FolderPicture, *, max_edge_pixels: int) -> Picture:
        """The picture as plain PNG. Raises UserError if it is gone, was changed, or cannot be decoded."""
        where = str(self.root / picture.file)
        return decode_picture(self.content(picture), where=where, max_edge_pixels=max_edge_pixels)


def read_folder(root: Path) -> PictureFolder:
    """Read the licence file, the captions and the headers of all pictures.

    Raises one UserError that lists what is wrong: no licence file, pictures without licence or attribution, listed
    files that are missing, paths and links that leave the folder, files that are no pictures or too large.
    """
    licences = _read_licence_file(root)
    captions = _read_captions(root)
    problems: list[str] = []
    files = list(_picture_files(root, problems))
    entries = {entry.file: entry for entry in licences.pictures}
    known = set(files)
    for name, listed in ((LICENCE_FILE, entries), (CAPTIONS_FILE, captions)):
        problems += [f"{name} lists {file}, which is no picture of the folder" for file in listed if file not in known]
    pictures = []
    for file in files:
        try:
            pictures.append(_picture(root, file, _layers(file, licences, entries, captions)))
        except UserError as error:
            problems.append(str(error))
    if not files and not problems:
        problems.append(f"no pictures ({', '.join(sorted(SUFFIXES))})")
    if problems:
        _refuse(root, problems)
    return PictureFolder(root=root, pictures=tuple(pictures))


def decoding_identity() -> dict[str, str]:
    """What decides how a file's bytes become a picture's, besides Pillow's version."""
    return {"decode": VERSION}


def _refuse(root: Path, problems: list[str]) -> NoReturn:
    shown = "; ".join(problems[:NUM_SHOWN])
    more = f"; and {len(problems) - NUM_SHOWN} more" if len(problems) > NUM_SHOWN else ""
    raise UserError(f"picture folder {root}: {shown}{more}")


def _read_licence_file(root: Path) -> _LicenceFile:
    path = root / LICENCE_FILE
    if not root.is_dir():
        raise UserError(f"picture folder {root} is missing or is no folder")
    if not path.is_file():
        raise UserError(
            f"picture folder {root} has no {LICENCE_FILE}; write one with at least `licence:` and `attribution:`, so "
            "that every picture says who may use it"
        )
    try:
        found = _LicenceFile.model_validate(read_plain_yaml(path, max_values=200_000) or {})
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error
    twice = [e.file for e in found.pictures if sum(other.file == e.file for other in found.pictures) > 1]
    if twice:
        raise UserError(f"{path} lists {twice[0]} more than once; keep one entry")
    return found


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "content"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def _read_captions(root: Path) -> dict[str, _FileEntry]:
    path = root / CAPTIONS_FILE
    if not path.is_file():
        return {}
    found: dict[str, _FileEntry] = {}
    for number, value in read_json_lines(path, remedy="correct it"):
        try:
            entry = _FileEntry.model_validate(value)
        except ValidationError as error:
            raise UserError(f"{path}, line {number}: {_first_problem(error)}") from error
        if entry.file in found:
            raise UserError(f"{path}, line {number} lists {entry.file} again; keep one line a file")
        found[entry.file] = entry
    return found


def _picture_files(root: Path, problems: list[str]) -> Iterator[str]:
    """Relative paths of all files named like pictures, sorted; what leaves the folder is a problem, never followed."""
    real_root = root.resolve()
    for folder, names_of_folders, names_of_files in os.walk(root):
        names_of_folders.sort()
        for name in sorted([*names_of_folders, *names_of_files]):
            path = Path(folder) / name
            file = path.relative_to(root).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(real_root):
                problems.append(f"{file} is a link that leaves the folder; copy the file in")
            elif name in names_of_folders or name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            elif not path.is_file():
                problems.append(f"{file} is no regular file")
            else:
                yield file
        names_of_folders[:] = [name for name in names_of_folders if not name.startswith(".")]


def _layers(
    file: str, licences: _LicenceFile, entries: dict[str, _FileEntry], captions: dict[str, _FileEntry]
) -> list[_Terms]:
    """What is said about a file, the nearest first."""
    parents = {parent.as_posix() for parent in PurePosixPath(file).parents}
    above = [entry for entry in licences.folders if entry.folder in parents]
    above.sort(key=lambda entry: -len(PurePosixPath(entry.folder).parts))
    own = [listed[file] for listed in (entries, captions) if file in listed]
    return [*own, *above, licences]


def _picture(root: Path, file: str, layers: list[_Terms]) -> FolderPicture:
    """Raises UserError, naming the file, if its terms are incomplete or it is no picture."""
    terms: dict[str, Any] = {
        name: next((value for layer in layers if (value := getattr(layer, name)) is not None), None) for name in _TERMS
    }
    for name in ("licence", "attribution"):
        if not terms[name]:
            raise UserError(f"{file} has no {name}; add one to {LICENCE_FILE}")
    path = root / file
    content = read_picture_bytes(path, where=file)
    check_header(content, where=file)
    names = next((layer.names for layer in layers if getattr(layer, "names", ())), None)  # type: ignore[attr-defined]
    return FolderPicture(
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        names=names or (_name_from_stem(path.stem),),
        caption=_caption(path, layers),
        **terms,
    )


def _name_from_stem(stem: str) -> str:
    """'kitchen_knife-02' -> 'kitchen knife'."""
    words = re.sub(r"[\W_]+", " ", re.sub(r"(?<![\W_\d])[\W_\d]+$", "", stem)).strip()
    return words or stem


def _caption(path: Path, layers: list[_Terms]) -> str:
    parts = [layer.caption for layer in layers if isinstance(layer, _FileEntry) and layer.caption]
    for sidecar in (path.with_name(f"{path.name}.txt"), path.with_suffix(".txt")):
        if sidecar.is_file() and not sidecar.is_symlink():
            parts.append(sidecar.read_text("utf-8", errors="replace")[:MAX_CAPTION_CHARACTERS])
    return " ".join(" ".join(parts).split())
