"""Build caches: stream tars through teachers, one tar at a time, each tar's rows written whole.

Each process takes its own share of the tars first, then what others have not got to. A tar is finished when its done
record is there; running the same command again continues with the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from threetowers.cache.builder.leases import Claims, Worker
from threetowers.cache.builder.opening import Terms, agree
from threetowers.cache.builder.pipeline import Finished, Job, Source, Stages, Target
from threetowers.cache.builder.row_buffer import MAX_BAD_SHOWN
from threetowers.cache.builder.scheduler import Assignment, Ledger
from threetowers.cache.encoders.teacher import Compute, Decode, load_teacher
from threetowers.cache.format.done_record import RejectedSample, done_record_name, read_done_record
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.format.tar_table import refuse_copies, repacked
from threetowers.cache.format.views import CENTER, Views
from threetowers.cache.preemption import exit_on_sigterm
from threetowers.cache.prefetch import prefetch
from threetowers.cache.storage.storage import Storage, is_url, open_storage
from threetowers.cache.webdataset.tar_index import expand, index_tar
from threetowers.cache.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSpec:
    """One cache to build: where, by which teacher (`load_teacher`), under which terms, within which bound."""

    out: str | Path | Storage
    backbone: str
    weights: str = "pretrained"
    image_size: int | None = None
    terms: Terms = field(default_factory=Terms)
    min_cosine: float | None = None


@dataclass(frozen=True)
class BuildReport:
    """What one process did for one cache. `tars_kept` counts tars of its own share that were finished before,
    `tars_left` those that another worker took over meanwhile; the rest is what it wrote this time. `shares` says where
    the time of the embedding thread went, largest first."""

    storage: Storage
    world: World
    tars_built: int
    tars_kept: int
    tars_left: int
    samples: int
    ok: int
    counts: dict[str, int]
    bad: tuple[tuple[str, RejectedSample], ...]
    bytes: int
    seconds: float
    shares: dict[str, float]
    notes: tuple[str, ...]


def build(
    tars: Sequence[str | Path],
    out: str | Path | Storage,
    *,
    backbone: str,
    weights: str = "pretrained",
    image_size: int | None = None,
    dtype: str = "float16",
    views: Views = CENTER,
    slot: int | None = None,
    min_cosine: float | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    device: str | None = None,
    compute: Compute = "float32",
    decode: Decode = "pillow",
    compiled: bool = False,
    on_bad: str = "record",
    wait_seconds: float = 3600,
    stale_seconds: float = 120,
    progress: bool = False,
) -> BuildReport:
    """Build, or go on building, a cache of `tars` in the place `out`, a folder or a URL.

    Args:
        backbone, weights, image_size: the teacher (`load_teacher`).
        dtype: precision tier (`PRECISIONS`); `float32` or `bfloat16` for features beyond 65504.
        views: which views of a picture get an embedding.
        slot: rows kept for a tar, by default as many as the largest of these tars needs; more leaves room for larger
            tars that are added later.
        min_cosine: bound on what storing a row may do to it, by default that of the tier.

    The other arguments, and what is raised, are those of `build_all`.
    """
    spec = CacheSpec(out, backbone, weights, image_size, Terms(dtype, views, slot), min_cosine)
    (report,) = build_all(
        tars,
        [spec],
        batch_size=batch_size,
        threads=threads,
        device=device,
        compute=compute,
        decode=decode,
        compiled=compiled,
        on_bad=on_bad,
        wait_seconds=wait_seconds,
        stale_seconds=stale_seconds,
        progress=progress,
    )
    return report


def build_all(
    tars: Sequence[str | Path],
    specs: Sequence[CacheSpec],
    *,
    batch_size: int = 64,
    threads: int | None = None,
    device: str | None = None,
    compute: Compute = "float32",
    decode: Decode = "pillow",
    compiled: bool = False,
    on_bad: str = "record",
    wait_seconds: float = 3600,
    stale_seconds: float = 120,
    progress: bool = False,
) -> tuple[BuildReport, ...]:
    """Build several caches of the same tars, reading and decoding each picture once for all that lack it.

    Returns when every tar is finished, by whichever process. SIGTERM drops the tar that is worked on and ends the
    process with code 143.

    Args:
        tars: paths, URLs, globs and brace ranges (`expand`). Every process gets the same list.
        batch_size: images a forward pass. Part of what makes two builds equal to the last bit, as are device and
            `compiled` (torch.compile).
        threads: threads that decode and resize, by default this process's share of the cores.
        device: by default the GPU of this local rank, else the CPU.
        compute, decode: `load_teacher`; part of the contract.
        on_bad: `record` keeps a status for a sample without an embedding and goes on, `error` stops at the first.
        wait_seconds: how long ranks other than 0 wait for rank 0 to index the tars and write the manifest.
        stale_seconds: how long a silent worker's tars stay its own.
        progress: show a bar on rank 0.

    Raises:
        ContractError: a place holds a cache of another backbone, preprocessing, views or precision, or of tars that
            were packed again.
        PrecisionError: a row that the tier stores with a smaller cosine than `min_cosine`.
        BadTar, BadImage, ValueError: bad input, named.
        WriteError: a place does not take what is written.
    """
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ValueError(f"batch_size={batch_size}, threads={threads}: expected at least 1")
    if on_bad not in ("record", "error"):
        raise ValueError(f"on_bad={on_bad!r}: expected record or error")
    places = [open_storage(spec.out) for spec in specs]
    if not places or len({str(storage) for storage in places}) != len(places):
        raise ValueError(f"caches to build: expected different places, found {[str(storage) for storage in places]}")
    began, world = time.monotonic(), World.from_env()
    paths = expand(tars)
    threads = threads or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    device = device or str(world.device)
    worker, stages = Worker(), Stages()
    with contextlib.ExitStack() as stack:
        stack.enter_context(exit_on_sigterm())
        pool = stack.enter_context(_pool(threads))
        targets, notes = [], []
        for spec, storage in zip(specs, places, strict=True):
            teacher = load_teacher(spec.backbone, spec.weights, spec.image_size, device, compute, decode, compiled)
            agreed = agree(
                storage, paths, teacher, spec.terms, world, wait_seconds, lambda p: list(pool.map(index_tar, p))
            )
            entries = list(
                pool.map(lambda path, table=agreed.table: table.at(path) or table.find(index_tar(path)), paths)
            )
            storage.remove_stale()
            refuse_copies(paths, [entry.fingerprint for entry in entries])
            claims = stack.enter_context(Claims(storage, worker, stale_seconds).kept())
            targets.append(Target(storage, agreed.manifest, teacher, claims, entries, spec.min_cosine))
            notes.append(agreed.notes)
        ledgers = [Ledger(target.claims, [entry.id for entry in target.entries]) for target in targets]
        own = range(world.rank, len(paths), world.size)
        unfinished = [_unfinished(t, ledger, own, paths, pool) for t, ledger in zip(targets, ledgers, strict=True)]
        assignment = Assignment(ledgers, world.rank, world.size, seed=worker.token, unfinished=unfinished)
        source = Source(paths, targets, assignment, pool)
        stack.callback(source.stopped.set)
        items = stack.enter_context(contextlib.closing(prefetch(source.items(), depth=4 * batch_size + 2 * threads)))
        stack.callback(source.stopped.set)  # before the thread is joined, and before the pool is shut
        advanced = stack.enter_context(_bar(targets, unfinished, world, progress, stages))
        finished = list(Job(targets, batch_size, on_bad, stages).run(items, advanced))
    seconds = time.monotonic() - began
    return tuple(
        _report(target, world, [done for done in finished if done.target == i], kept, seconds, stages, notes[i])
        for i, target in enumerate(targets)
        for kept in [sum(number not in unfinished[i] for number in own)]
    )


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _bar(
    targets: Sequence[Target], unfinished: Sequence[set[int]], world: World, progress: bool, stages: Stages
) -> Iterator[Callable[[int], object]]:
    """A progress bar over the samples of all tars, with the share of each stage; the first named is the bottleneck."""
    left = set().union(*unfinished)
    sizes = [entry.n_samples for entry in targets[0].entries]
    alone = world.size == 1  # others do some of it, nobody knows which
    bar = tqdm(
        total=sum(sizes) if alone else None,
        initial=sum(size for number, size in enumerate(sizes) if number not in left) if alone else 0,
        unit="img",
        desc=f"rank {world.rank} of {world.size}",
        disable=not (progress and world.first),
    )

    def advanced(samples: int) -> None:
        if samples:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in stages.shares().items())
            bar.set_postfix_str(shares, refresh=False)
            bar.update(samples)

    with bar:
        yield advanced


def _unfinished(
    target: Target, ledger: Ledger, own: Sequence[int], paths: Sequence[str], pool: ThreadPoolExecutor
) -> set[int]:
    """Numbers of the tars without a done record, or, in this process's own share, without a valid one.

    Raises:
        ContractError: a finished tar of the share that is not the one that was embedded.
    """

    def valid(number: int) -> bool:
        entry = target.entries[number]
        try:
            read_done_record(target.storage, target.manifest, entry)
        except ManifestError as error:
            logger.warning("built again: %s", error)
            target.storage.delete(done_record_name(entry.id))
            return False
        return True

    left = ledger.unfinished(range(len(paths)))
    target.claims.sweep({entry.id for number, entry in enumerate(target.entries) if number not in left})
    finished = [number for number in own if number not in left]
    local = [number for number in finished if not is_url(paths[number])]  # what is remote is compared by `verify`
    for number, index in zip(local, pool.map(index_tar, [paths[number] for number in local]), strict=True):
        if index.fingerprint != target.entries[number].fingerprint:
            raise repacked(index.location, [target.entries[number].fingerprint], index.fingerprint)
    return left | {number for number, is_valid in zip(finished, pool.map(valid, finished), strict=True) if not is_valid}


def _report(
    target: Target,
    world: World,
    finished: Sequence[Finished],
    kept: int,
    seconds: float,
    stages: Stages,
    notes: tuple[str, ...],
) -> BuildReport:
    built = [(done.entry, done.record) for done in finished if done.record is not None]
    counts: Counter[str] = Counter()
    for _, record in built:
        counts.update(record.counts)
    return BuildReport(
        storage=target.storage,
        world=world,
        tars_built=len(built),
        tars_kept=kept,
        tars_left=len(finished) - len(built),
        samples=sum(record.n_samples for _, record in built),
        ok=sum(record.n_ok for _, record in built),
        counts=dict(counts),
        bad=tuple((entry.path, bad) for entry, record in built for bad in record.bad)[:MAX_BAD_SHOWN],
        bytes=sum(file.size for _, record in built for file in record.files.values()),
        seconds=seconds,
        shares=stages.shares(),
        notes=notes,
    )
