"""From tars to finished slots: read and decode ahead, embed in batches, write each tar whole.

Batches never cross tars, so that the rows of a tar do not depend on what else is built beside it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from threetowers.cache.contract import Contract, TarEntry, to_json
from threetowers.cache.images import BadImage, decode_rgb
from threetowers.cache.layout import Status
from threetowers.cache.place import Place
from threetowers.cache.record import Record, record_name
from threetowers.cache.rows import Rows
from threetowers.cache.store import write_slot
from threetowers.cache.tars import BadTar, TarIndex, index_tar, stream
from threetowers.cache.teacher import Teacher

MAX_BAD_SHOWN = 20


@dataclass(frozen=True)
class _Begin:
    entry: TarEntry
    index: TarIndex


@dataclass(frozen=True)
class _Image:
    ordinal: int
    pixels: Future[Tensor | BadImage]


@dataclass(frozen=True)
class _End:
    tar_xxh3_128: str


Item = _Begin | _Image | _End


def items(todo: Sequence[tuple[Path, TarEntry]], teacher: Teacher, pool: ThreadPoolExecutor) -> Iterator[Item]:
    """The samples of all tars, one after the other, each being decoded by the pool."""
    prepare = partial(_prepare, teacher)
    for path, entry in todo:
        index = index_tar(path)
        if index.fingerprint != entry.fingerprint:
            raise BadTar(
                f"{path}: changed while the cache was being built: keep it still and run the same command again"
            )
        yield _Begin(entry, index)
        digest = xxhash.xxh3_128()
        for ordinal, _, data in stream(index, digest):
            yield _Image(ordinal, pool.submit(prepare, data))
        yield _End(digest.hexdigest())


def _prepare(teacher: Teacher, data: bytes) -> Tensor | BadImage:
    try:
        return teacher.preprocess(decode_rgb(data))
    except BadImage as error:
        return error


@dataclass(frozen=True)
class Job:
    """How the items of a tar become its files."""

    place: Place
    contract: Contract
    teacher: Teacher
    batch_size: int
    on_bad: str

    def run(self, items: Iterable[Item], advanced: Callable[[int], object]) -> Iterator[Record]:
        """Embed tar after tar; yields the record of each once it is on disk. `advanced` is told of samples done."""
        for item in items:
            match item:
                case _Begin(entry, index):
                    rows, began = Rows(index, self.contract.dim, self.contract.dtype), time.monotonic()
                    batch: list[tuple[int, Tensor]] = []
                case _Image(ordinal, pixels):
                    image = pixels.result()
                    if isinstance(image, BadImage):
                        rows.reject(ordinal, Status.UNDECODABLE, str(image))
                        advanced(1)
                    else:
                        batch.append((ordinal, image))
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
            rows.put(ordinals, self.teacher.embed(torch.stack([image for _, image in batch])).numpy())
        batch.clear()
        return len(ordinals)

    def _check_bad(self, rows: Rows) -> None:
        if self.on_bad == "error" and rows.bad:
            bad = rows.bad[0]
            raise BadImage(
                f"{rows.index.path}: sample {bad.key!r} (ordinal {bad.ordinal}): {bad.reason}. Remove it, or let "
                "on_bad be 'record' to go on without it"
            )

    def _write(self, entry: TarEntry, rows: Rows, tar_xxh3_128: str, seconds: float) -> Record:
        rows.check_complete()
        files, chunk_crc32c = write_slot(
            self.place, self.contract, entry.id, rows.emb_nD, rows.key_hash_n, rows.status_n
        )
        norms, total, max_abs = rows.norms()
        record = Record(
            tar_id=entry.id,
            fingerprint=entry.fingerprint,
            contract=self.contract.digest,
            n_samples=entry.n_samples,
            n_ok=int((rows.status_n == Status.OK).sum()),
            counts=rows.counts(),
            bad=tuple(sorted(rows.bad, key=lambda bad: bad.ordinal)[:MAX_BAD_SHOWN]),
            ignored_members=rows.index.ignored,
            files=files,
            chunk_crc32c=tuple(chunk_crc32c),
            norms=norms,
            sum=total,
            max_abs=max_abs,
            tar_xxh3_128=tar_xxh3_128,
            batch_size=self.batch_size,
            device=self.teacher.device.type,
            seconds=round(seconds, 3),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
        )
        self.place.clear_staged(str(entry.id))
        self.place.put(record_name(entry.id), to_json(record), owner=f"{entry.id}.done")
        return record
