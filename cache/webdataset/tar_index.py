"""Webdataset tars: which files, what is in them, where each member lies, and the checked stream of their images.

A tar is indexed from its headers alone and refused when reading it could pair the wrong things: truncation, repeated or
scattered samples, two images under one key. Payloads are only ever decoded as images or text; whatever else a sample
carries (`.npy`, `.pkl`, `.pth`, ...) is listed in the index and never opened.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import tarfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import xxhash
from braceexpand import braceexpand

from threetowers.cache.storage.storage import glob_urls, is_url, open_object, split_address

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif"})
TEXT_EXTENSIONS = frozenset({"txt", "json", "cls"})
MAX_MEMBER_BYTES = 64 << 20
MAX_PADDING = 1 << 20  # zeros after the end marker: tar pads to its record size, 10 KiB by default
HEADER = 512
CHANGED = "the tar has changed since it was indexed"


class BadTar(ValueError):
    """A tar that cannot be trusted to pair keys, images and rows. The message names file, sample and remedy."""


class Member(NamedTuple):
    """Where the bytes of one tar member lie: offset from the start of the tar, and size, in bytes."""

    offset: int
    size: int


class Sample(NamedTuple):
    """One sample: its webdataset key, and its members by lower-cased extension."""

    key: str
    members: dict[str, Member]

    @property
    def image(self) -> str:
        """The extension of its image member."""
        return next(extension for extension in self.members if extension in IMAGE_EXTENSIONS)


class Samples(Sequence[Sample]):
    """The samples of a tar in order. Held as a few arrays, so that millions stay small and forks share them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        keys = [sample.key.encode() for sample in samples]
        members = [item for sample in samples for item in sample.members.items()]
        self._extensions = tuple(sorted({extension for extension, _ in members}))
        code = {extension: i for i, extension in enumerate(self._extensions)}
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)
        self._member_ends = np.cumsum([0, *(len(sample.members) for sample in samples)], dtype=np.int64)
        self._codes = np.array([code[extension] for extension, _ in members], dtype=np.uint32)
        self._places = np.array([storage for _, storage in members], dtype=np.int64).reshape(-1, 2)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What `of_arrays` makes these samples of; none holds objects."""
        return {
            "extensions": np.array(self._extensions, np.str_),
            "keys": np.frombuffer(self._keys, np.uint8),
            "key_ends": self._key_ends,
            "member_ends": self._member_ends,
            "codes": self._codes,
            "places": self._places,
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Samples:
        """Raises KeyError where one is missing."""
        samples = cls([])
        samples._extensions, samples._keys = tuple(arrays["extensions"].tolist()), arrays["keys"].tobytes()
        samples._key_ends, samples._member_ends = arrays["key_ends"], arrays["member_ends"]
        samples._codes, samples._places = arrays["codes"], arrays["places"]
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
        members = {self._extensions[self._codes[i]]: Member(*self._places[i].tolist()) for i in range(start, end)}
        return Sample(self.key(ordinal), members)

    def key(self, ordinal: int) -> str:
        """The key of a sample, by itself: what a join asks for at every row."""
        return self._keys[self._key_ends[ordinal] : self._key_ends[ordinal + 1]].decode()


@dataclass(frozen=True, eq=False)
class TarIndex:
    """What the headers of one tar say.

    `location` is a path or an fsspec URL. `fingerprint` is a digest over the size of the tar and each member's name,
    place, size, time and header checksum: it survives a copy or a move and changes when a tar is packed or downloaded
    again. It does not read payloads. `ignored` counts members that belong to no sample (folders, hidden files,
    `__meta__` entries), as in webdataset.
    """

    location: str
    size: int
    fingerprint: str
    samples: Samples
    ignored: int

    @property
    def name(self) -> str:
        """The name of the file, without its folder."""
        return self.location.rpartition("/")[2]


def key_hash(key: str) -> int:
    """xxh3_64 of the key: what the cache stores beside each row."""
    return xxhash.xxh3_64_intdigest(key.encode())


def expand(patterns: Sequence[str | Path]) -> list[str]:
    """Tars named by paths or fsspec URLs, plain, as globs (`*`, `**`, `?`, `[..]`) or brace ranges (`{000..099}.tar`).

    Order: as the patterns are given, each glob sorted by name.

    Raises:
        ValueError: no patterns, one that matches nothing, a command (`pipe:`), or a file that is named twice.
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
            matches = glob_urls(part) if glob.has_magic(part) else [part]  # looked at when it is read
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
    """Read the headers of a tar once and check that its samples can be trusted. `file`: the tar, where it is open.

    A member `folder/name.ext` belongs to the sample `folder/name`: the key ends at the first dot of the last path
    component, the extension is lower-cased (webdataset's rule). Every sample has exactly one image member.

    Raises:
        BadTar: truncated (also at a member boundary: the end marker is missing), empty, compressed, two archives in one
            file, a repeated or scattered sample, a repeated member, no image or two in a sample, links or devices,
            absolute or `..` paths, an image or text over MAX_MEMBER_BYTES.
        OSError: the file cannot be read.
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
    return TarIndex(path, size, digest.hexdigest(), Samples(samples), ignored)


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
            f"{path} ({size} bytes): not a whole, plain tar: {error} after {len(infos)} members. "
            "Copy or download it again; a compressed tar must be unpacked (gunzip, unzstd) first."
        ) from error
    except UnicodeDecodeError as error:
        raise BadTar(f"{path}: name of member {len(infos)} is not UTF-8: {error}. Pack the tar again.") from error


def _check_end(path: str, file: BinaryIO, end: int, size: int) -> None:
    """tarfile stops without a word at a bad header and at the end of the file, so look at what it stopped at."""
    file.seek(end)
    marker = file.read(2 * HEADER)
    if len(marker) < 2 * HEADER:
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
        _check_member(path, info)
        key, extension = split_name(info.name)
        if not info.isreg() or not extension or re.match(r"__[^/]*__($|/)", info.name):
            ignored += 1
            continue
        if not samples or samples[-1].key != key:
            if key in seen:
                raise BadTar(
                    f"{path}: sample {key!r}: found again at member {info.name!r} after other samples, expected its "
                    "members side by side and its key once. Pack the tar sorted by name (tar --sort=name)."
                )
            _check_images(path, samples[-1:])
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
    _check_images(path, samples[-1:])
    return samples, ignored


def split_name(name: str) -> tuple[str, str]:
    """Webdataset's key and lower-cased extension of a member; the extension is empty where it belongs to no sample.

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


