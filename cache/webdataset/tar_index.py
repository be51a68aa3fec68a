"""The index of a webdataset tar: its samples, and where each member lies.

A tar is indexed from its headers alone and refused when reading it could pair the wrong things: truncation, repeated or
scattered samples. What is wrong with one sample, such as no image, or two, is a defect of that sample. Payloads are
only ever decoded as images or text; whatever else a sample carries (`.npy`, `.pkl`, `.pth`, ...) is listed in the index
and never opened, but for labels in `.npy` members where an evaluation's data set asks for them.
"""

import contextlib
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from threetowers.cache.storage.object_file import open_object
from threetowers.cache.storage.storage import split_address
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample_list import (
    SampleList,
    describe_defect,
    describe_unreadable,
    members_text,
    unreadable,
)
from threetowers.cache.webdataset.tar_headers import (
    VOLUME_LABEL,
    BadTar,
    Member,
    locate_members,
    read_tar_headers,
)

CHANGED = "the tar has changed since it was indexed"


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of one tar, as its headers list them.

    `location` is a path or an fsspec URL. `fingerprint` is a digest over the size of the tar and each member's name,
    offset, size, time and header checksum: it survives a copy or a move and changes when a tar is packed or downloaded
    again. It does not cover payloads. `ignored` counts the members that belong to no sample, by the reason.
    """

    location: str
    size: int
    fingerprint: str
    samples: SampleList
    ignored: Mapping[str, int]

    @property
    def name(self) -> str:
        """The name of the file, without its folder."""
        return self.location.rpartition("/")[2]

    def describe(self, ordinal: int) -> str:
        """Return the tar and the key of a sample, for messages."""
        return f"{self.location}: sample {self.samples.key(ordinal)!r}"

    def only(self, ordinal: int) -> "TarIndex":
        """Return the index with one sample alone, which is then at ordinal 0."""
        sample = self.samples[ordinal]
        samples = SampleList([(sample.key, sample.members)], self.samples.image_member)
        return TarIndex(self.location, self.size, self.fingerprint, samples, {})

    def describe_defect(self, ordinal: int) -> str:
        """Return what is wrong with the image of a sample, without tar and key."""
        return describe_defect(self.samples[ordinal], self.samples.image_member)

    def left_aside(self, others: Collection[str] = ()) -> Counter[str]:
        """Count the members that nothing reads, by the reason: they belong to no sample, or are no image or text of it.

        Members with an extension among `others` are read.
        """
        counts = Counter(self.ignored)
        counts.update({f"{kind} in samples": count for kind, count in self.samples.unread(others).items()})
        return counts


def key_hash(key: str) -> int:
    """Return the xxh3_64 of a key, which a cache stores beside each row."""
    return xxhash.xxh3_64_intdigest(key.encode())


def index_tar(path: Path | str, file: BinaryIO | None = None, image_member: str | None = None) -> TarIndex:
    """Read the headers of a tar once and check that its samples can be trusted.

    A member `folder/name.ext` belongs to the sample `folder/name`: the key ends at the first dot of the last path
    component, the extension is lower-cased (webdataset's rule). A tar may hold no samples.

    Args:
        path: Path or URL of the tar.
        file: The tar, if it is open already.
        image_member: The extension of the member that is the image of a sample, as `jpg` or `left.jpg`; None: the only
            one that has the extension of an image.

    Raises:
        BadTar: The tar is truncated (also at a member boundary, where the end marker is missing), compressed, or two
            archives in one file; it repeats or scatters a sample, or repeats a member; it holds absolute or `..` paths,
            or a key that is not UTF-8.
        OSError: The file cannot be read.
    """
    path = str(path)
    with open_object(path) if file is None else contextlib.nullcontext(file) as file:
        infos = read_tar_headers(path, file)
        size = file.seek(0, 2)
    samples, ignored = _group(path, infos)
    digest = xxhash.xxh3_128(f"tar index 1: {size}\n".encode())
    for info in infos:
        line = f"{info.name}\0{info.offset_data} {info.size} {info.mtime} {info.chksum}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return TarIndex(path, size, digest.hexdigest(), SampleList(samples, image_member), ignored)


def _group(path: str, infos: list[tarfile.TarInfo]) -> tuple[list[tuple[str, dict[str, Member]]], Counter[str]]:
    """Return the samples, key and members each, and the number of the other members by the reason."""
    samples: list[tuple[str, dict[str, Member]]] = []
    seen: set[str] = set()
    ignored: Counter[str] = Counter()
    for info, member in zip(infos, locate_members(infos), strict=True):
        # What belongs to no sample, as in webdataset
        key, extension = split_name(info.name)
        if reason := _ignored(info, extension):
            ignored[reason] += 1
            continue
        # The first member of the next sample
        if not samples or samples[-1][0] != key:
            if key in seen:
                raise BadTar(
                    f"{path}: sample {key!r}: found again at member {info.name!r} after other samples, expected its "
                    "members side by side and its key once. Pack the tar sorted by name (tar --sort=name)."
                )
            seen.add(key)
            samples.append((key, {}))
        members = samples[-1][1]
        if extension in members:
            raise BadTar(f"{path}: sample {key!r}: found two members .{extension}, expected one. Pack the tar again.")
        if not info.name.isascii():
            _check_utf8(path, info.name)
        members[extension] = member
    return samples, ignored


def _ignored(info: tarfile.TarInfo, extension: str) -> str:
    """Return why a member belongs to no sample; empty where it belongs to one."""
    if info.isdir():
        return "folders"
    if info.type == VOLUME_LABEL:
        return "volume labels"
    if re.match(r"__[^/]*__($|/)", info.name):
        return "__meta__ members"
    if not extension:
        return "hidden files" if info.name.rpartition("/")[2].startswith(".") else "files without an extension"
    return ""


def _check_utf8(path: str, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raw = name.encode("utf-8", "surrogateescape")
        raise BadTar(
            f"{path}: the name of member {raw!r} is not UTF-8, as keys have to be. Rename the files (convmv -t utf8), "
            "or pack the tar again under a UTF-8 locale."
        ) from None


def split_name(name: str) -> tuple[str, str]:
    """Return webdataset's key and lower-cased extension of a member; no extension where it belongs to no sample.

    Hidden files belong to none, also inside a folder, where webdataset would make them members of a sample `folder/`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def read_member(index: TarIndex, ordinal: int, extension: str) -> bytes:
    """Return the bytes of one member, by random access.

    Raises:
        BadSample: The member is no plain file, or has more than MAX_MEMBER_BYTES.
        ValueError: The sample lacks it.
        BadTar: The tar is shorter than when it was indexed.
    """
    member = _readable(index, ordinal, extension)
    storage, name = split_address(index.location)
    data = storage.read(name, member.offset, member.offset + member.size)
    return _whole(index, ordinal, member, data)


def read_member_of(file: BinaryIO, index: TarIndex, ordinal: int, extension: str) -> bytes:
    """Return the bytes of one member of an open tar. Raises what `read_member` raises."""
    member = _readable(index, ordinal, extension)
    file.seek(member.offset)
    return _whole(index, ordinal, member, file.read(member.size))


def _readable(index: TarIndex, ordinal: int, extension: str) -> Member:
    members = index.samples[ordinal].members
    if extension not in members:
        raise ValueError(f"{index.describe(ordinal)}: has no .{extension} member, only {members_text(members)}")
    member = members[extension]
    if defect := unreadable(member):
        raise BadSample(f"{index.describe(ordinal)}: {describe_unreadable(extension, member)}", defect)
    return member


def _whole(index: TarIndex, ordinal: int, member: Member, data: bytes) -> bytes:
    if len(data) != member.size:
        raise BadTar(f"{index.describe(ordinal)}: found {len(data)} bytes, expected {member.size}: {CHANGED}")
    return data
