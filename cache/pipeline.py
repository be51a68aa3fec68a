"""From tars to finished slots: read and decode ahead, embed in batches, write each tar whole.

Batches never cross tars, so that the rows of a tar do not depend on what else is built beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import xxhash
from torch import Tensor

from threetowers.cache.contract import Contract, to_json
from threetowers.cache.images import BadImage, decode_rgb
from threetowers.cache.layout import Status
from threetowers.cache.place import Place
from threetowers.cache.record import Record, record_name
from threetowers.cache.rows import Made, Rows
from threetowers.cache.table import TarEntry
from threetowers.cache.tars import BadTar, TarIndex, index_tar, key_hash, stream
from threetowers.cache.teacher import Teacher
from threetowers.cache.views import Params, Views


@dataclass(frozen=True)
class _Begin:
    entry: TarEntry
    index: TarIndex


@dataclass(frozen=True)
class _Prepared:
    """What became of the bytes of one image: pixels of all views (V, 3, H, W) and their boxes, or an error."""

    image_hash: int
    pixels: Tensor | BadImage
    params: Params | None


@dataclass(frozen=True)
class _Image:
    ordinal: int
    prepared: Future[_Prepared]


@dataclass(frozen=True)
class _End:
    tar_xxh3_128: str


Item = _Begin | _Image | _End


def items(
    todo: Sequence[tuple[str, TarEntry]], teacher: Teacher, views: Views, pool: ThreadPoolExecutor
) -> Iterator[Item]:
    """The samples of all tars, one after the other, each being decoded by the pool."""
    prepare = partial(_prepare, teacher, views)
    for path, entry in todo:
        index = index_tar(path)
        if index.fingerprint != entry.fingerprint:
            raise BadTar(
                f"{path}: changed while the cache was being built: keep it still and run the same command again"
            )
        yield _Begin(entry, index)
        digest = xxhash.xxh3_128()
        for ordinal, key, data in stream(index, digest):
            yield _Image(ordinal, pool.submit(prepare, key, data))
        yield _End(digest.hexdigest())


def _prepare(teacher: Teacher, views: Views, key: str, data: bytes) -> _Prepared:
    image_hash = xxhash.xxh3_64_intdigest(data)
    try:
        image = decode_rgb(data)
    except BadImage as error:
        return _Prepared(image_hash, error, None)
    how = teacher.preprocessing
    pixels, params = views.pixels(image, key_hash(key), teacher.transform, how.input_size, how.interpolation)
    return _Prepared(image_hash, torch.from_numpy(pixels), params)


@dataclass(frozen=True)
class Job:
    """How the items of a tar become its files."""

    place: Place
    contract: Contract
    teacher: Teacher
    batch_size: int
    on_bad: str
    min_cosine: float | None = None

    def run(self, items: Iterable[Item], advanced: Callable[[int], object]) -> Iterator[Record]:
        """Embed tar after tar; yields the record of each once it is on disk. `advanced` is told of samples done."""
        for item in items:
            match item:
                case _Begin(entry, index):
                    rows, began = Rows(index, self.contract, self.min_cosine), time.monotonic()
                    batch: list[tuple[int, Tensor]] = []
                case _Image(ordinal, prepared):
                    image = prepared.result()
                    rows.note(ordinal, image.image_hash, image.params)
                    if isinstance(image.pixels, BadImage):
                        rows.reject(ordinal, Status.UNDECODABLE, str(image.pixels))
                        advanced(1)
                    else:
                        batch.append((ordinal, image.pixels))
                    if len(batch) == self.batch_size:
                        advanced(self._embed(rows, batch))
                    self._check_bad(rows)
                case _End(tar_xxh3_128):
                    advanced(self._embed(rows, batch))
                    self._check_bad(rows)
                    yield self._write(entry, rows, tar_xxh3_128, time.monotonic() - began)

    def _embed(self, rows: Rows, batch: list[tuple[int, Tensor]]) -> int:
        """Embed and empty the batch."""
        ordinals = [ordinal for ordinal, _ in batch]
        if batch:
            pixels_bV3HW = torch.stack([pixels for _, pixels in batch])
            features_VbD = [self.teacher.embed(pixels_bV3HW[:, v]) for v in range(pixels_bV3HW.shape[1])]
            rows.put(ordinals, torch.stack(features_VbD, dim=1).numpy())
        batch.clear()
        return len(ordinals)

    def _check_bad(self, rows: Rows) -> None:
        if self.on_bad == "error" and rows.bad:
            bad = rows.bad[0]
            raise BadImage(
                f"{rows.index.location}: sample {bad.key!r} (ordinal {bad.ordinal}): {bad.reason}. Remove it, or let "
                "on_bad be 'record' to go on without it"
            )

    def _write(self, entry: TarEntry, rows: Rows, tar_xxh3_128: str, seconds: float) -> Record:
        rows.check_complete()
        record = rows.write(
            self.place, entry, tar_xxh3_128, Made("teacher", self.batch_size, self.teacher.device.type, seconds)
        )
        self.place.clear_staged(str(entry.id))
        self.place.put(record_name(entry.id), to_json(record), owner=f"{entry.id}.done")
        return record
