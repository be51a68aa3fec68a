"""Tars in which some samples have no usable image, one for each reason, between sound samples."""

import io
import tarfile
from pathlib import Path

from tests.conftest import picture

Entry = tuple[str, bytes] | tarfile.TarInfo
# By the key of the sample: why it has no usable image
DEFECTS = {
    "s0001": "no image",
    "s0003": "ambiguous image",
    "s0005": "unknown format",
    "s0007": "too large",
    "s0009": "not a file",
}
COUNTS = dict.fromkeys(DEFECTS.values(), 1)
MAX_BYTES = 20_000  # of a member in these tars, for which tests patch MAX_MEMBER_BYTES


def write_members(path: Path, *entries: Entry) -> Path:
    """A tar of exactly these members."""
    with tarfile.open(path, "w") as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A symbolic link, or another member without bytes of its own."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_defective(path: Path, samples: int = 24) -> Path:
    """A tar of so many samples with a caption each, those in DEFECTS without a usable image."""
    entries: list[Entry] = []
    for number in range(samples):
        key = f"s{number:04d}"
        image = picture("red", "disc", number)
        images: dict[str, list[Entry]] = {
            "no image": [],
            "ambiguous image": [(f"{key}.jpg", image), (f"{key}.png", image)],
            "unknown format": [(f"{key}.tif", image)],
            "too large": [(f"{key}.png", image + bytes(MAX_BYTES))],
            "not a file": [link(f"{key}.png", "s0000.png")],
            "": [(f"{key}.png", image)],
        }
        entries += [*images[DEFECTS.get(key, "")], (f"{key}.txt", f"caption {number}".encode())]
    return write_members(path, *entries)
