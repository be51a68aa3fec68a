"""Reading tars: one after the other, ahead of their embedding, each image and each caption once for all caches."""

import contextlib
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

import xxhash

from threetowers.cache.builder.decode_workers import DecodeThreads
from threetowers.cache.builder.decoding import Decoded
from threetowers.cache.builder.embedding.caption_embedder import CaptionEmbedder, TokenizedCaptions
from threetowers.cache.builder.embedding.image_embedder import ImageEmbedder
from threetowers.cache.builder.embedding.tar_captions import TarCaptions
from threetowers.cache.builder.output_cache import OutputCache
from threetowers.cache.builder.scheduler import WorkItem, WorkQueue
from threetowers.cache.processes.prefetch import prefetch
from threetowers.cache.storage.object_file import READ_BYTES, open_object
from threetowers.cache.storage.storage import is_url
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.sample_stream import stream_all
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar, read_member_of


@dataclass(frozen=True)
class TarStart:
    """Beginning of a tar in the stream of items."""

    work: WorkItem
    index: TarIndex


@dataclass(frozen=True)
class ReadImage:
    """An image of the current tar, being decoded."""

    ordinal: int
    decoding: Future[Decoded]


@dataclass(frozen=True)
class ReadCaptions:
    """The captions of the current tar, all at once, being made tokens."""

    captions: TokenizedCaptions


@dataclass(frozen=True)
class TarEnd:
    """End of a tar in the stream of items; its digest is empty where only its captions were read."""

    tar_xxh3_128: str


StreamItem = TarStart | ReadImage | ReadCaptions | TarEnd


@dataclass(frozen=True, eq=False)
class TarReader:
    """Reads the tars of a work queue, one after the other, and has their images decoded and their captions made tokens.

    Of a tar of which only the captions are wanted, nothing else is read. While a tar is read, the next one is leased
    and, if remote, fetched. Set `stopped` to end early.
    """

    paths: Sequence[str]
    outputs: Sequence[OutputCache]
    queue: WorkQueue
    images: ImageEmbedder
    captions: CaptionEmbedder
    caption_format: CaptionFormat
    decoding: DecodeThreads
    image_member: str | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def items(self) -> Iterator[StreamItem]:
        """Iterate over all samples. Raises BadTar if a tar is not the one of the tar table."""
        ahead: set[BinaryIO] = set()
        try:
            with contextlib.closing(prefetch(self._opened_tars(ahead), depth=1)) as opened:
                for work, file in opened:
                    ahead.remove(file)
                    with file:
                        yield from self._read(work, file)
        finally:
            for file in ahead:  # opened before an early end
                file.close()

    def _opened_tars(self, ahead: set[BinaryIO]) -> Iterator[tuple[WorkItem, BinaryIO]]:
        """Yield the tars of the queue, opened, and add them to `ahead`; wait where others lease all that is left."""
        while not self.stopped.is_set() and (work := self.queue.next()) is not None:
            if isinstance(work, WorkItem):
                file = self._open(self.paths[work.number])
                ahead.add(file)
                yield work, file
            else:
                self.stopped.wait(work)

    def _open(self, path: str) -> BinaryIO:
        """Open a tar; a remote one is copied to a nameless temporary file, by one read from end to end."""
        file = open_object(path)
        if not is_url(path):
            return file
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the caller
        with file:
            while not self.stopped.is_set() and (block := file.read(READ_BYTES)):
                copy.write(block)
        copy.seek(0)
        return copy

    def _read(self, work: WorkItem, file: BinaryIO) -> Iterator[StreamItem]:
        path = self.paths[work.number]
        outputs = [self.outputs[i] for i in work.caches]
        index = index_tar(path, file, self.image_member)
        if any(index.fingerprint != output.entries[work.number].fingerprint for output in outputs):
            raise BadTar(f"{path}: changed during the build: keep it unchanged and run the same command again")
        yield TarStart(work, index)
        of_text = [i for i in work.caches if self.outputs[i].manifest.of == "text"]
        captions = TarCaptions(index, self.caption_format) if of_text else None
        digest = ""
        if formats := self.images.formats_of(work.caches):
            digest = yield from self._read_images(index, file, formats, captions)
        elif captions:
            self._read_captions(index, file, captions)
        if captions:
            yield ReadCaptions(self.captions.tokenize(captions, of_text))
        yield TarEnd(digest)

    def _read_images(
        self, index: TarIndex, file: BinaryIO, formats: Sequence[int], captions: TarCaptions | None
    ) -> Generator[ReadImage, None, str]:
        """Read a tar from end to end: yield its images, collect its captions if wanted, return its digest."""
        digest = xxhash.xxh3_128()
        extensions = self.caption_format.extensions if captions else ()
        file.seek(0)
        for ordinal, members in stream_all(index, file, digest, extensions):
            sample = index.samples[ordinal]
            if sample.image is not None and sample.defect is None:
                yield ReadImage(ordinal, self.decoding.submit(formats, sample.key, members[sample.image]))
            if captions:
                captions.add(ordinal, members.__getitem__)
        return digest.hexdigest()

    def _read_captions(self, index: TarIndex, file: BinaryIO, captions: TarCaptions) -> None:
        """Read the text members of a tar alone."""
        for ordinal in range(len(index.samples)):
            if self.stopped.is_set():
                return
            captions.add(ordinal, partial(read_member_of, file, index, ordinal))
