"""How the processes of a build come to one contract and one tar table, whatever is there already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from threetowers.cache.encoders.teacher import Teacher
from threetowers.cache.format.dtypes import precision
from threetowers.cache.format.layout import STORE, slot_and_chunk
from threetowers.cache.format.manifest import (
    MANIFEST,
    Manifest,
    ManifestError,
    mismatch,
    notes,
    read_manifest,
    to_json,
)
from threetowers.cache.format.store import MANIFEST_OWNER, fit_to_table
from threetowers.cache.format.tar_table import TARS, TarTable, extend, read_table
from threetowers.cache.format.views import CENTER, Views
from threetowers.cache.storage.storage import PARTIAL_FOLDER, Storage
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.cache.world import World

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
Indexing = Callable[[Sequence[str]], list[TarIndex]]


@dataclass(frozen=True)
class Terms:
    """What a build asks for beside its teacher. `slot`: rows kept for a tar, at least the samples of the largest; more
    leaves room for larger tars that are added later. By default a new cache fits its tars, another one stays as it is.
    """

    dtype: str = "float16"
    views: Views = CENTER
    slot: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a tier that is not known, or no rows."""
        precision(self.dtype)
        if self.slot is not None and self.slot < 1:
            raise ValueError(f"slot={self.slot}: expected at least 1 row")


@dataclass(frozen=True)
class Agreement:
    """The contract and tar table of a cache, and where this build differs from it harmlessly."""

    manifest: Manifest
    table: TarTable
    notes: tuple[str, ...]


def agree(
    storage: Storage,
    paths: Sequence[str],
    teacher: Teacher,
    terms: Terms,
    world: World,
    wait_seconds: float,
    index: Indexing,
) -> Agreement:
    """Begin a cache, or add to one what it lacks of these tars: rank 0 writes, the others wait for it.

    `index` reads the headers of tars, which is not needed for those that lie where the table says; whoever embeds a tar
    compares its fingerprint.

    Raises:
        ContractError: a cache under another contract, of tars that were packed again, or not a cache.
        TimeoutError: rank 0 did not write what this rank waits for.
    """
    deadline = time.monotonic() + wait_seconds
    if world.first and storage.size(MANIFEST) is None:
        begin(storage, _fitting(index(paths), teacher, terms))
    while storage.size(MANIFEST) is None:
        _wait(storage, world, wait_seconds, deadline)
    held = read_manifest(storage)
    asked = offer(teacher, terms, max(held.slot, terms.slot or 0), held.chunk_rows)
    manifest = settle(storage, asked)
    if world.first:
        before = read_table(storage, empty=True)
        extend(storage, index([path for path in paths if before.at(path) is None]), manifest.slot)
        table = fit_to_table(storage, manifest)
        _warn_of_namesakes(storage, before, table, paths)
    else:
        while not (table := read_table(storage, empty=True)).entries:
            _wait(storage, world, wait_seconds, deadline)
        strange = {tar.fingerprint for tar in index([path for path in paths if table.at(path) is None])}
        while not strange <= (table := read_table(storage)).by_fingerprint.keys():
            _wait(storage, world, wait_seconds, deadline)
    return Agreement(manifest, table, tuple(notes(manifest, asked)))


def _warn_of_namesakes(storage: Storage, before: TarTable, table: TarTable, paths: Sequence[str]) -> None:
    """Two data sets may number their tars alike; but tars that were downloaded again would be embedded again."""
    added = [path for path in before.namesakes(paths) if table.at(path) is not None]
    if added:
        logger.warning(
            "%s: %d tars were added whose names the cache already knows from another folder, with other contents: %s%s",
            storage,
            len(added),
            ", ".join(added[:3]),
            ", ..." if len(added) > 3 else "",
        )


def _wait(storage: Storage, world: World, wait_seconds: float, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(
            f"rank {world.rank} waited {wait_seconds:.0f} s for rank 0 to index the tars and to write "
            f"{storage.uri(MANIFEST)} and {storage.uri(TARS)}/: see the output of rank 0, check that both see the same "
            "files, or raise wait_seconds"
        )
    time.sleep(POLL_SECONDS)


def begin(storage: Storage, manifest: Manifest) -> None:
    """Write the manifest, if there is none: the place is a cache once that is there.

    Raises:
        ContractError: something else lies there.
    """
    foreign = {name.rstrip("/") for name in storage.listdir()} - {TARS, STORE, PARTIAL_FOLDER}
    if foreign and storage.size(MANIFEST) is None:
        raise ManifestError(f"{storage}: neither a cache nor empty, holds {sorted(foreign)[:5]}: choose another folder")
    storage.create_exclusive(MANIFEST, to_json(manifest), owner=MANIFEST_OWNER)


def settle(storage: Storage, asked: Manifest) -> Manifest:
    """The contract of the place, which binds.

    Raises:
        ContractError: it differs from what is asked for.
    """
    manifest = read_manifest(storage)
    if lines := mismatch(manifest, asked):
        raise ManifestError(
            f"{storage}: holds a cache under another contract: {'; '.join(lines)}. Expected is what the folder "
            "holds, found is what was asked for: choose another folder"
        )
    return manifest


def _fitting(indexes: list[TarIndex], teacher: Teacher, terms: Terms) -> Manifest:
    """The contract of a new cache of these tars."""
    rows = terms.slot or max(len(tar.samples) for tar in indexes)
    TarTable(()).missing(indexes, rows)  # refuses copies, and tars larger than the slot
    return offer(teacher, terms, *slot_and_chunk(precision(terms.dtype).row_bytes(teacher.dim), rows))


def offer(teacher: Teacher, terms: Terms, slot: int, chunk_rows: int) -> Manifest:
    return Manifest(
        backbone=teacher.backbone,
        weights=teacher.weights,
        weights_digest=teacher.weights_digest,
        preprocessing=teacher.preprocessing,
        dim=teacher.dim,
        dtype=precision(terms.dtype).name,
        slot=slot,
        chunk_rows=chunk_rows,
        versions={name: version(name) for name in ("torch", "timm", "pillow")},
        views=terms.views,
        compute=teacher.compute,
    )
