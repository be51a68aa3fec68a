"""From tars to stored rows: read and decode ahead, embed in batches, write each tar while the next one is embedded.

An image is decoded once for all caches that are built together. Batches never cross tars, so that the rows of a tar do
not depend on what else is built beside it.
"""

import contextlib
import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import xxhash

from threetowers.cache.builder.decode_workers import DecodeThreads
from threetowers.cache.builder.decoding import Decoded, PixelFormat
from threetowers.cache.builder.leases import Leases
from threetowers.cache.builder.row_buffer import Provenance, RowBuffer
from threetowers.cache.builder.scheduler import WorkItem, WorkQueue
from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder
from threetowers.cache.encoders.forward_queue import ForwardQueue, RunningBatch
from threetowers.cache.format.done_record import DoneRecord, done_record_name
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Manifest, to_json
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.format.views import Params, Pixels
from threetowers.cache.processes.prefetch import prefetch
from threetowers.cache.storage.object_file import READ_BYTES, open_object
from threetowers.cache.storage.storage import Storage, is_url
from threetowers.cache.webdataset.images import BadImage
from threetowers.cache.webdataset.sample_stream import stream_images
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class OutputCache:
    """One of the caches that are built together. `entries[i]` is tar i of the list in the cache's tar table."""

    storage: Storage
    manifest: Manifest
    teacher: FrozenEncoder
    leases: Leases
    entries: Sequence[TarEntry]
    min_cosine: float | None = None

    @property
    def encoder(self) -> ImageEncoder:
        """The side of the teacher that embeds images."""
        return self.teacher.side("image")

    @property
    def pixel_format(self) -> PixelFormat:
        """How it takes its pixels."""
        views = self.manifest.views
        preprocessing = self.encoder.preprocessing
        min_side = None if views.cropped else self.encoder.min_side  # a crop may need every pixel
        return PixelFormat(
            views, self.encoder.transform, preprocessing.input_size, preprocessing.interpolation, min_side
        )


@dataclass(frozen=True)
class _TarStart:
    """Beginning of a tar in the stream of items."""

    work: WorkItem
    index: TarIndex


@dataclass(frozen=True)
class _Image:
    """An image of the current tar, and for which of its caches it is decoded."""

    ordinal: int
    decoding: Future[Decoded]


@dataclass(frozen=True)
class _TarEnd:
    """End of a tar in the stream of items."""

    tar_xxh3_128: str


StreamItem = _TarStart | _Image | _TarEnd


@dataclass(frozen=True, eq=False)
class TarReader:
    """Reads the tars of a work queue, one after the other, and has their images decoded.

    While a tar is read, the next one is leased and, if remote, fetched. Set `stopped` to end early.
    """

    paths: Sequence[str]
    outputs: Sequence[OutputCache]
    queue: WorkQueue
    decoding: DecodeThreads
    image_member: str | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def items(self) -> Iterator[StreamItem]:
        """Iterate over all samples. Raises BadTar if a tar is not the one of the tar table."""
        with contextlib.closing(prefetch(self._opened_tars(), depth=1)) as opened:
            for work, file in opened:
                with file:
                    yield from self._read(work, file)

    def _opened_tars(self) -> Iterator[tuple[WorkItem, BinaryIO]]:
        """Yield the tars of the queue, opened; wait where all that are left are leased by others."""
        while not self.stopped.is_set() and (work := self.queue.next()) is not None:
            if isinstance(work, WorkItem):
                yield work, self._open(self.paths[work.number])
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
        yield _TarStart(work, index)
        digest = xxhash.xxh3_128()
        file.seek(0)
        for ordinal, key, data in stream_images(index, digest, file):
            yield _Image(ordinal, self.decoding.submit(work.caches, key, data))
        yield _TarEnd(digest.hexdigest())


