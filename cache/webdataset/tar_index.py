"""The index of a webdataset tar: its samples, and where each member lies.

A tar is indexed from its headers alone and refused when reading it could pair the wrong things: truncation, repeated or
scattered samples, two images under one key. Payloads are only ever decoded as images or text; whatever else a sample
carries (`.npy`, `.pkl`, `.pth`, ...) is listed in the index and never opened, but for labels in `.npy` members where an
evaluation's data set asks for them, which are read without unpickling.
"""

import contextlib
import glob
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, overload

import numpy as np
import numpy.typing as npt
import xxhash
from braceexpand import braceexpand

from threetowers.cache.storage.object_file import open_object
from threetowers.cache.storage.remote import glob_urls
from threetowers.cache.storage.storage import is_url, split_address

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif"})
TEXT_EXTENSIONS = frozenset({"txt", "json", "cls"})
MAX_MEMBER_BYTES = 64 << 20
MAX_PADDING = 1 << 20  # zeros after the end marker: tar pads to its record size, 10 KiB by default
TAR_BLOCK = 512  # of the tar format: headers and payloads begin at its multiples
CHANGED = "the tar has changed since it was indexed"


class BadTar(ValueError):
    """A tar that cannot be trusted to pair keys, images and rows. The message names file, sample and remedy."""


class Member(NamedTuple):
    """The byte range of one tar member: its offset from the start of the tar, and its size."""

    offset: int
    size: int


class Sample(NamedTuple):
    """One sample: its webdataset key, and its members by lower-cased extension."""

    key: str
    members: dict[str, Member]

    @property
    def image(self) -> str:
        """The extension of the image member."""
        return next(extension for extension in self.members if extension in IMAGE_EXTENSIONS)


