"""The headers of a tar: that it is complete, and where the bytes of each member lie."""

import os
import tarfile
from typing import BinaryIO, NamedTuple

MAX_PADDING = 1 << 20  # zeros after the end marker: tar pads to its record size, 10 KiB by default
TAR_BLOCK = 512  # of the tar format: headers and payloads begin at its multiples
VOLUME_LABEL = b"V"  # type of the header by which GNU tar names an archive


class BadTar(ValueError):
    """A tar that cannot be trusted to pair keys, images and rows. The message names file, sample and remedy."""


class Member(NamedTuple):
    """The byte range of one tar member: its offset from the start of the tar, and its size."""

    offset: int
    size: int


NOT_A_FILE = Member(-1, 0)  # a symbolic link, device or sparse file: it has no bytes of its own in one piece


def read_tar_headers(path: str, file: BinaryIO) -> list[tarfile.TarInfo]:
    """Return the headers of all members of an open tar, from its beginning to its end marker.

    Raises:
        BadTar: The tar is truncated (also at a member boundary, where the end marker is missing), compressed, damaged,
            or two archives in one file; or a name is absolute or has a `..`.
        OSError: The file cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    infos: list[tarfile.TarInfo] = []
    try:
        # Only the names of samples have to be UTF-8, not those of owners and groups.
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive:
            while (info := archive.next()) is not None:
                infos.append(info)
                end = archive.offset if info.issparse() else info.offset_data + info.size
                if end > size:
                    raise BadTar(
                        f"{path}: truncated in member {info.name!r}: it ends at byte {end}, the file has {size}. Copy "
                        "or download the tar again."
                    )
            end = archive.offset
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise BadTar(
            f"{path} ({size} bytes): not a complete, plain tar: {error} after {len(infos)} members. "
            "Copy or download it again; a compressed tar must be unpacked (gunzip, unzstd) first."
        ) from error
    _check_end(path, file, end, size)
    for info in infos:
        if info.type != VOLUME_LABEL and (info.name.startswith("/") or ".." in info.name.split("/")):
            raise BadTar(
                f"{path}: member {info.name!r} leaves the archive, expected a relative path without '..'. Pack the "
                "tar again, without -P."
            )
    return infos


def _check_end(path: str, file: BinaryIO, end: int, size: int) -> None:
    """Check the end marker: tarfile stops silently at a bad header and at the end of a truncated file.

    The marker is two blocks of zeros. One is enough to know that the last member is complete; GNU tar reads that, too.
    """
    file.seek(end)
    marker = file.read(2 * TAR_BLOCK)
    if len(marker) < TAR_BLOCK:
        raise BadTar(
            f"{path}: truncated: no end-of-archive marker at byte {end} of {size}. Copy or download it again. If it is "
            f"known to hold all its samples, add the marker: truncate -s +{2 * TAR_BLOCK} FILE"
        )
    if any(marker):
        raise BadTar(
            f"{path}: corrupt: neither a member nor the end-of-archive marker at byte {end}. Download it again."
        )
    if size - end > MAX_PADDING or any(file.read()):
        raise BadTar(
            f"{path}: {size - end} bytes follow the end marker at byte {end} and would be ignored: were tars "
            "joined by cat? Join them with `tar --concatenate`, or keep them apart."
        )


def locate_members(infos: list[tarfile.TarInfo]) -> list[Member]:
    """Return where the bytes of each member lie: for a hard link those of the earlier member that it names."""
    found: list[Member] = []
    has_links = any(info.islnk() for info in infos)
    by_name: dict[str, Member] = {}
    for info in infos:
        member = NOT_A_FILE
        if info.isreg() and not info.issparse():
            member = Member(info.offset_data, info.size)
        elif info.islnk():
            member = by_name.get(info.linkname, NOT_A_FILE)
        found.append(member)
        if has_links:
            by_name[info.name] = member
    return found
