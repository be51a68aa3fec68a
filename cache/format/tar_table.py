"""The tar table of a cache, which assigns rows to tars. It only ever grows, so an id never changes its meaning.

It is stored in segments `tars/0.json`, `tars/1.json`, ..., one for each time that tars were added. A segment is created
exclusively and written once, and holds the previous segment's digest and its own: a table that was edited or copied in
part is detected, and two builds that add tars at the same time both keep theirs.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

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
class TableSegment:
    """Tars that were added together, with the folder that they were in and the digest of the previous segment."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    root: str
    previous: str
    entries: tuple[TarEntry, ...]
    digest: str = ""

    def with_digest(self) -> Self:
        """Return the segment with the xxh3_128 of all its other fields."""
        bare = dataclasses.replace(self, digest="")
        return dataclasses.replace(self, digest=xxhash.xxh3_128_hexdigest(to_json(bare)))


@dataclass(frozen=True)
class TarTable:
    """The tars of a cache; `entries[i].id == i`. During a build it has tars that are not embedded yet."""

    segments: tuple[TableSegment, ...]

    @cached_property
    def entries(self) -> tuple[TarEntry, ...]:
        """All tars, in the order of their ids."""
        return tuple(entry for segment in self.segments for entry in segment.entries)

    @cached_property
    def by_fingerprint(self) -> dict[str, TarEntry]:
        """All tars by their fingerprints."""
        return {entry.fingerprint: entry for entry in self.entries}

    @cached_property
    def _by_location(self) -> dict[str, TarEntry]:
        found = {}
        for segment in self.segments:
            found.update({join_location(segment.root, entry.path): entry for entry in segment.entries})
        return found

    def at(self, location: str) -> TarEntry | None:
        """Return the entry of the tar that was here when it was added, whatever is here now."""
        return self._by_location.get(absolute(location))

    @property
    def root(self) -> str:
        """The folder of the first tars when the cache was created."""
        return self.segments[0].root

    def find(self, index: TarIndex) -> TarEntry:
        """Return the entry of a tar by its fingerprint, wherever the tar is now.

        Raises:
            ManifestError: there is none; the message tells whether a tar of that name exists with other contents.
        """
        entry = self.by_fingerprint.get(index.fingerprint)
        if entry is not None:
            return entry
        same_name = [e.fingerprint for e in self.entries if os.path.basename(e.path) == index.name]
        if same_name:
            raise repacked_error(index.location, same_name, index.fingerprint)
        raise ManifestError(
            f"{index.location}: not among the {len(self.entries)} tars of this cache, by fingerprint "
            f"({index.fingerprint}) or by name: add it with `threetowers cache build`"
        )

    def duplicate_names(self, locations: Sequence[str]) -> list[str]:
        """Return the tars that are not in the table although another tar of the same file name is."""
        names = {os.path.basename(entry.path) for entry in self.entries}
        return [path for path in locations if self.at(path) is None and os.path.basename(path) in names]

    def missing(self, indexes: Sequence[TarIndex], samples_per_tar: int) -> TableSegment | None:
        """Return the segment that adds the tars which are not in the table; None if all are.

        Raises:
            ManifestError: two of them are copies of each other, one has more than `samples_per_tar` samples, or one is
                where a tar of the table was and has another fingerprint.
        """
        refuse_copies([index.location for index in indexes], [index.fingerprint for index in indexes])
        new = [index for index in indexes if index.fingerprint not in self.by_fingerprint]
        if not new:
            return None
        known = self._fingerprints_by_location(indexes)
        for index in new:
            location = absolute(index.location)
            if location in known:
                raise repacked_error(index.location, [known[location]], index.fingerprint)
            if len(index.samples) > samples_per_tar:
                raise ManifestError(
                    f"{index.location}: {len(index.samples)} samples, expected at most {samples_per_tar}, the samples "
                    "per tar of this cache: split the tar, or build a new cache with more (--samples-per-tar)"
                )
        root = common_root([index.location for index in new])
        prefix = f"{root}/" if root else ""
        entries = []
        for tar_id, index in enumerate(new, start=len(self.entries)):
            path = absolute(index.location).removeprefix(prefix)
            entries.append(TarEntry(tar_id, path, index.size, len(index.samples), index.fingerprint))
        previous = self.segments[-1].digest if self.segments else ""
        return TableSegment(root, previous, tuple(entries)).with_digest()

    def _fingerprints_by_location(self, indexes: Iterable[TarIndex]) -> dict[str, str]:
        """Map where the tars of the table were, and where they are now if they were moved together, to fingerprints."""
        moved: dict[str, set[str]] = {}  # by fingerprint of a tar that was found: the folder that is now its root
        for index in indexes:
            entry = self.by_fingerprint.get(index.fingerprint)
            location = absolute(index.location)
            if entry is not None and location.endswith("/" + entry.path):
                moved.setdefault(entry.fingerprint, set()).add(location.removesuffix("/" + entry.path))
        found = {}
        for segment in self.segments:
            roots = {segment.root}
            for entry in segment.entries:
                roots |= moved.get(entry.fingerprint, set())
            for root in roots:
                found.update({join_location(root, entry.path): entry.fingerprint for entry in segment.entries})
        return found


