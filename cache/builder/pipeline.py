"""From tars to finished slots: read and decode ahead, embed in batches, write each tar whole beside the next one.

A picture is decoded once for all caches that are built together. Batches never cross tars, so that the rows of a tar do
not depend on what else is built beside it.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from threetowers.cache.builder.leases import Claims
from threetowers.cache.builder.row_buffer import Made, Rows
from threetowers.cache.builder.scheduler import Assignment, Work
from threetowers.cache.encoders.teacher import Teacher
from threetowers.cache.format.done_record import DoneRecord, done_record_name
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Manifest, to_json
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.format.views import Params
from threetowers.cache.prefetch import prefetch
from threetowers.cache.storage.object_file import READ_BYTES, open_object
from threetowers.cache.storage.storage import Storage, is_url
from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.sample_stream import stream_images
from threetowers.cache.webdataset.tar_index import BadTar, TarIndex, index_tar, key_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Target:
    """One of the caches that are built together. `entries[i]` is tar i of the list, as the cache's table has it."""

    storage: Storage
    manifest: Manifest
    teacher: Teacher
    claims: Claims
    entries: Sequence[TarEntry]
    min_cosine: float | None = None


@dataclass(frozen=True)
class _Begin:
    work: Work
    index: TarIndex


@dataclass(frozen=True)
class _Prepared:
    """What became of the bytes of one image: for each target the pixels of its views (V, 3, H, W) and their boxes."""

    image_hash: int
    views: list[tuple[Tensor, Params]] | BadImage


@dataclass(frozen=True)
class _Image:
    ordinal: int
    prepared: Future[_Prepared]


@dataclass(frozen=True)
class _End:
    tar_xxh3_128: str


Item = _Begin | _Image | _End


@dataclass(frozen=True, eq=False)
class Source:
    """The samples of the tars that this worker is assigned, tar after tar, each image being decoded by a pool.

    The next tar is claimed, and fetched where it is remote, while one is read. Set `stopped` to end early.
    """

    paths: Sequence[str]
    targets: Sequence[Target]
    assignment: Assignment
    pool: ThreadPoolExecutor
    stopped: threading.Event = field(default_factory=threading.Event)

    def items(self) -> Iterator[Item]:
        """Iterate over all samples. Raises BadTar where a tar is not the one of the table."""
        with contextlib.closing(prefetch(self._fetched(), depth=1)) as fetched:
            for work, file in fetched:
                with file:
                    yield from self._tar(work, file)

    def _fetched(self) -> Iterator[tuple[Work, BinaryIO]]:
        while not self.stopped.is_set() and (work := self.assignment.next()) is not None:
            if isinstance(work, Work):
                yield work, self._opened(self.paths[work.number])
            else:
                self.stopped.wait(work)

    def _opened(self, path: str) -> BinaryIO:
        """The tar; where it is remote a nameless copy in the folder for temporary files, read once from end to end."""
        file = open_object(path)
        if not is_url(path):
            return file
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed by who reads it
        with file:
            while not self.stopped.is_set() and (block := file.read(READ_BYTES)):
                copy.write(block)
        copy.seek(0)
        return copy

    def _tar(self, work: Work, file: BinaryIO) -> Iterator[Item]:
        path, targets = self.paths[work.number], [self.targets[i] for i in work.ledgers]
        index = index_tar(path, file)
        if any(index.fingerprint != target.entries[work.number].fingerprint for target in targets):
            raise BadTar(
                f"{path}: changed while the cache was being built: keep it still and run the same command again"
            )
        yield _Begin(work, index)
        digest, prepare = xxhash.xxh3_128(), partial(_prepare, targets)
        file.seek(0)
        for ordinal, key, data in stream_images(index, digest, file):
            yield _Image(ordinal, self.pool.submit(prepare, key, data))
        yield _End(digest.hexdigest())


def _prepare(targets: Sequence[Target], key: str, data: bytes) -> _Prepared:
    image_hash = xxhash.xxh3_64_intdigest(data)
    views = []
    try:
        decoded = {side: decode_rgb(data, min_side=side) for side in set(map(_min_side, targets))}
    except BadImage as error:
        return _Prepared(image_hash, error)
    for target in targets:
        how = target.manifest.preprocessing
        pixels, params = target.manifest.views.pixels(
            decoded[_min_side(target)],
            key_hash(key),
            target.teacher.transform,
            how.input_size,
            how.interpolation,
        )
        views.append((torch.from_numpy(pixels), params))
    return _Prepared(image_hash, views)


def _min_side(target: Target) -> int | None:
    return None if target.manifest.views.cropped else target.teacher.min_side  # a crop may need every pixel