def _check_images(path: str, last: Sequence[Sample]) -> None:
    for sample in last:
        images = sorted(IMAGE_EXTENSIONS & sample.members.keys())
        if len(images) != 1:
            raise BadTar(
                f"{path}: sample {sample.key!r}: found members {sorted(sample.members)}, expected exactly one of "
                f"{sorted(IMAGE_EXTENSIONS)} (the extension is all that follows the first dot of the name)."
            )


def read_member(index: TarIndex, ordinal: int, extension: str) -> bytes:
    """The bytes of one image or text member, by random access.

    Raises:
        ValueError: an extension that is neither image nor text, or one that the sample lacks.
        BadTar: the tar has become shorter since it was indexed.
    """
    key, members = index.samples[ordinal]
    if extension not in IMAGE_EXTENSIONS | TEXT_EXTENSIONS:
        raise ValueError(f"{index.location}: sample {key!r}: .{extension} is neither image nor text and is never read")
    if extension not in members:
        raise ValueError(f"{index.location}: sample {key!r}: has no .{extension} member, only {sorted(members)}")
    offset, size = members[extension]
    storage, name = split_address(index.location)
    data = storage.read(name, offset, offset + size)
    if len(data) != size:
        raise BadTar(f"{index.location}: sample {key!r}: {len(data)} bytes where {size} were indexed: {CHANGED}")
    return data


class _Digesting:
    """The read side of a file, hashing what passes."""

    def __init__(self, file: BinaryIO, digest: xxhash.xxh3_128) -> None:
        self._file, self._digest = file, digest

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data


def stream(
    index: TarIndex, digest: xxhash.xxh3_128 | None = None, file: BinaryIO | None = None
) -> Iterator[tuple[int, str, bytes]]:
    """Stream a tar through webdataset's own expander and grouper: (ordinal, key, image bytes), undecoded.

    Each key, and the size of each image, is compared with the index. `digest` is fed every byte of the tar, and holds
    the hash of the whole file once the iterator is exhausted. `file`: the tar, where it is open, at its beginning.

    Raises:
        BadTar: the stream and the index disagree, or the tar ends early.
    """
    with open_object(index.location) if file is None else contextlib.nullcontext(file) as file:
        hashed = _Digesting(file, digest if digest is not None else xxhash.xxh3_128())
        for ordinal, members in _grouped(index, hashed, 0, IMAGE_EXTENSIONS):
            sample = index.samples[ordinal]
            yield ordinal, sample.key, members[sample.image]
        while hashed.read(1 << 20):
            pass


def stream_samples(index: TarIndex, first: int = 0) -> Generator[tuple[int, dict[str, bytes]], None, None]:
    """Stream the samples of a tar from ordinal `first` on, as `stream` does: (ordinal, image and text members).

    Nothing before the first sample is read.

    Raises:
        BadTar: the stream and the index disagree, or the tar ends early.
    """
    with open_object(index.location) as file:
        if first:
            ends = (offset + size for offset, size in index.samples[first - 1].members.values())
            file.seek(-(-max(ends) // HEADER) * HEADER)
        yield from _grouped(index, file, first, IMAGE_EXTENSIONS | TEXT_EXTENSIONS)


def _grouped(
    index: TarIndex, file: BinaryIO | _Digesting, first: int, extensions: frozenset[str]
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Samples with their members of these extensions, checked; `file` stands where sample `first` begins."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    ordinal = first
    files = tar_file_expander(
        [{"url": index.location, "stream": file}], select_files=lambda name: split_name(name)[1] in extensions
    )
    try:
        for found in group_by_keys(files):
            expected = index.samples[ordinal] if ordinal < len(index.samples) else None
            if expected is None or found["__key__"] != expected.key or expected.image not in found:
                name = expected.key if expected else "nothing"
                raise BadTar(
                    f"{index.location}: streamed {found['__key__']!r} as sample {ordinal}, indexed {name!r}: {CHANGED}"
                )
            members = {extension: found[extension] for extension in extensions & found.keys()}
            if any(len(data) != expected.members[extension].size for extension, data in members.items()):
                raise BadTar(f"{index.location}: sample {expected.key!r} has another size than indexed: {CHANGED}")
            yield ordinal, members
            ordinal += 1
    except tarfile.TarError as error:
        raise BadTar(f"{index.location}: ends early after {ordinal} samples: {error.args[0]}: {CHANGED}") from error
    if ordinal != len(index.samples):
        raise BadTar(f"{index.location}: {ordinal} samples streamed, {len(index.samples)} indexed: {CHANGED}")
