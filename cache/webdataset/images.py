"""Decoding untrusted image bytes to RGB, or to one named error."""

import io

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_ASPECT = 100  # a 1 x 50,000 strip is small, but resizing its short side to 224 px needs gigabytes
WHITE = (255, 255, 255, 255)
MAX_PIXELS = 50_000_000  # width x height of the largest image that is decoded by default


class BadImage(ValueError):
    """Bytes that are not an image this package is willing to decode. The message gives the reason."""


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None) -> Image.Image:
    """Return one image (the first frame) decoded, upright, opaque and in RGB.

    Size and aspect are checked from the header, before any pixel is decoded. The EXIF orientation is applied,
    transparency is laid on white, 16-bit greyscale is scaled (Pillow alone would clip it).

    Args:
        data: The encoded image.
        max_pixels: Largest width x height that is decoded.
        min_side: Decode a JPEG at 1/2, 1/4 or 1/8 of its size, the smallest at which its shorter side has at least so
            many pixels. Faster, and not the same pixels.

    Raises:
        BadImage: The data is not in one of FORMATS, is truncated or corrupt, has more than `max_pixels`, or its sides
            are more than 1:100 apart.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"{width} x {height} pixels, more than max_pixels={max_pixels}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise BadImage(f"{width} x {height} pixels, sides more than 1:{MAX_ASPECT} apart")
            if min_side is not None:
                image.draft(None, (width * min_side // min(width, height), height * min_side // min(width, height)))
            image.load()
            return _opaque(ImageOps.exif_transpose(image))
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise BadImage(f"cannot be decoded ({len(data)} bytes): not one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds: OSError, SyntaxError, struct.error, bombs, ...
        raise BadImage(f"cannot be decoded ({len(data)} bytes): {error or type(error).__name__}") from error


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = image.point(lambda value: value * (255 / 65535) + 0.5).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")
