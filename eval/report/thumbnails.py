"""The pictures that reports show, kept beside the records: small, each once, named by its content."""

import base64
import io
from pathlib import Path

import xxhash

from threetowers.cache.storage.atomic import write_atomic

THUMBNAIL_PIXELS = 192
INLINE_BYTES = 24_000  # larger images become thumbnails: a page of photographs must still load
MAX_PIXELS = 50_000_000
SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}


class ThumbnailStore:
    """A folder of small pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, image: bytes) -> str:
        """Keep an encoded image, as it is or as a thumbnail, and return its name. Raises ValueError for no image."""
        kind = _kind(image)
        if kind is None or len(image) > INLINE_BYTES:
            kind, image = "webp", thumbnail(image)
        name = f"{xxhash.xxh3_128_hexdigest(image)}.{kind}"
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, image)
        return name

    def data_uri(self, name: str) -> str | None:
        """The picture as a page carries it; None where the folder does not hold it, or holds something else."""
        path = self.folder / name
        if path.name != name or not path.is_file():  # a name from a record must not lead out of the folder
            return None
        image = path.read_bytes()
        kind = _kind(image)
        return None if kind is None else f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def thumbnail(image: bytes) -> bytes:
    """A WebP of at most 192 pixels a side. Raises ValueError for what is no image or has too many pixels."""
    from threetowers.cache.webdataset.images import decode_rgb

    small = decode_rgb(image, max_pixels=MAX_PIXELS)
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _kind(image: bytes) -> str | None:
    kind = next((kind for kind, start in SIGNATURES.items() if image.startswith(start)), None)
    return None if kind == "webp" and image[8:12] != b"WEBP" else kind
