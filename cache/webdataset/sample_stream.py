"""The checked stream of a tar's samples: webdataset's reader, compared with the index on the way."""

import contextlib
import tarfile
from collections.abc import Collection, Generator, Iterator
from functools import partial
from typing import Any, BinaryIO

import xxhash

from threetowers.cache.storage.object_file import open_object
from threetowers.cache.storage.storage import is_url
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample import Annotation, ReadMember, read_annotation
from threetowers.cache.webdataset.sample_list import TEXT_EXTENSIONS
from threetowers.cache.webdataset.tar_headers import TAR_BLOCK, BadTar
from threetowers.cache.webdataset.tar_index import CHANGED, TarIndex, read_member, read_member_of, split_name


def stream_images(
    index: TarIndex, digest: xxhash.xxh3_128 | None = None, file: BinaryIO | None = None
) -> Iterator[tuple[int, str, bytes]]:
    """Stream the images of a tar through webdataset's expander and grouper: (ordinal, key, undecoded bytes).

    Each key, and the size of each image, is compared with the index. Samples without a usable image are passed over.

    Args:
        index: Index of the tar.
        digest: Updated with every byte of the tar; holds the hash of the file once the iterator is exhausted.
        file: The tar, if it is open already, at its beginning.

    Raises:
        BadTar: The stream and the index disagree, or the tar ends early.
    """
    with open_object(index.location) if file is None else contextlib.nullcontext(file) as file:
        for ordinal, members in stream_all(index, file, digest if digest is not None else xxhash.xxh3_128(), ()):
            sample = index.samples[ordinal]
            if sample.image is not None and sample.defect is None:
                yield ordinal, sample.key, members[sample.image]


def stream_all(
    index: TarIndex, file: BinaryIO, digest: xxhash.xxh3_128, extensions: Collection[str]
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Stream every sample of an open tar: (ordinal, members by extension), checked as by `stream_images`.

    Args:
        index: Index of the tar.
        file: The tar, at its beginning.
        digest: Updated with every byte of the tar; holds the hash of the file once the iterator is exhausted.
        extensions: Of the members beside images, as far as they can be read.

    Raises:
        BadTar: The stream and the index disagree, or the tar ends early.
    """
    hashed = _HashingReader(file, digest)
    yield from _grouped(index, hashed, 0, index.samples.image_extensions | set(extensions))
    while hashed.read(1 << 20):  # the end marker and the padding belong to the hash
        pass


def stream_samples(
    index: TarIndex, first: int = 0, extensions: Collection[str] = TEXT_EXTENSIONS
) -> Generator[tuple[int, dict[str, bytes]], None, None]:
    """Stream the samples of a tar from ordinal `first` on: (ordinal, members by extension).

    The members are images, and those of the `extensions`, as far as they can be read. Checked as by `stream_images`.
    Nothing before the first sample is read.

    Raises:
        BadTar: The stream and the index disagree, or the tar ends early.
    """
    with open_object(index.location) as file:
        file.seek(-(-index.samples.start(first) // TAR_BLOCK) * TAR_BLOCK)
        yield from _grouped(index, file, first, index.samples.image_extensions | set(extensions))


def stream_annotations(index: TarIndex, captions: CaptionFormat) -> Generator[tuple[int, Annotation], None, None]:
    """Stream the captions and fields of a tar's samples: (ordinal, annotation), also of those without a caption.

    Raises:
        BadTar: As for `stream_texts`.
    """
    for ordinal, read in stream_texts(index, captions.extensions):
        yield ordinal, read_annotation(index, ordinal, read, captions=captions, captions_required=False)


def stream_texts(index: TarIndex, extensions: Collection[str]) -> Generator[tuple[int, ReadMember], None, None]:
    """Stream the text members of a tar's samples: (ordinal, what reads one of them by its extension).

    Of a local tar only the members that are asked for are read, by their place in the index. A remote one is read from
    end to end, because that takes a few requests in place of one a member.

    Args:
        index: Index of the tar.
        extensions: Of the members that may be asked for, before the next sample is.

    Raises:
        BadTar: A local tar is shorter than when it was indexed; for a remote one as for `stream_samples`.
    """
    if is_url(index.location):
        for ordinal, members in stream_samples(index, extensions=extensions):
            yield ordinal, members.__getitem__
        return
    with open(index.location, "rb", buffering=0) as file:
        for ordinal in range(len(index.samples)):
            yield ordinal, partial(read_member_of, file, index, ordinal)


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

    apart = index.samples.apart()

    def select(name: str) -> bool:
        key, extension = split_name(name)
        return extension in extensions and (key, extension) not in apart

    streamed = group_by_keys(tar_file_expander([{"url": index.location, "stream": file}], select_files=select))
    try:
        for ordinal in range(first, len(index.samples)):
            sample = index.samples[ordinal]
            wanted = sample.members.keys() & extensions
            expected = {extension for extension in wanted if (sample.key, extension) not in apart}
            members: dict[str, bytes] = {}
            if expected:
                found: dict[str, Any] = next(streamed, {"__key__": "nothing"})
                if found["__key__"] != sample.key or not expected <= found.keys():
                    raise BadTar(
                        f"{index.location}: streamed {found['__key__']!r} as sample {ordinal}, indexed {sample.key!r}: "
                        f"{CHANGED}"
                    )
                members = {extension: found[extension] for extension in expected}
                if any(len(data) != sample.members[extension].size for extension, data in members.items()):
                    raise BadTar(f"{index.location}: sample {sample.key!r} has another size than indexed: {CHANGED}")
            for extension in wanted - expected:  # hard links; what cannot be read is named where it is needed
                with contextlib.suppress(BadSample):
                    members[extension] = read_member(index, ordinal, extension)
            yield ordinal, members
        if (extra := next(streamed, None)) is not None:
            raise BadTar(f"{index.location}: streamed {extra['__key__']!r} after the last sample indexed: {CHANGED}")
    except tarfile.TarError as error:
        raise BadTar(f"{index.location}: ends early: {error.args[0]}: {CHANGED}") from error
