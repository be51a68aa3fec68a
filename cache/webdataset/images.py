"""Decoding untrusted image bytes to RGB, or to one named error."""

import io
import warnings

from PIL import ExifTags, Image, UnidentifiedImageError

from threetowers.cache.webdataset.defects import ImageDefect

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_ASPECT = 100  # a 1 x 50,000 strip is small, but resizing its short side to 224 px needs gigabytes
WHITE = (255, 255, 255, 255)
MAX_PIXELS = 50_000_000  # width x height of the largest image that is decoded by default
MALFORMED_METADATA = "malformed EXIF or XMP, taken as upright"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own messages on files that are used all the same, or refused here by name
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(ValueError):
    """Bytes that are not an image this package is willing to decode. The message gives the reason."""

    def __init__(self, message: str, defect: ImageDefect = ImageDefect.UNDECODABLE) -> None:
        super().__init__(message)
        self.defect = defect


def decode_rgb(
    data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None, notes: list[str] | None = None
) -> Image.Image:
    """Return one image (the first frame) decoded, upright, opaque and in RGB.

    Size and aspect are checked from the header, before any pixel is decoded. The EXIF orientation is applied where it
    can be read, transparency is laid on white, 16-bit greyscale is scaled (Pillow alone would clip it).

    Args:
        data: The encoded image.
        max_pixels: Largest width x height that is decoded.
        min_side: Decode a JPEG at 1/2, 1/4 or 1/8 of its size, the smallest at which its shorter side has at least so
            many pixels. Faster, and not the same pixels.
        notes: What was tolerated is added to it.

    Raises:
        BadImage: The data is not in one of FORMATS, is truncated or corrupt, has more than `max_pixels`, or its sides
            are more than 1:100 apart.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit, of the process, would refuse what is asked for
    try:
        return _decode(data, max_pixels, min_side, notes)
    except (BadImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"more pixels than max_pixels={max_pixels}: {error}", ImageDefect.TOO_LARGE) from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds: OSError, SyntaxError, struct.error, ...
        if (bare := _without_png_metadata(data)) != data:
            try:
                image = decode_rgb(bare, max_pixels=max_pixels, min_side=min_side)
                if notes is not None:
                    notes.append(MALFORMED_METADATA)
                return image
            except BadImage as still_bad:
                if still_bad.defect != ImageDefect.UNDECODABLE:
                    raise
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its own message names an address in memory
            reason = f"not one of {', '.join(FORMATS)}"
        raise BadImage(f"cannot be decoded ({len(data)} bytes): {reason}") from error


def _decode(data: bytes, max_pixels: int, min_side: int | None, notes: list[str] | None) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(f"{width} x {height} pixels, more than max_pixels={max_pixels}", ImageDefect.TOO_LARGE)
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage(f"{width} x {height} pixels, sides more than 1:{MAX_ASPECT} apart")
        if min_side is not None:
            image.draft(None, (width * min_side // min(width, height), height * min_side // min(width, height)))
        image.load()
        return _opaque(_upright(image, notes))


def _without_png_metadata(data: bytes) -> bytes:
    """Return a PNG without its EXIF and text, on whose damage Pillow gives the whole file up; other data as it is."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept = [PNG_SIGNATURE]
    at = len(PNG_SIGNATURE)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])  # length, kind, content, checksum
        if data[at + 4 : at + 8] not in PNG_METADATA:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _upright(image: Image.Image, notes: list[str] | None) -> Image.Image:
    """Return the image turned as its EXIF or XMP says; as it is stored where these are malformed.

    Pillow's `exif_transpose` also writes the EXIF back without the orientation, which fails for many files.
    """
    method = _transposition(image, notes)
    return image if method is None else image.transpose(method)


def _transposition(image: Image.Image, notes: list[str] | None) -> Image.Transpose | None:
    """Return how the image is to be turned or mirrored; None where it is upright, or its EXIF or XMP is malformed."""
    try:
        exif = image.getexif()
        if not exif and "exif" in image.info:
            Image.Exif().load(image.info["exif"])  # opening a JPEG has met an error here and hidden it
        return TRANSPOSITIONS.get(exif.get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # Pillow's parsers raise SyntaxError, struct.error, TypeError, UnicodeDecodeError, ...
        if notes is not None:
            notes.append(MALFORMED_METADATA)
        return None


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = image.point(lambda value: value * (255 / 65535) + 0.5).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies, even what is RGB already


def read_stored_size(data: bytes) -> tuple[tuple[int, int], bool]:
    """Return the (width, height) in which an image is stored, and whether its EXIF turns or mirrors it.

    No pixel of a JPEG or WebP is decoded.

    Raises:
        BadImage: The data is not in one of FORMATS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size, _transposition(image, None) is not None
    except MemoryError:
        raise
    except Exception as error:  # as for `decode_rgb`
        raise BadImage(f"cannot be decoded ({len(data)} bytes): not one of {', '.join(FORMATS)}") from error