class SampleList(Sequence[Sample]):
    """The samples of a tar in order, held as a few arrays: millions of samples stay small, and forks share them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        keys = [sample.key.encode() for sample in samples]
        members = [item for sample in samples for item in sample.members.items()]
        self._extensions = tuple(sorted({extension for extension, _ in members}))
        code = {extension: i for i, extension in enumerate(self._extensions)}
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)
        self._member_ends = np.cumsum([0, *(len(sample.members) for sample in samples)], dtype=np.int64)
        self._codes = np.array([code[extension] for extension, _ in members], dtype=np.uint32)
        self._members = np.array([member for _, member in members], dtype=np.int64).reshape(-1, 2)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that `from_arrays` reads; none holds Python objects."""
        return {
            "extensions": np.array(self._extensions, np.str_),
            "keys": np.frombuffer(self._keys, np.uint8),
            "key_ends": self._key_ends,
            "member_ends": self._member_ends,
            "codes": self._codes,
            "members": self._members,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the samples whose `to_arrays` these are.

        Raises:
            KeyError: An array is missing.
        """
        samples = cls([])
        samples._extensions = tuple(arrays["extensions"].tolist())
        samples._keys = arrays["keys"].tobytes()
        samples._key_ends = arrays["key_ends"]
        samples._member_ends = arrays["member_ends"]
        samples._codes = arrays["codes"]
        samples._members = arrays["members"]
        return samples

    def __len__(self) -> int:
        return len(self._key_ends) - 1

    @overload
    def __getitem__(self, ordinal: int) -> Sample: ...

    @overload
    def __getitem__(self, ordinal: slice) -> list[Sample]: ...

    def __getitem__(self, ordinal: int | slice) -> Sample | list[Sample]:
        if isinstance(ordinal, slice):
            return [self[i] for i in range(*ordinal.indices(len(self)))]
        if not -len(self) <= ordinal < len(self):
            raise IndexError(f"sample {ordinal} of {len(self)}")
        ordinal %= len(self)
        start, end = self._member_ends[ordinal : ordinal + 2]
        members = {self._extensions[self._codes[i]]: Member(*self._members[i].tolist()) for i in range(start, end)}
        return Sample(self.key(ordinal), members)

    def key(self, ordinal: int) -> str:
        """Return the key of a sample without its members; joining a cache needs no more."""
        return self._keys[self._key_ends[ordinal] : self._key_ends[ordinal + 1]].decode()


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of one tar, as its headers list them.

    `location` is a path or an fsspec URL. `fingerprint` is a digest over the size of the tar and each member's name,
    offset, size, time and header checksum: it survives a copy or a move and changes when a tar is packed or downloaded
    again. It does not cover payloads. `ignored` counts members that belong to no sample (folders, hidden files,
    `__meta__` entries), as in webdataset.
    """

    location: str
    size: int
    fingerprint: str
    samples: SampleList
    ignored: int

    @property
    def name(self) -> str:
        """The name of the file, without its folder."""
        return self.location.rpartition("/")[2]

    def describe(self, ordinal: int) -> str:
        """Return the tar and the key of a sample, for messages."""
        return f"{self.location}: sample {self.samples.key(ordinal)!r}"


def key_hash(key: str) -> int:
    """Return the xxh3_64 of a key, which a cache stores beside each row."""
    return xxhash.xxh3_64_intdigest(key.encode())


def expand(patterns: Sequence[str | Path]) -> list[str]:
    """Return the tars that match paths or URLs, which may hold globs (`*`, `**`, `?`, `[..]`) or ranges (`{00..99}`).

    They come in the order of the patterns, the matches of a glob sorted by name.

    Raises:
        ValueError: No patterns, one that matches nothing, a command (`pipe:`), or a file that is named twice.
    """
    found: dict[str, tuple[str, str]] = {}
    for pattern in map(str, patterns):
        if pattern.startswith("pipe:"):
            raise ValueError(f"tar {pattern!r} is a command: name the file or URL that it reads")
        for path in _matches(pattern.removeprefix("file://")):
            same = path if is_url(path) else os.path.realpath(path)
            if same in found:
                other, by = found[same]
                raise ValueError(f"{path} (from {pattern!r}) and {other} (from {by!r}) are one file: name it once")
            found[same] = path, pattern
    if not found:
        raise ValueError("no tars given: name at least one file, glob or brace range")
    return [path for path, _ in found.values()]


def _matches(pattern: str) -> list[str]:
    try:
        parts = [pattern] if os.path.isfile(pattern) else list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise ValueError(f"tar pattern {pattern!r}: {error}") from None
    paths: list[str] = []
    for part in parts:
        if is_url(part):
            matches = glob_urls(part) if glob.has_magic(part) else [part]  # opened when it is read
        elif os.path.isfile(part):
            matches = [part]
        else:
            matches = sorted(filter(os.path.isfile, glob.glob(part, recursive=True)))
        if not matches:
            inside = f" (from {pattern!r})" if part != pattern else ""
            raise ValueError(f"tar pattern {part!r}{inside} matches no file")
        paths += matches
    return paths


def index_tar(path: Path | str, file: BinaryIO | None = None) -> TarIndex:
    """Read the headers of a tar once and check that its samples can be trusted.

    A member `folder/name.ext` belongs to the sample `folder/name`: the key ends at the first dot of the last path
    component, the extension is lower-cased (webdataset's rule). Every sample has exactly one image member.

    Args:
        path: Path or URL of the tar.
        file: The tar, if it is open already.

    Raises:
        BadTar: The tar is truncated (also at a member boundary, where the end marker is missing), empty, compressed, or
            two archives in one file; it repeats or scatters a sample, repeats a member, or has a sample with no image
            or two; it holds links, devices, absolute or `..` paths, or an image or text over MAX_MEMBER_BYTES.
        OSError: The file cannot be read.
    """
    path = str(path)
    with open_object(path) if file is None else contextlib.nullcontext(file) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        infos, end = _headers(path, file, size)
        _check_end(path, file, end, size)
    samples, ignored = _group(path, infos)
    if not samples:
        raise BadTar(f"{path}: holds no samples ({len(infos)} members, none of them name.extension)")
    digest = xxhash.xxh3_128(f"tar index 1: {size}\n".encode())
    for info in infos:
        digest.update(f"{info.name}\0{info.offset_data} {info.size} {info.mtime} {info.chksum}\n".encode())
    return TarIndex(path, size, digest.hexdigest(), SampleList(samples), ignored)


def _headers(path: str, file: BinaryIO, size: int) -> tuple[list[tarfile.TarInfo], int]:
    infos = []
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="strict") as archive:
            while (info := archive.next()) is not None:
                infos.append(info)
                if info.offset_data + info.size > size:
                    raise BadTar(
                        f"{path}: truncated in member {info.name!r}: it ends at byte {info.offset_data + info.size}, "
                        f"the file has {size}. Copy or download the tar again."
                    )
            return infos, archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise BadTar(
            f"{path} ({size} bytes): not a complete, plain tar: {error} after {len(infos)} members. "
            "Copy or download it again; a compressed tar must be unpacked (gunzip, unzstd) first."
        ) from error
    except UnicodeDecodeError as error:
        raise BadTar(f"{path}: name of member {len(infos)} is not UTF-8: {error}. Pack the tar again.") from error


