"""Build a cache: stream tars through a teacher, one tar at a time, each tar's rows written whole.

The list of tars is dealt out by rank. A tar is finished when its done record is there; running the same command again
continues with the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from threetowers.cache.agreement import Terms, agree
from threetowers.cache.ahead import ahead
from threetowers.cache.contract import Contract, ContractError
from threetowers.cache.pipeline import Job, items
from threetowers.cache.place import Place, place_of
from threetowers.cache.ranks import Rank
from threetowers.cache.record import BadSample, Record, read_record, record_name
from threetowers.cache.rows import MAX_BAD_SHOWN
from threetowers.cache.table import TarEntry
from threetowers.cache.tars import expand, index_tar
from threetowers.cache.teacher import load_teacher
from threetowers.cache.views import CENTER, Views

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildReport:
    """What one process did. `tars_*` count its share of the tars, `samples` to `bytes` what it wrote this time."""

    place: Place
    rank: Rank
    tars_built: int
    tars_kept: int
    samples: int
    ok: int
    counts: dict[str, int]
    bad: tuple[tuple[str, BadSample], ...]
    bytes: int
    seconds: float
    notes: tuple[str, ...]


def build(
    tars: Sequence[str | Path],
    out: str | Path | Place,
    *,
    backbone: str,
    weights: str = "pretrained",
    image_size: int | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    dtype: str = "float16",
    views: Views = CENTER,
    slot: int | None = None,
    min_cosine: float | None = None,
    device: str | None = None,
    on_bad: str = "record",
    wait_seconds: float = 3600,
    progress: bool = False,
) -> BuildReport:
    """Build, or go on building, a cache of `tars` in the place `out`, a folder or a URL.

    Args:
        tars: paths, globs and brace ranges (`expand`). Every process gets the same list.
        backbone, weights, image_size: the teacher (`load_teacher`).
        batch_size: images a forward pass. Part of what makes two builds equal to the last bit.
        threads: threads that decode and resize, by default this process's share of the cores.
        dtype: precision tier (`PRECISIONS`); `float32` or `bfloat16` for features beyond 65504.
        views: which views of a picture get an embedding.
        slot: rows kept for a tar, by default as many as the largest of these tars needs; more leaves room for larger
            tars that are added later.
        min_cosine: bound on what storing a row may do to it, by default that of the tier.
        device: by default the GPU of this local rank, else the CPU.
        on_bad: `record` keeps a status for a sample without an embedding and goes on, `error` stops at the first.
        wait_seconds: how long ranks other than 0 wait for rank 0 to index the tars and write the manifest.
        progress: show a bar on rank 0.

    Raises:
        ContractError: the folder holds a cache of another backbone, preprocessing, views or precision, or of tars that
            were packed again.
        PrecisionError: a row that the tier stores with a smaller cosine than `min_cosine`.
        BadTar, BadImage, ValueError: bad input, named.
        WriteError: the folder does not take what is written.
    """
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ValueError(f"batch_size={batch_size}, threads={threads}: expected at least 1")
    if on_bad not in ("record", "error"):
        raise ValueError(f"on_bad={on_bad!r}: expected record or error")
    terms = Terms(dtype, views, slot)
    began = time.monotonic()
    rank, place = Rank.from_env(), place_of(out)
    paths = expand(tars)
    threads = threads or max(1, len(os.sched_getaffinity(0)) // rank.local_world)
    device = device or (f"cuda:{rank.local}" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(backbone, weights, image_size, device)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        mine = paths[rank.rank :: rank.world]
        agreed = agree(
            place,
            paths if rank.rank == 0 else mine,
            teacher,
            terms,
            rank,
            wait_seconds,
            lambda some: list(pool.map(index_tar, some)),
        )
        contract = agreed.contract
        share = list(pool.map(lambda path: (path, agreed.table.find(index_tar(path))), mine))
        todo = [(path, entry) for path, entry in share if not _finished(place, contract, entry)]
        job = Job(place, contract, teacher, batch_size, on_bad, min_cosine)
        total, left = (sum(entry.n_samples for _, entry in some) for some in (share, todo))
        show = progress and rank.rank == 0
        bar = tqdm(total=total, initial=total - left, unit="img", desc=f"rank 0 of {rank.world}", disable=not show)
        records: list[tuple[TarEntry, Record]] = []
        source = ahead(items(todo, teacher, views, pool), depth=4 * batch_size + 2 * threads)
        try:
            with bar, contextlib.closing(source):
                for record in job.run(source, bar.update):
                    records.append((todo[len(records)][1], record))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return _report(place, rank, len(share), records, time.monotonic() - began, agreed.notes)


def _finished(place: Place, contract: Contract, entry: TarEntry) -> bool:
    try:
        read_record(place, contract, entry)
    except ContractError as error:
        if place.size(record_name(entry.id)) is not None:
            logger.warning("built again: %s", error)
        return False
    return True


def _report(
    place: Place,
    rank: Rank,
    share: int,
    records: list[tuple[TarEntry, Record]],
    seconds: float,
    noted: tuple[str, ...],
) -> BuildReport:
    counts: Counter[str] = Counter()
    for _, record in records:
        counts.update(record.counts)
    return BuildReport(
        place=place,
        rank=rank,
        tars_built=len(records),
        tars_kept=share - len(records),
        samples=sum(record.n_samples for _, record in records),
        ok=sum(record.n_ok for _, record in records),
        counts=dict(counts),
        bad=tuple((entry.path, bad) for entry, record in records for bad in record.bad)[:MAX_BAD_SHOWN],
        bytes=sum(file.size for _, record in records for file in record.files.values()),
        seconds=seconds,
        notes=noted,
    )
