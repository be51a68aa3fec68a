"""Tars with random defects, as people have them, drawn by hypothesis."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.vendor.pretty import RepresentationPrinter
from PIL import Image

SIDE = 16
MAX_PIXELS = 32 * 32  # what the tests allow, so that a small image can be too large
TOO_LARGE_SIDE = 40


def image_bytes(number: int, format: str = "PNG", side: int = SIDE) -> bytes:
    """An image of one colour, another for each number."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number * 37 % 256, number * 101 % 256, number * 5 % 256)).save(file, format)
    return file.getvalue()


def caption_of(key: str) -> str:
    """The caption of a sample, by which it can be told from all others."""
    return f"the caption of {key}"


def with_bad_exif(number: int) -> bytes:
    """A sound JPEG whose EXIF block is not."""
    data = image_bytes(number, "JPEG")
    block = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]


Members = list[tuple[str, bytes]]

# What the image side of sample `number` is, by kind.
IMAGES: dict[str, Callable[[int], Members]] = {
    "png": lambda number: [("png", image_bytes(number))],
    "jpg": lambda number: [("jpg", image_bytes(number, "JPEG"))],
    "upper case": lambda number: [("JPG", image_bytes(number, "JPEG"))],
    "webp": lambda number: [("webp", image_bytes(number, "WEBP"))],
    "another format than named": lambda number: [("jpg", image_bytes(number, "BMP"))],
    "bad EXIF": lambda number: [("jpg", with_bad_exif(number))],
    "none": lambda number: [],
    "two": lambda number: [("jpg", image_bytes(number, "JPEG")), ("png", image_bytes(number))],
    "unknown format": lambda number: [("tif", image_bytes(number, "TIFF"))],
    "compound extension": lambda number: [("1.jpg", image_bytes(number, "JPEG"))],
    "too many pixels": lambda number: [("png", image_bytes(number, side=TOO_LARGE_SIDE))],
    "empty": lambda number: [("png", b"")],
    "cut": lambda number: [("png", image_bytes(number)[:50])],
    "a web page": lambda number: [("jpg", b"<!DOCTYPE html><title>403</title>")],
}


def json_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


# What the text side of the sample with this key is, by kind.
TEXTS: dict[str, Callable[[str], Members]] = {
    "txt": lambda key: [("txt", caption_of(key).encode())],
    "json": lambda key: [("json", json_bytes({"caption": caption_of(key), "group": key}))],
    "both": lambda key: [
        ("json", json_bytes({"caption": f"alt text of {key}"})),
        ("txt", caption_of(key).encode()),
    ],
    "none": lambda key: [],
    "empty": lambda key: [("txt", b" \n")],
    "byte order mark": lambda key: [("txt", b"\xef\xbb\xbf" + caption_of(key).encode())],
    "UTF-16": lambda key: [("txt", caption_of(key).encode("utf-16"))],
    "cp1252": lambda key: [("txt", b"the cat\x92s hat")],
    "long": lambda key: [("txt", (caption_of(key) + " and more" * 600).encode())],
    "null beside txt": lambda key: [("json", json_bytes({"caption": None})), ("txt", caption_of(key).encode())],
    "cut JSON beside txt": lambda key: [("json", b'{"caption": "cut sh'), ("txt", caption_of(key).encode())],
    "list": lambda key: [("json", json_bytes([{"caption": caption_of(key)}]))],
    "one of two null": lambda key: [("json", json_bytes({"captions": [None, caption_of(key)]}))],
    "group null": lambda key: [("json", json_bytes({"caption": caption_of(key), "group": None}))],
    "group list": lambda key: [("json", json_bytes({"caption": caption_of(key), "group": ["a"]}))],
    "group shared": lambda key: [("json", json_bytes({"caption": caption_of(key), "group": "boats"}))],
}

# Members that nothing reads.
EXTRAS: dict[str, Callable[[str], Members]] = {
    "none": lambda key: [],
    "npy": lambda key: [("npy", b"\x93NUMPY")],
    "cls": lambda key: [("cls", b"3")],
    "bad cls": lambda key: [("cls", b"three")],
}