def _check_end(path: str, file: BinaryIO, end: int, size: int) -> None:
    """Check the end marker: tarfile stops silently at a bad header and at the end of a truncated file."""
    file.seek(end)
    marker = file.read(2 * TAR_BLOCK)
    if len(marker) < 2 * TAR_BLOCK:
        raise BadTar(f"{path}: truncated: no end-of-archive marker at byte {end} of {size}. Copy or download it again.")
    if any(marker):
        raise BadTar(
            f"{path}: corrupt: neither a member nor the end-of-archive marker at byte {end}. Download it again."
        )
    if size - end > MAX_PADDING or any(file.read()):
        raise BadTar(
            f"{path}: {size - end} bytes follow the end marker at byte {end} and would be ignored: were tars "
            "joined by cat? Join them with `tar --concatenate`, or keep them apart."
        )


def _group(path: str, infos: list[tarfile.TarInfo]) -> tuple[list[Sample], int]:
    samples: list[Sample] = []
    seen: set[str] = set()
    ignored = 0
    for info in infos:
        # What belongs to no sample, as in webdataset
        _check_member(path, info)
        key, extension = split_name(info.name)
        if not info.isreg() or not extension or re.match(r"__[^/]*__($|/)", info.name):
            ignored += 1
            continue
        # The first member of the next sample
        if not samples or samples[-1].key != key:
            if key in seen:
                raise BadTar(
                    f"{path}: sample {key!r}: found again at member {info.name!r} after other samples, expected its "
                    "members side by side and its key once. Pack the tar sorted by name (tar --sort=name)."
                )
            if samples:
                _check_image(path, samples[-1])
            seen.add(key)
            samples.append(Sample(key, {}))
        if extension in samples[-1].members:
            raise BadTar(f"{path}: sample {key!r}: found two members .{extension}, expected one. Pack the tar again.")
        if extension in IMAGE_EXTENSIONS | TEXT_EXTENSIONS and info.size > MAX_MEMBER_BYTES:
            raise BadTar(
                f"{path}: sample {key!r}: member .{extension} has {info.size} bytes, expected at most "
                f"{MAX_MEMBER_BYTES}. Drop or shrink it."
            )
        samples[-1].members[extension] = Member(info.offset_data, info.size)
    if samples:
        _check_image(path, samples[-1])
    return samples, ignored


def split_name(name: str) -> tuple[str, str]:
    """Return webdataset's key and lower-cased extension of a member; no extension where it belongs to no sample.

    Hidden files belong to none, also inside a folder, where webdataset would make them members of a sample `folder/`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _check_member(path: str, info: tarfile.TarInfo) -> None:
    if info.issparse() or not (info.isreg() or info.isdir()):
        raise BadTar(f"{path}: member {info.name!r} is a link, device or sparse file, expected plain files only.")
    if info.name.startswith("/") or ".." in info.name.split("/"):
        raise BadTar(f"{path}: member {info.name!r} leaves the archive, expected a relative path without '..'.")


def _check_image(path: str, sample: Sample) -> None:
    images = sorted(IMAGE_EXTENSIONS & sample.members.keys())
    if len(images) != 1:
        raise BadTar(
            f"{path}: sample {sample.key!r}: found members {sorted(sample.members)}, expected exactly one of "
            f"{sorted(IMAGE_EXTENSIONS)} (the extension is all that follows the first dot of the name)."
        )


def read_member(index: TarIndex, ordinal: int, extension: str, max_bytes: int | None = None) -> bytes:
    """Return the bytes of one member, by random access.

    Args:
        index: Index of the tar.
        ordinal: The sample's position in it.
        extension: Of the member: an image or a text.
        max_bytes: The most that may be read of a member that is neither; None: it is not read at all.

    Raises:
        ValueError: The extension is neither image nor text, or the sample lacks it, or it is larger than `max_bytes`.
        BadTar: The tar is shorter than when it was indexed.
    """
    members = index.samples[ordinal].members
    if extension not in IMAGE_EXTENSIONS | TEXT_EXTENSIONS and max_bytes is None:
        raise ValueError(f"{index.describe(ordinal)}: .{extension} is neither image nor text and is never read")
    if extension not in members:
        raise ValueError(f"{index.describe(ordinal)}: has no .{extension} member, only {sorted(members)}")
    offset, size = members[extension]
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f"{index.describe(ordinal)}: .{extension} has {size} bytes, expected at most {max_bytes}")
    storage, name = split_address(index.location)
    data = storage.read(name, offset, offset + size)
    if len(data) != size:
        raise BadTar(f"{index.describe(ordinal)}: found {len(data)} bytes, expected {size}: {CHANGED}")
    return data
