"""The tar table of a cache: which tar owns which rows. It only ever grows, so an id never changes its meaning.

It lies in segments `tars/0.json`, `tars/1.json`, ..., one for each time that tars were added. A segment is written once
and exclusively, holds the digest of the one before it and its own: a table that is edited, or copied in part, is
noticed, and two builds that add tars at the same time both keep theirs.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import xxhash
from pydantic import ConfigDict

from threetowers.cache.format.manifest import ManifestError, from_json, to_json
from threetowers.cache.storage.storage import Storage, is_url
from threetowers.cache.webdataset.tar_index import TarIndex

TARS = "tars"
OWNER = "table"


@dataclass(frozen=True)
class TarEntry:
    """One tar of a cache: `path` relative to its segment's root, size in bytes, fingerprint as in TarIndex."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    id: int
    path: str
    size: int
    n_samples: int
    fingerprint: str


@dataclass(frozen=True)
class Segment:
    """Tars that were added together. `root` is where they lay, `previous` the digest of the segment before."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    root: str
    previous: str
    entries: tuple[TarEntry, ...]
    digest: str = ""

    def sealed(self) -> Segment:
        """The segment with the xxh3_128 of all the rest of it."""
        bare = dataclasses.replace(self, digest="")
        return dataclasses.replace(self, digest=xxhash.xxh3_128_hexdigest(to_json(bare)))


@dataclass(frozen=True)
class TarTable:
    """The tars of a cache; `entries[i].id == i`. A cache that is being built may hold tars not yet embedded."""

    segments: tuple[Segment, ...]

    @cached_property
    def entries(self) -> tuple[TarEntry, ...]:
        return tuple(entry for segment in self.segments for entry in segment.entries)

    @cached_property
    def by_fingerprint(self) -> dict[str, TarEntry]:
        return {entry.fingerprint: entry for entry in self.entries}

    @cached_property
    def _by_location(self) -> dict[str, TarEntry]:
        return {joined(segment.root, entry.path): entry for segment in self.segments for entry in segment.entries}

    def at(self, location: str) -> TarEntry | None:
        """The entry of the tar that lay here when it was added, whatever lies there now."""
        return self._by_location.get(absolute(location))

    @property
    def root(self) -> str:
        """Where the first tars lay when the cache was begun."""
        return self.segments[0].root

    def find(self, index: TarIndex) -> TarEntry:
        """The entry of a tar, by fingerprint, wherever the tar lies now.

        Raises:
            ContractError: there is none; says whether a tar of that name is there, packed differently.
        """
        entry = self.by_fingerprint.get(index.fingerprint)
        if entry is not None:
            return entry
        location = index.location
        named = [e.fingerprint for e in self.entries if os.path.basename(e.path) == index.name]
        if named:
            raise repacked(location, named, index.fingerprint)
        raise ManifestError(
            f"{location}: not among the {len(self.entries)} tars of this cache, by fingerprint ({index.fingerprint}) "
            "or by name: add it with `threetowers cache build`"
        )

    def namesakes(self, locations: Sequence[str]) -> list[str]:
        """Those of these tars that are not in the table, while another of that file name is."""
        names = {os.path.basename(entry.path) for entry in self.entries}
        return [path for path in locations if self.at(path) is None and os.path.basename(path) in names]

    def missing(self, indexes: Sequence[TarIndex], slot: int) -> Segment | None:
        """The segment that adds those of these tars that are not in the table; None where all are.

        Raises:
            ContractError: two of them are copies of each other, one holds more than `slot` samples, or one is named as
                a tar of the table, in the same place, and has another fingerprint.
        """
        refuse_copies([index.location for index in indexes], [index.fingerprint for index in indexes])
        new = [index for index in indexes if index.fingerprint not in self.by_fingerprint]
        if not new:
            return None
        known = self._locations(indexes)
        for index in new:
            location = absolute(index.location)
            if location in known:
                raise repacked(index.location, [known[location]], index.fingerprint)
            if len(index.samples) > slot:
                raise ManifestError(
                    f"{index.location}: holds {len(index.samples)} samples, a slot of this cache {slot} rows: split "
                    "the tar, or build a new cache with a larger slot (--slot)"
                )
        root = common_root([index.location for index in new])
        entries = tuple(
            TarEntry(
                len(self.entries) + i,
                absolute(index.location).removeprefix(root + "/" if root else ""),
                index.size,
                len(index.samples),
                index.fingerprint,
            )
            for i, index in enumerate(new)
        )
        return Segment(root, self.segments[-1].digest if self.segments else "", entries).sealed()

    def _locations(self, indexes: Iterable[TarIndex]) -> dict[str, str]:
        """Fingerprints by where the tars of the table lay, and by where they lie now if they were moved together."""
        moved: dict[str, set[str]] = {}  # by fingerprint of a tar that was found, the folder that is now its root
        for index in indexes:
            entry, location = self.by_fingerprint.get(index.fingerprint), absolute(index.location)
            if entry is not None and location.endswith("/" + entry.path):
                moved.setdefault(entry.fingerprint, set()).add(location.removesuffix("/" + entry.path))
        return {
            joined(root, entry.path): entry.fingerprint
            for segment in self.segments
            for root in {segment.root}.union(*(moved.get(entry.fingerprint, ()) for entry in segment.entries))
            for entry in segment.entries
        }


def refuse_copies(locations: Sequence[str], fingerprints: Sequence[str]) -> None:
    """Raise ContractError if two of these tars are one, by fingerprint."""
    first: dict[str, str] = {}
    for location, fingerprint in zip(locations, fingerprints, strict=True):
        if (other := first.setdefault(fingerprint, location)) != location:
            raise ManifestError(f"tars {location} and {other} are copies of each other: name one of them")


def repacked(location: str, expected: Sequence[str], found: str) -> ManifestError:
    """The error about a tar that has the name of another."""
    return ManifestError(
        f"{location}: packed or downloaded again since the cache was begun: expected fingerprint "
        f"{' or '.join(expected)}, found {found}. Bring the old tar back, take the rows over by key with "
        "`threetowers cache remap`, or build a new cache"
    )


def absolute(location: str) -> str:
    """A path made absolute; a URL as it is."""
    return location if is_url(location) else os.path.abspath(location.removeprefix("file://"))


def joined(root: str, path: str) -> str:
    """The location of a path in a root; where that is empty, paths are whole locations."""
    return f"{root}/{path}" if root else path


def common_root(locations: Sequence[str]) -> str:
    """The deepest folder that holds all of these, absolute; empty where they have none in common."""
    folders = [absolute(location).split("/")[:-1] for location in locations]
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    return "/".join(level[0] for level in same)


def read_table(storage: Storage, *, empty: bool = False) -> TarTable:
    """The tar table of a cache. `empty`: have it also while it has no tars yet.

    Raises:
        ContractError: there is none, or it was changed or copied in part.
    """
    table = _read(storage)
    if not table.segments and not empty:
        raise ManifestError(
            f"{storage}: a cache without tars ({storage.uri(TARS)}/ is empty): its build was stopped early or copied "
            "in part. Run `threetowers cache build` again"
        )
    return table


def extend(storage: Storage, indexes: Sequence[TarIndex], slot: int) -> TarTable:
    """Add those of these tars that the table lacks, and return the table. Safe beside others that do the same.

    Raises:
        ContractError: as for TarTable.missing.
        WriteError: the place does not take it.
    """
    while True:
        table = _read(storage)
        segment = table.missing(indexes, slot)
        if segment is None:
            return table
        if storage.create_exclusive(_name(len(table.segments)), to_json(segment), owner=OWNER):
            return TarTable((*table.segments, segment))


def _name(number: int) -> str:
    return f"{TARS}/{number}.json"


def _read(storage: Storage) -> TarTable:
    segments: list[Segment] = []
    while True:
        name, previous = _name(len(segments)), segments[-1].digest if segments else ""
        try:
            segment = from_json(Segment, storage, name)
        except FileNotFoundError:
            break
        ids = tuple(entry.id for entry in segment.entries)
        first = segments[-1].entries[-1].id + 1 if segments else 0
        if segment.sealed() != segment or segment.previous != previous or ids != tuple(range(first, first + len(ids))):
            raise ManifestError(
                f"{storage.uri(name)}: changed since it was written, or of another cache: bring the file back, or "
                "remove the cache and build it again"
            )
        segments.append(segment)
    if strange := sorted(
        set(storage.listdir(TARS)) - {_name(i).removeprefix(f"{TARS}/") for i in range(len(segments))}
    ):
        raise ManifestError(
            f"{storage}: {storage.uri(_name(len(segments)))} is missing, while {strange} is there: copy it again"
        )
    return TarTable(tuple(segments))