class StageTimer:
    """The time of the embedding thread by stage: the forward pass, or waiting for another stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("read", "decode", "forward", "write"), 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time inside the context to a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - started

    def shares(self) -> dict[str, float]:
        """Return the share of each stage, largest first; the first is the bottleneck."""
        total = sum(self.seconds.values()) or 1.0
        return {name: seconds / total for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])}


@dataclass(frozen=True)
class WrittenTar:
    """A tar that is complete in cache number `cache`; `record` is None where another worker wrote it."""

    cache: int
    entry: TarEntry
    record: DoneRecord | None


@dataclass(eq=False)
class _OpenTar:
    """The tar that is being embedded: rows for each cache that lacks it, and its batches.

    `batch` is being filled; `running` are the ordinals of the one before it, and its forward passes for each cache.
    """

    work: WorkItem
    buffers: list[RowBuffer]
    started: float
    batch: list[tuple[int, list[tuple[Pixels, Params]]]] = field(default_factory=list)
    running: tuple[list[int], list[RunningBatch]] | None = None


@dataclass(eq=False)
class Embedder:
    """Embeds the items of a TarReader and writes the rows of each tar."""

    outputs: Sequence[OutputCache]
    batch_size: int
    on_bad: str
    timer: StageTimer = field(default_factory=StageTimer)

    def __post_init__(self) -> None:
        """Allocate the memory of batches."""
        self._queues = [
            ForwardQueue(output.encoder, output.manifest.feature, output.manifest.views.count, self.batch_size)
            for output in self.outputs
        ]

    def run(self, items: Iterable[StreamItem], advance: Callable[[int], object]) -> Iterator[WrittenTar]:
        """Embed tar after tar; yield each as it is written. Calls `advance` with the number of samples done."""
        writing: deque[Future[WrittenTar]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            for item in self._timed(items):
                match item:
                    case _TarStart(work, index):
                        outputs = [self.outputs[i] for i in work.caches]
                        buffers = [RowBuffer(index, output.manifest, output.min_cosine) for output in outputs]
                        tar = _OpenTar(work, buffers, time.monotonic())
                        advance(max(rows.reject_defects() for rows in buffers))
                        self._check_bad(tar)
                    case _Image(ordinal, decoding):
                        advance(self._add_image(tar, ordinal, decoding))
                    case _TarEnd(tar_xxh3_128):
                        advance(self._start_batch(tar))
                        advance(self._store_batch(tar))  # now: others may be waiting for this tar, with the next one
                        seconds = time.monotonic() - tar.started
                        for cache, rows in zip(tar.work.caches, tar.buffers, strict=True):
                            arguments = (cache, tar.work.number, rows, tar_xxh3_128, seconds)
                            writing.append(writer.submit(self._write, *arguments))
                        while len(writing) > len(self.outputs):  # one tar is written while the next is embedded
                            yield self._wait_for_write(writing)
            while writing:
                yield self._wait_for_write(writing)

    def _timed(self, items: Iterable[StreamItem]) -> Iterator[StreamItem]:
        source = iter(items)
        while True:
            with self.timer("read"):
                item = next(source, None)
            if item is None:
                return
            yield item

    def _wait_for_write(self, writing: deque[Future[WrittenTar]]) -> WrittenTar:
        with self.timer("write"):
            return writing.popleft().result()

    def _add_image(self, tar: _OpenTar, ordinal: int, decoding: Future[Decoded]) -> int:
        """Add an image to the batch, and start the batch if it is full; return how many samples are done by that."""
        with self.timer("decode"):
            image = decoding.result()
        if isinstance(image.views, BadImage):
            for rows in tar.buffers:
                rows.set_image(ordinal, image.image_hash)
                rows.reject(ordinal, RowStatus.of(image.views.defect), str(image.views))
            self._check_bad(tar)
            return 1
        for rows, (_, params) in zip(tar.buffers, image.views, strict=True):
            rows.set_image(ordinal, image.image_hash, params)
            rows.notes.update(image.notes)
        tar.batch.append((ordinal, image.views))
        return self._start_batch(tar) if len(tar.batch) == self.batch_size else 0

    def _start_batch(self, tar: _OpenTar) -> int:
        """Start the forward passes of the batch, store the rows of the one before meanwhile; return their number."""
        if not tar.batch:
            return 0
        with self.timer("forward"):
            passes = [
                self._queues[cache].start([views[i][0] for _, views in tar.batch])
                for i, cache in enumerate(tar.work.caches)
            ]
        started = [ordinal for ordinal, _ in tar.batch], passes
        tar.batch.clear()
        stored = self._store_batch(tar)
        tar.running = started
        return stored

    def _store_batch(self, tar: _OpenTar) -> int:
        """Wait for the forward passes that run, and store their rows; return how many samples these are."""
        if tar.running is None:
            return 0
        ordinals, passes = tar.running
        tar.running = None
        with self.timer("forward"):
            for rows, running in zip(tar.buffers, passes, strict=True):
                rows.set_embeddings(ordinals, running.result())
        self._check_bad(tar)
        return len(ordinals)

    def _check_bad(self, tar: _OpenTar) -> None:
        for rows in tar.buffers:
            if self.on_bad == "error" and rows.bad:
                bad = rows.bad[0]
                raise BadImage(
                    f"{rows.index.location}: sample {bad.key!r} (ordinal {bad.ordinal}): {bad.reason}. Remove it, or "
                    "continue without it (--on-bad skip)"
                )

    def _write(self, cache: int, number: int, rows: RowBuffer, tar_xxh3_128: str, seconds: float) -> WrittenTar:
        """Write the rows of a tar, then its done record, unless another worker took the tar over."""
        output = self.outputs[cache]
        entry = output.entries[number]
        rows.check_complete()
        if not output.leases.confirm(entry.id):
            logger.warning("%s: tar %s was taken over by another worker, skipped here", output.storage, entry.path)
            return WrittenTar(cache, entry, None)
        provenance = Provenance("teacher", self.batch_size, output.encoder.device.type, seconds, output.encoder.runtime)
        record = rows.write(output.storage, entry, tar_xxh3_128, provenance)
        output.storage.remove_partial(str(entry.id))
        output.storage.put(done_record_name(entry.id), to_json(record), owner=f"{entry.id}.done")
        output.leases.release(entry.id)
        return WrittenTar(cache, entry, record)
