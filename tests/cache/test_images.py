import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threetowers.cache.webdataset.images import BadImage, decode_rgb

Draw = Callable[..., Image.Image]
Encode = Callable[..., bytes]


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "jpeg", "gif"])
def test_decodes_every_format_to_rgb(kind: str, draw: Draw, encode: Encode) -> None:
    image = decode_rgb(encode(draw(3), kind))
    assert image.mode == "RGB"
    assert image.size == (40, 52)
    assert np.abs(np.asarray(image, int) - np.asarray(draw(3), int)).mean() < (12 if kind != "png" else 1e-9)


def test_transparency_is_laid_on_white(encode: Encode) -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9])
    buffer = io.BytesIO()
    palette.save(buffer, "png", transparency=0)
    keyed = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(keyed, "png", transparency=(1, 2, 3))
    assert decode_rgb(encode(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_rgb(encode(half)).getpixel((0, 0)) == (127, 127, 127)
    assert decode_rgb(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    assert decode_rgb(keyed.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_grey_palette_cmyk_and_16_bit(encode: Encode) -> None:
    assert decode_rgb(encode(Image.new("L", (3, 3), 77))).getpixel((1, 1)) == (77, 77, 77)
    assert decode_rgb(encode(Image.new("1", (3, 3), 1))).getpixel((1, 1)) == (255, 255, 255)
    assert decode_rgb(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "jpeg")).getpixel((4, 4)) == (255, 255, 255)
    deep = Image.fromarray(np.full((3, 3), 32768, dtype=np.uint16))
    assert decode_rgb(encode(deep)).getpixel((1, 1)) == (128, 128, 128)


def test_orientation_is_applied(draw: Draw) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter to show upright
    buffer = io.BytesIO()
    draw(1).save(buffer, "png", exif=exif)
    upright = decode_rgb(buffer.getvalue())
    assert upright.size == (52, 40)
    assert np.array_equal(np.asarray(upright), np.asarray(draw(1).transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif"])
def test_truncated_is_refused_at_any_length(kind: str, draw: Draw, encode: Encode) -> None:
    data = encode(draw(5), kind)
    for length in range(0, len(data) - 12, max(1, len(data) // 23)):
        with pytest.raises(BadImage, match="cannot be decoded"):
            decode_rgb(data[:length])


def test_other_formats_are_refused(draw: Draw, encode: Encode) -> None:
    for data in (b"", b"not an image", encode(draw(1), "tiff"), encode(draw(1), "ppm")):
        with pytest.raises(BadImage, match=r"cannot be decoded \(\d+ bytes\): not one of JPEG, PNG"):
            decode_rgb(data)


def _png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds no pixels: decoding it would allocate first."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_bombs_are_refused_from_the_header(encode: Encode) -> None:
    for width, height in ((8000, 8000), (10_000, 10_000), (60_000, 60_000)):
        with pytest.raises(BadImage, match=r"pixels|exceeds"):
            decode_rgb(_png_header(width, height) + b"\0\0\0\0IDAT")
    with pytest.raises(BadImage, match="101 x 1 pixels, sides more than 1:100"):
        decode_rgb(encode(Image.new("RGB", (101, 1))))
    assert decode_rgb(encode(Image.new("RGB", (100, 1)))).size == (100, 1)
    with pytest.raises(BadImage, match="more than max_pixels=15"):
        decode_rgb(encode(Image.new("RGB", (4, 4))), max_pixels=15)


def _chunk(kind: bytes, body: bytes, damage: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ damage)


QUARTER = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # EXIF: rotate to show upright
JUNK = b"\0\x08\0\x02\x01\x12\0\x03" + bytes(12)


@pytest.mark.parametrize(
    ("kind", "metadata"),
    [
        ("png", _chunk(b"eXIf", JUNK)),
        ("png", _chunk(b"eXIf", QUARTER, damage=1)),
        ("png", _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta", damage=1)),
        ("jpeg", JUNK),
        ("webp", JUNK),
        ("webp", b"II*\0"),
    ],
)
def test_an_image_with_malformed_metadata_is_taken_as_it_lies(
    kind: str, metadata: bytes, draw: Draw, encode: Encode
) -> None:
    data = encode(draw(1), kind)
    notes: list[str] = []
    if kind == "png":
        assert decode_rgb(data[:33] + _chunk(b"eXIf", QUARTER) + data[33:], notes=notes).size == (52, 40)
        data = data[:33] + metadata + data[33:]
    elif kind == "jpeg":
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(metadata) + 8) + b"Exif\0\0" + metadata + data[2:]
    else:
        buffer = io.BytesIO()
        draw(1).save(buffer, "webp", exif=metadata)
        data = buffer.getvalue()
    assert notes == []
    image = decode_rgb(data, notes=notes)
    assert np.array_equal(np.asarray(image), np.asarray(decode_rgb(encode(draw(1), kind))))
    assert notes == ["malformed EXIF or XMP, taken as upright"]


def test_pillow_itself_says_nothing(draw: Draw, encode: Encode, tmp_path: Path) -> None:
    short = b"Exif\0\0" + QUARTER[:12]
    data = encode(draw(1), "jpeg")
    (tmp_path / "x.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(short) + 2) + short + data[2:])
    code = (
        "import sys; from pathlib import Path; from threetowers.cache.webdataset.images import decode_rgb\n"
        "decode_rgb(Path(sys.argv[1]).read_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.jpg"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_readable_orientation_counts_whatever_else_is_malformed(draw: Draw, encode: Encode) -> None:
    resolution_by_zero = b"\x01\x1a\0\x05\0\0\0\x01\0\0\0\x26" + bytes(4) + bytes(8)
    exif = b"Exif\0\0" + QUARTER[:9] + b"\x02" + QUARTER[10:22] + resolution_by_zero
    data = encode(draw(1), "jpeg")
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    notes: list[str] = []
    assert decode_rgb(data, notes=notes).size == (52, 40)
    assert notes == []


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_one_bound_on_pixels_replaces_that_of_pillow(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 15):  # a warning of Pillow's, an error of Pillow's
        with pytest.raises(BadImage, match=r"more .*max_pixels=90") as caught:
            decode_rgb(encode(Image.new("RGB", (side, side))), max_pixels=90)
        assert caught.value.defect == "too large"
    assert decode_rgb(encode(Image.new("RGB", (15, 15))), max_pixels=225).size == (15, 15)
