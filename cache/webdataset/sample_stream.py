"""The checked stream of a tar's samples: webdataset's reader, compared with the index on the way."""

import contextlib
import tarfile
from collections.abc import Collection, Generator, Iterator
from typing import BinaryIO

import xxhash

from threetowers.cache.storage.object_file import open_object
from threetowers.cache.webdataset.tar_index import (
    CHANGED,
    IMAGE_EXTENSIONS,
    TAR_BLOCK,
    TEXT_EXTENSIONS,
    BadTar,
    TarIndex,
    split_name,
)


def stream_images(
    index: TarIndex, digest: xxhash.xxh3_128 | None = None, file: BinaryIO | None = None
) -> Iterator[tuple[int, str, bytes]]:
    """Stream the images of a tar through webdataset's expander and grouper: (ordinal, key, undecoded bytes).

    Each key, and the size of each image, is compared with the index.

    Args:
        index: Index of the tar.
        digest: Updated with every byte of the tar; holds the hash of the file once the iterator is exhausted.
        file: The tar, if it is open already, at its beginning.

    Raises:
        BadTar: The stream and the index disagree, or the tar ends early.
    """
    with open_object(index.location) if file is None else contextlib.nullcontext(file) as file:
        hashed = _HashingReader(file, digest if digest is not None else xxhash.xxh3_128())
        for ordinal, members in _grouped(index, hashed, 0, IMAGE_EXTENSIONS):
            sample = index.samples[ordinal]
            yield ordinal, sample.key, members[sample.image]
        while hashed.read(1 << 20):  # the end marker and the padding belong to the hash
            pass


def stream_samples(
    index: TarIndex, first: int = 0, extensions: Collection[str] = TEXT_EXTENSIONS
) -> Generator[tuple[int, dict[str, bytes]], None, None]:
    """Stream the samples of a tar from ordinal `first` on: (ordinal, members by extension).

    The members are images, and those of the `extensions`. Checked as by `stream_images`. Nothing before the first
    sample is read.

    Raises:
        BadTar: The stream and the index disagree, or the tar ends early.
    """
    with open_object(index.location) as file:
        if first:
            end = max(member.offset + member.size for member in index.samples[first - 1].members.values())
            file.seek(-(-end // TAR_BLOCK) * TAR_BLOCK)
        yield from _grouped(index, file, first, IMAGE_EXTENSIONS | set(extensions))


class _HashingReader:
    """The read side of a file, hashing what passes."""

    def __init__(self, file: BinaryIO, digest: xxhash.xxh3_128) -> None:
        self._file = file
        self._digest = digest

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data


def _grouped(
    index: TarIndex, file: BinaryIO | _HashingReader, first: int, extensions: frozenset[str]
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Yield samples with their members of these extensions, checked; `file` is where sample `first` begins."""
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
