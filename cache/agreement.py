"""How the processes of a build come to one contract and one tar table, whatever is there already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from threetowers.cache.contract import (
    MANIFEST,
    Contract,
    ContractError,
    difference,
    notes,
    read_contract,
    to_json,
)
from threetowers.cache.layout import STORE, slot_and_chunk
from threetowers.cache.place import STAGING, Place
from threetowers.cache.precision import precision
from threetowers.cache.ranks import Rank
from threetowers.cache.store import CONTRACT_OWNER, fit_to_table
from threetowers.cache.table import TARS, TarTable, extend, read_table
from threetowers.cache.tars import TarIndex
from threetowers.cache.teacher import Teacher
from threetowers.cache.views import CENTER, Views

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

    contract: Contract
    table: TarTable
    notes: tuple[str, ...]


def agree(
    place: Place, paths: Sequence[str], teacher: Teacher, terms: Terms, rank: Rank, wait_seconds: float, index: Indexing
) -> Agreement:
    """Begin a cache, or add to one what it lacks of these tars: rank 0 writes, the others wait for it.

    `index` reads the headers of tars, which is not needed for those that lie where the table says; whoever embeds a tar
    compares its fingerprint.

    Raises:
        ContractError: a cache under another contract, of tars that were packed again, or not a cache.
        TimeoutError: rank 0 did not write what this rank waits for.
    """
    deadline = time.monotonic() + wait_seconds
    if rank.rank == 0 and place.size(MANIFEST) is None:
        begin(place, _fitting(index(paths), teacher, terms))
    while place.size(MANIFEST) is None:
        _wait(place, rank, wait_seconds, deadline)
    held = read_contract(place)
    asked = offer(teacher, terms, max(held.slot, terms.slot or 0), held.chunk_rows)
    contract = settle(place, asked)
    if rank.rank == 0:
        before = read_table(place, empty=True)
        extend(place, index([path for path in paths if before.at(path) is None]), contract.slot)
        table = fit_to_table(place, contract)
        _warn_of_namesakes(place, before, table, paths)
    else:
        while not (table := read_table(place, empty=True)).entries:
            _wait(place, rank, wait_seconds, deadline)
        strange = {tar.fingerprint for tar in index([path for path in paths if table.at(path) is None])}
        while not strange <= (table := read_table(place)).by_fingerprint.keys():
            _wait(place, rank, wait_seconds, deadline)
    return Agreement(contract, table, tuple(notes(contract, asked)))


def _warn_of_namesakes(place: Place, before: TarTable, table: TarTable, paths: Sequence[str]) -> None:
    """Two data sets may number their tars alike; but tars that were downloaded again would be embedded again."""
    added = [path for path in before.namesakes(paths) if table.at(path) is not None]
    if added:
        logger.warning(
            "%s: %d tars were added whose names the cache already knows from another folder, with other contents: %s%s",
            place,
            len(added),
            ", ".join(added[:3]),
            ", ..." if len(added) > 3 else "",
        )


def _wait(place: Place, rank: Rank, wait_seconds: float, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(
            f"rank {rank.rank} waited {wait_seconds:.0f} s for rank 0 to index the tars and to write "
            f"{place.at(MANIFEST)} and {place.at(TARS)}/: see rank 0's output, check that both see one place, or raise "
            "wait_seconds"
        )
    time.sleep(POLL_SECONDS)


def begin(place: Place, contract: Contract) -> None:
    """Write the manifest, if there is none: the place is a cache once that is there.

    Raises:
        ContractError: something else lies there.
    """
    foreign = {name.rstrip("/") for name in place.names()} - {TARS, STORE, STAGING}
    if foreign and place.size(MANIFEST) is None:
        raise ContractError(f"{place}: neither a cache nor empty, holds {sorted(foreign)[:5]}: choose another folder")
    place.put_new(MANIFEST, to_json(contract), owner=CONTRACT_OWNER)


def settle(place: Place, asked: Contract) -> Contract:
    """The contract of the place, which binds.

    Raises:
        ContractError: it differs from what is asked for.
    """
    contract = read_contract(place)
    if lines := difference(contract, asked):
        raise ContractError(
            f"{place}: holds a cache under another contract: {'; '.join(lines)}. Expected is what the folder "
            "holds, found is what was asked for: choose another folder"
        )
    return contract


def _fitting(indexes: list[TarIndex], teacher: Teacher, terms: Terms) -> Contract:
    """The contract of a new cache of these tars."""
    rows = terms.slot or max(len(tar.samples) for tar in indexes)
    TarTable(()).missing(indexes, rows)  # refuses copies, and tars larger than the slot
    return offer(teacher, terms, *slot_and_chunk(precision(terms.dtype).row_bytes(teacher.dim), rows))


def offer(teacher: Teacher, terms: Terms, slot: int, chunk_rows: int) -> Contract:
    return Contract(
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
