"""A sample's pictures as an endpoint is sent them: in the order in which the model under test was shown them."""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from pathlib import Path

from PIL import ExifTags, Image

from mirage.data.picture_files import open_picture
from mirage.data.row import ImagePart
from mirage.endpoint.messages import PictureInput
from mirage.errors import UserError
from mirage.evals.task import Sample
from mirage.files import file_sha256
from mirage.safe_paths import open_regular

# Types that servers take as they are (OpenAI, "Images and vision"; vLLM opens what Pillow opens).
_SENT_AS_IT_IS = {"JPEG": "image/jpeg", "WEBP": "image/webp"}
_PNG = b"\x89PNG\r\n\x1a\n"


def shown_order(sample: Sample) -> list[int]:
    """Indices of the sample's pictures in the order of its messages."""
    return [part.index for message in sample.messages for part in message.content if isinstance(part, ImagePart)]


def picture_hashes(sample: Sample) -> list[str]:
    """sha256 of the pictures' files, hex, in the order shown. Raises `UserError` for a file that cannot be read."""
    known = sample.image_sha256 or (None,) * len(sample.image_paths)
    return [known[index] or _sha256(sample.image_paths[index], sample.id) for index in shown_order(sample)]


def picture_inputs(sample: Sample) -> list[PictureInput]:
    """The pictures in the order shown: PNG, JPEG and WebP byte for byte, other types and turned photographs as PNG.

    Raises `UserError` for a file that is missing, is no picture, or is not the one that its row names.
    """
    return [_picture_input(sample, index) for index in shown_order(sample)]


def _picture_input(sample: Sample, index: int) -> PictureInput:
    path = sample.image_paths[index]
    try:
        with open_regular(path) as file:
            content = file.read()
    except (OSError, UserError) as error:
        raise UserError(f"sample {sample.id}: image {path} cannot be read ({error})") from error
    expected = sample.image_sha256[index] if sample.image_sha256 else None
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{path}: sample {sample.id}: the file is not the one its row names (sha256 differs)")
    media_type = _media_type(content)
    if media_type is not None:
        return PictureInput(content, media_type)
    buffer = io.BytesIO()
    open_picture(path, content=content).save(buffer, format="PNG")
    return PictureInput(buffer.getvalue(), "image/png")


def _media_type(content: bytes) -> str | None:
    """The type under which the bytes can go out unchanged; None where they must be written anew."""
    if content.startswith(_PNG):
        return "image/png"
    try:
        with Image.open(io.BytesIO(content)) as image:
            # Servers differ in whether they turn a photograph by its EXIF; evaluation in process does.
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return None if turned else _SENT_AS_IT_IS.get(image.format or "")
    except Exception:  # decoders raise many types on damaged files; what is wrong is said where they are decoded
        return None


def _sha256(path: Path, sample_id: str) -> str:
    try:
        status = path.stat()
        return _hash_of(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise UserError(f"sample {sample_id}: image {path} cannot be read ({error.strerror})") from error


@lru_cache(maxsize=1 << 16)
def _hash_of(path: Path, mtime_ns: int, size_bytes: int) -> str:
    return file_sha256(path)
