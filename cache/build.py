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
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from threetowers.cache.ahead import ahead
from threetowers.cache.contract import (
    MANIFEST,
    TARS,
    Contract,
    ContractError,
    TarEntry,
    TarTable,
    difference,
    notes,
    read_contract,
    to_json,
)
from threetowers.cache.layout import STORE, slot_and_chunk
from threetowers.cache.pipeline import MAX_BAD_SHOWN, Job, items
from threetowers.cache.place import STAGING, Place, place_of
from threetowers.cache.ranks import Rank
from threetowers.cache.record import BadSample, Record, read_record, record_name
from threetowers.cache.store import CONTRACT_OWNER, create
from threetowers.cache.tars import TarIndex, expand, index_tar
from threetowers.cache.teacher import Teacher, load_teacher

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
        dtype: `float16`, or `float32` for features beyond 65504.
        device: by default the GPU of this local rank, else the CPU.
        on_bad: `record` keeps a status for a sample without an embedding and goes on, `error` stops at the first.
        wait_seconds: how long ranks other than 0 wait for rank 0 to index the tars and write the manifest.
        progress: show a bar on rank 0.

    Raises:
        ContractError: the folder holds a cache of another backbone, preprocessing or list of tars.
        BadTar, BadImage, ValueError: bad input, named.
        WriteError: the folder does not take what is written.
    """
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ValueError(f"batch_size={batch_size}, threads={threads}: expected at least 1")
    if dtype not in ("float16", "float32") or on_bad not in ("record", "error"):
        raise ValueError(f"dtype={dtype!r}, on_bad={on_bad!r}: expected float16 or float32, record or error")
    began = time.monotonic()
    rank, place = Rank.from_env(), place_of(out)
    paths = expand(tars)
    threads = threads or max(1, len(os.sched_getaffinity(0)) // rank.local_world)
    device = device or (f"cuda:{rank.local}" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(backbone, weights, image_size, device)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        contract, table, noted = _agree(place, paths, teacher, dtype, rank, wait_seconds, pool)
        share = list(pool.map(lambda path: (path, table.find(index_tar(path))), paths[rank.rank :: rank.world]))
        todo = [(path, entry) for path, entry in share if not _finished(place, contract, entry)]
        job = Job(place, contract, teacher, batch_size, on_bad)
        total, left = (sum(entry.n_samples for _, entry in some) for some in (share, todo))
        show = progress and rank.rank == 0
        bar = tqdm(total=total, initial=total - left, unit="img", desc=f"rank 0 of {rank.world}", disable=not show)
        records: list[tuple[TarEntry, Record]] = []
        source = ahead(items(todo, teacher, pool), depth=4 * batch_size + 2 * threads)
        try:
            with bar, contextlib.closing(source):
                for record in job.run(source, bar.update):
                    records.append((todo[len(records)][1], record))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return _report(place, rank, len(share), records, time.monotonic() - began, noted)


def _agree(
    place: Place,
    paths: Sequence[Path],
    teacher: Teacher,
    dtype: str,
    rank: Rank,
    wait_seconds: float,
    pool: ThreadPoolExecutor,
) -> tuple[Contract, TarTable, tuple[str, ...]]:
    """The contract and tar table of the folder, written by rank 0 if there is none, and what differs harmlessly."""
    if place.size(MANIFEST) is None:
        if rank.rank == 0:
            _begin(place, list(pool.map(index_tar, paths)), teacher, dtype)
        deadline = time.monotonic() + wait_seconds
        while place.size(MANIFEST) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {rank.rank} waited {wait_seconds:.0f} s for rank 0 to index {len(paths)} tars and to write "
                    f"{place.at(MANIFEST)}: see rank 0's output, check that both see one place, or raise wait_seconds"
                )
            time.sleep(0.2)
    contract, table = read_contract(place)
    asked = _offer(teacher, dtype, contract.slot, contract.chunk_rows, contract.tars_digest)
    if lines := difference(contract, asked):
        raise ContractError(
            f"{place}: holds a cache under another contract: {'; '.join(lines)}. Expected is what the folder "
            "holds, found is what was asked for: choose another folder"
        )
    return contract, table, tuple(notes(contract, asked))


def _begin(place: Place, indexes: list[TarIndex], teacher: Teacher, dtype: str) -> None:
    """Write tar table, store metadata and, last, the manifest: the folder is a cache once that is there."""
    foreign = {name.rstrip("/") for name in place.names()} - {TARS, STORE, STAGING}
    if foreign:
        raise ContractError(f"{place}: neither a cache nor empty, holds {sorted(foreign)[:5]}: choose another folder")
    table = TarTable.of(indexes)
    slot, chunk_rows = slot_and_chunk(teacher.dim, dtype, max(entry.n_samples for entry in table.entries))
    contract = _offer(teacher, dtype, slot, chunk_rows, table.digest)
    place.clear_staged(CONTRACT_OWNER)
    place.put(TARS, to_json(table), owner=CONTRACT_OWNER)
    create(place, contract, len(table.entries))
    place.put(MANIFEST, to_json(contract), owner=CONTRACT_OWNER)


def _offer(teacher: Teacher, dtype: str, slot: int, chunk_rows: int, tars_digest: str) -> Contract:
    return Contract(
        backbone=teacher.backbone,
        weights=teacher.weights,
        weights_digest=teacher.weights_digest,
        preprocessing=teacher.preprocessing,
        dim=teacher.dim,
        dtype="float32" if dtype == "float32" else "float16",
        slot=slot,
        chunk_rows=chunk_rows,
        tars_digest=tars_digest,
        versions={name: version(name) for name in ("torch", "timm", "pillow")},
    )


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