def refuse_copies(locations: Sequence[str], fingerprints: Sequence[str]) -> None:
    """Raise ManifestError if two tars have the same fingerprint."""
    first: dict[str, str] = {}
    for location, fingerprint in zip(locations, fingerprints, strict=True):
        if (other := first.setdefault(fingerprint, location)) != location:
            raise ManifestError(f"tars {location} and {other} are copies of each other: list one of them")


def repacked_error(location: str, expected: Sequence[str], found: str) -> ManifestError:
    """Return the error for a tar that has the name of another one."""
    return ManifestError(
        f"{location}: repacked or downloaded again since the cache was created: expected fingerprint "
        f"{' or '.join(expected)}, found {found}. Restore the old tar, carry the rows over by key with "
        "`threetowers cache remap`, or build a new cache"
    )


def absolute(location: str) -> str:
    """Return a path made absolute; a URL unchanged."""
    return location if is_url(location) else os.path.abspath(location.removeprefix("file://"))


def join_location(root: str, path: str) -> str:
    """Return the location of a path in a root; with an empty root, paths are complete locations."""
    return f"{root}/{path}" if root else path


def common_root(locations: Sequence[str]) -> str:
    """Return the deepest folder that has all of these in it, absolute; empty if there is none."""
    folders = [absolute(location).split("/")[:-1] for location in locations]
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False))
    return "/".join(level[0] for level in same)


def read_table(storage: Storage, *, allow_empty: bool = False) -> TarTable:
    """Read the tar table of a cache.

    Args:
        storage: the cache.
        allow_empty: return a table without tars too.

    Raises:
        ManifestError: there is no table, or it was changed or copied in part.
    """
    # Listed before the segments are read: another process may add one at any time, and each that is listed can be read.
    listed = set(storage.listdir(TARS))
    segments: list[TableSegment] = []
    while True:
        name = _segment_name(len(segments))
        try:
            segment = from_json(TableSegment, storage, name)
        except FileNotFoundError:
            break
        ids = [entry.id for entry in segment.entries]
        first_id = segments[-1].entries[-1].id + 1 if segments else 0
        previous = segments[-1].digest if segments else ""
        consecutive = ids == list(range(first_id, first_id + len(ids)))
        if segment.with_digest() != segment or segment.previous != previous or not consecutive:
            raise ManifestError(
                f"{storage.uri(name)}: changed since it was written, or of another cache: restore the file, or remove "
                "the cache and build it again"
            )
        segments.append(segment)
    known = {_segment_name(i).removeprefix(f"{TARS}/") for i in range(len(segments))}
    if unexpected := sorted(listed - known):
        raise ManifestError(
            f"{storage}: {storage.uri(_segment_name(len(segments)))} is missing, but {unexpected} exists: copy the "
            "cache again"
        )
    if not segments and not allow_empty:
        raise ManifestError(
            f"{storage}: a cache without tars ({storage.uri(TARS)}/ is empty): its build was stopped early, or it was "
            "copied in part. Run `threetowers cache build` again"
        )
    return TarTable(tuple(segments))


def extend(storage: Storage, indexes: Sequence[TarIndex], samples_per_tar: int) -> TarTable:
    """Add the tars that the table lacks, and return the table. Several processes may do this at once.

    Raises:
        ManifestError: as for TarTable.missing.
        WriteError: the storage cannot be written.
    """
    while True:
        table = read_table(storage, allow_empty=True)
        segment = table.missing(indexes, samples_per_tar)
        if segment is None:
            return table
        if storage.create_exclusive(_segment_name(len(table.segments)), to_json(segment), owner=OWNER):
            return TarTable((*table.segments, segment))


def _segment_name(number: int) -> str:
    return f"{TARS}/{number}.json"
