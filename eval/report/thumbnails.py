"""A store of the small images that reports show, named by their content."""

import base64
import io
from pathlib import Path

import xxhash

from threetowers.cache.storage.atomic import write_atomic
from threetowers.cache.webdataset.images import MAX_PIXELS, decode_rgb

THUMBNAIL_PIXELS = 192
INLINE_BYTES = 24_000  # larger images become thumbnails: a page of photographs must still load
IMAGE_SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}


class ThumbnailStore:
    """A folder of small images, each stored once, made of images of at most `max_pixels`."""

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS) -> None:
        self.folder = folder
        self.max_pixels = max_pixels

    def add(self, image: bytes) -> str:
        """Store an encoded image, as it is or as a thumbnail, and return its name.

        Raises:
            ValueError: For bytes that are no image.
        """
        kind = _kind(image)
        if kind is None or len(image) > INLINE_BYTES:
            kind, image = "webp", thumbnail(image, self.max_pixels)
        name = f"{xxhash.xxh3_128_hexdigest(image)}.{kind}"
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, image)
        return name

    def data_uri(self, name: str) -> str | None:
        """Return a stored image as a data URI; None where the folder has no image of that name."""
        path = self.folder / name
        if path.name != name or not path.is_file():  # a name from a record must not lead out of the folder
            return None
        image = path.read_bytes()
        kind = _kind(image)
        return None if kind is None else f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def thumbnail(image: bytes, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return an image, of at most `max_pixels`, as a WebP of at most 192 pixels a side.

    Raises:
        ValueError: For bytes that are no image, and for an image of too many pixels.
    """
    small = decode_rgb(image, max_pixels=max_pixels)
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _kind(image: bytes) -> str | None:
    """Return the format of an encoded image, None for an unknown one."""
    for kind, signature in IMAGE_SIGNATURES.items():
        if image.startswith(signature):
            # A RIFF file may also hold sound.
            return None if kind == "webp" and image[8:12] != b"WEBP" else kind
    return None