SIZES = (3, 6, 9, 1, 0)  # samples of a tar
KEYS = ("{}", "folder/{}", "train.v1/22.05/{}", "café-{}", "a b {}", "./set/{}")


@dataclass(frozen=True)
class PackedSample:
    """A sample as it was packed: its key and its members by lower-cased extension."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class PackedTar:
    """The bytes of a tar, what it holds, and what is wrong with the archive, so that it may be refused."""

    data: bytes
    samples: tuple[PackedSample, ...]
    damage: str

    def _repr_pretty_(self, printer: RepresentationPrinter, cycle: bool) -> None:
        """Show the members without their bytes where hypothesis reports a failure."""
        members = [f"{sample.key}.{extension}" for sample in self.samples for extension in sample.members]
        printer.text(f"PackedTar({self.damage}, {len(self.data)} bytes, {members})")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@st.composite
def packed_tars(draw: st.DrawFn, number: int) -> PackedTar:
    """Draw a tar; tars of different numbers have different keys and images."""
    style = draw(st.sampled_from(KEYS))
    samples = []
    entries: list[tuple[str, bytes]] = []
    for ordinal in range(draw(st.sampled_from(SIZES))):
        key = style.format(f"{number}-{ordinal}")
        made = [
            *IMAGES[draw(st.sampled_from(sorted(IMAGES)))](10 * number + ordinal),
            *TEXTS[draw(st.sampled_from(sorted(TEXTS)))](key),
            *EXTRAS[draw(st.sampled_from(sorted(EXTRAS)))](key),
        ]
        if made:
            samples.append(PackedSample(key, {extension.lower(): data for extension, data in made}))
        entries += [(f"{key}.{extension}", data) for extension, data in made]
        if draw(st.integers(0, 9)) == 0:
            entries.append((draw(st.sampled_from((".DS_Store", "folder/._x.jpg", "README", "__meta__"))), b"\0\1"))

    damage = draw(st.sampled_from(("none",) * 8 + tuple(DAMAGES)))
    format = draw(st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    if damage == "scattered":
        entries.sort(key=lambda entry: entry[0].rpartition(".")[2])
    if damage == "repeated" and entries:
        entries.append(entries[0])
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in entries:
            _add(archive, name, data)
        end = archive.offset
    return PackedTar(
        DAMAGES[damage](file.getvalue(), end, draw) if damage in DAMAGES else file.getvalue(), tuple(samples), damage
    )


def _flip(data: bytes, end: int, draw: st.DrawFn) -> bytes:
    position = draw(st.integers(0, max(0, end - 1)))
    return data[:position] + bytes([data[position] ^ 1 << draw(st.integers(0, 7))]) + data[position + 1 :]


# What happens to the bytes of an archive, whose last member ends at `end`.
DAMAGES: dict[str, Callable[[bytes, int, st.DrawFn], bytes]] = {
    "cut": lambda data, end, draw: data[: draw(st.integers(0, end))],
    "flipped bit": _flip,
    "one zero block": lambda data, end, draw: data[: end + 512],
    "no end marker": lambda data, end, draw: data[:end],
    "compressed": lambda data, end, draw: gzip.compress(data),
    "joined": lambda data, end, draw: data + data,
    "scattered": lambda data, end, draw: data,
    "repeated": lambda data, end, draw: data,
}
WHOLE = ("none", "one zero block")  # what must be read all the same


@st.composite
def data_sets(draw: st.DrawFn) -> list[PackedTar]:
    """Draw a few tars."""
    return [draw(packed_tars(number)) for number in range(draw(st.sampled_from((2, 3, 1))))]


def write(tars: list[PackedTar], folder: Path) -> list[str]:
    """Write tars, and return their paths."""
    paths = []
    for number, tar in enumerate(tars):
        path = folder / f"{number:03}.tar"
        path.write_bytes(tar.data)
        paths.append(str(path))
    return paths