class Stages:
    """Where the time of the embedding thread goes: into the forward pass, or into waiting for another stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("read", "decode", "forward", "write"), 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - began

    def shares(self) -> dict[str, float]:
        """The share of each stage, largest first; the first is the bottleneck."""
        total = sum(self.seconds.values()) or 1.0
        return {name: seconds / total for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])}


@dataclass(frozen=True)
class Finished:
    """A tar whose rows and record are in the cache of a target; `record` is None where another worker finished it."""

    target: int
    entry: TarEntry
    record: DoneRecord | None


@dataclass(eq=False)
class _Tar:
    """A tar that is being embedded: the rows for each cache that lacks it, and the batch that is being filled."""

    work: Work
    rows: list[Rows]
    began: float
    batch: list[tuple[int, list[tuple[Tensor, Params]]]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Job:
    """How the items of a tar become the files of its slots."""

    targets: Sequence[Target]
    batch_size: int
    on_bad: str
    stages: Stages = field(default_factory=Stages)

    def run(self, items: Iterable[Item], advanced: Callable[[int], object]) -> Iterator[Finished]:
        """Embed tar after tar; yields what is in place. `advanced` is told of samples done."""
        writing: deque[Future[Finished]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            for item in self._waited(items):
                match item:
                    case _Begin(work, index):
                        manifests = [(self.targets[i].manifest, self.targets[i].min_cosine) for i in work.ledgers]
                        tar = _Tar(work, [Rows(index, *binding) for binding in manifests], time.monotonic())
                    case _Image(ordinal, prepared):
                        advanced(self._image(tar, ordinal, prepared))
                    case _End(tar_xxh3_128):
                        advanced(self._embed(tar))
                        for target, rows in zip(tar.work.ledgers, tar.rows, strict=True):
                            seconds = time.monotonic() - tar.began
                            writing.append(
                                writer.submit(self._write, target, tar.work.number, rows, tar_xxh3_128, seconds)
                            )
                        while len(writing) > len(self.targets):  # one tar is written while the next is embedded
                            yield self._written(writing)
            while writing:
                yield self._written(writing)

    def _waited(self, items: Iterable[Item]) -> Iterator[Item]:
        source = iter(items)
        while True:
            with self.stages("read"):
                item = next(source, None)
            if item is None:
                return
            yield item

    def _written(self, writing: deque[Future[Finished]]) -> Finished:
        with self.stages("write"):
            return writing.popleft().result()

    def _image(self, tar: _Tar, ordinal: int, waiting: Future[_Prepared]) -> int:
        """Take up one image; returns the number of samples that are done by it."""
        with self.stages("decode"):
            image = waiting.result()
        if isinstance(image.views, BadImage):
            for rows in tar.rows:
                rows.note(ordinal, image.image_hash)
                rows.reject(ordinal, RowStatus.UNDECODABLE, str(image.views))
            self._check_bad(tar)
            return 1
        for rows, (_, params) in zip(tar.rows, image.views, strict=True):
            rows.note(ordinal, image.image_hash, params)
        tar.batch.append((ordinal, image.views))
        return self._embed(tar) if len(tar.batch) == self.batch_size else 0

    def _embed(self, tar: _Tar) -> int:
        """Embed and empty the batch; returns its size."""
        ordinals = [ordinal for ordinal, _ in tar.batch]
        if not ordinals:
            return 0
        with self.stages("forward"):
            for i, (number, rows) in enumerate(zip(tar.work.ledgers, tar.rows, strict=True)):
                pixels_bV3HW = torch.stack([views[i][0] for _, views in tar.batch])
                embed = self.targets[number].teacher.embed
                features_VbD = [embed(pixels_bV3HW[:, view]) for view in range(pixels_bV3HW.shape[1])]
                rows.put(ordinals, torch.stack(features_VbD, dim=1).numpy())
        tar.batch.clear()
        self._check_bad(tar)
        return len(ordinals)

    def _check_bad(self, tar: _Tar) -> None:
        for rows in tar.rows:
            if self.on_bad == "error" and rows.bad:
                bad = rows.bad[0]
                raise BadImage(
                    f"{rows.index.location}: sample {bad.key!r} (ordinal {bad.ordinal}): {bad.reason}. Remove it, or "
                    "let on_bad be 'record' to go on without it"
                )

    def _write(self, number: int, tar: int, rows: Rows, tar_xxh3_128: str, seconds: float) -> Finished:
        target = self.targets[number]
        entry = target.entries[tar]
        rows.check_complete()
        if not target.claims.holds(entry.id):
            logger.warning("%s: tar %s was taken over by another worker: left to it", target.storage, entry.path)
            return Finished(number, entry, None)
        made = Made("teacher", self.batch_size, target.teacher.device.type, seconds)
        record = rows.write(target.storage, entry, tar_xxh3_128, made)
        target.storage.remove_partial(str(entry.id))
        target.storage.put(done_record_name(entry.id), to_json(record), owner=f"{entry.id}.done")
        target.claims.release(entry.id)
        return Finished(number, entry, record)
