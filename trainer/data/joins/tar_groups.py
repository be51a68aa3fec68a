"""The groups of all samples of a tar: read before the first step, for runs that need nothing else of their tars."""

import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.processes.world import World
from threetowers.cache.storage.storage import open_storage, split_address
from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS, FIELD_EXTENSIONS
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample_stream import stream_texts
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.trainer.data.joins.sample_members import SampleMembers
from threetowers.trainer.data.tar_headers import gather_from_ranks

GROUPS_FORMAT = 1  # of the files in `index_dir`
THREADS = 8  # remote tars wait for the network; local ones neither gain nor lose


def group_hash(name: str) -> int:
    """Return the 64-bit signed hash of a group's name."""
    return int(np.uint64(xxhash.xxh3_64_intdigest(name.encode())).astype(np.int64))


@dataclass(frozen=True, eq=False)
class TarGroups:
    """The groups of the n samples of a tar.

    Attributes:
        hash_n: Hash of the name of each sample's group, (n,) int64; 0 where it has none.
        note_n: Number of each sample's notes in `notes`, (n,) int32.
        notes: What was tolerated in the fields of samples, as short phrases: each combination once, first that of none.
        bad: By ordinal, why a sample has no group: its field holds a list or an object.
    """

    hash_n: npt.NDArray[np.int64]
    note_n: npt.NDArray[np.int32]
    notes: Sequence[tuple[str, ...]]
    bad: Mapping[int, str]

    @classmethod
    def read(cls, tar: TarIndex, field: str) -> Self:
        """Read the groups that a field names.

        Raises:
            BadTar: The tar has changed since it was indexed.
        """
        hash_n = np.zeros(len(tar.samples), np.int64)
        note_n = np.zeros(len(tar.samples), np.int32)
        numbers: dict[tuple[str, ...], int] = {(): 0}
        bad = {}
        for ordinal, read in stream_texts(tar, FIELD_EXTENSIONS):
            members = SampleMembers(tar, ordinal, read, DEFAULT_CAPTIONS, max_pixels=0)
            try:
                hash_n[ordinal] = group_hash(members.group(field))
            except BadSample as error:
                bad[ordinal] = str(error)
            note_n[ordinal] = numbers.setdefault(tuple(members.notes), len(numbers))
        return cls(hash_n, note_n, list(numbers), bad)

    def to_bytes(self, about: Mapping[str, Any]) -> bytes:
        """Return a file that `from_bytes` reads; `about` says what it is of."""
        head = {"about": about, "notes": self.notes, "bad": list(self.bad.items())}
        data = io.BytesIO()
        np.savez(data, head=np.array(json.dumps(head)), hash_n=self.hash_n, note_n=self.note_n)
        return data.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, about: Mapping[str, Any]) -> Self:
        """Return the groups in a file.

        Raises:
            EOFError, ValueError, KeyError, BadZipFile: It is damaged, or of something else.
        """
        with np.load(io.BytesIO(data), allow_pickle=False) as kept:
            head = json.loads(str(kept["head"]))
            if head["about"] != about:
                raise ValueError(f"found groups of {head['about']}, expected those of {about}")
            return cls(kept["hash_n"], kept["note_n"], list(map(tuple, head["notes"])), dict(head["bad"]))


def read_groups(
    tars: Sequence[TarIndex], fields: Sequence[str | None], index_dir: str | None = None
) -> dict[int, TarGroups]:
    """Return the groups of all samples, by tar number. Collective: an error on one rank is raised on all.

    Args:
        tars: The tars.
        fields: The field that names the groups of each of them; None: nothing is read of it.
        index_dir: Folder or URL where groups are kept for the next launch; None keeps none.

    Raises:
        BadTar: A tar has changed since it was indexed.
        OSError: A tar cannot be read, or its groups cannot be kept.
    """
    named = [(number, field) for number, field in enumerate(fields) if field is not None]
    if not named:
        return {}
    world = World.from_process_group()

    def read(each: tuple[int, str]) -> TarGroups:
        number, field = each
        return TarGroups.read(tars[number], field) if index_dir is None else _kept(index_dir, tars[number], field)

    def read_own() -> list[TarGroups]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(read, named[world.rank :: world.size]))

    by_rank = gather_from_ranks(read_own)
    return {number: by_rank[i % world.size][i // world.size] for i, (number, _) in enumerate(named)}


def _kept(folder: str, tar: TarIndex, field: str) -> TarGroups:
    """Return the groups of a tar: those kept for this tar as it is, else new ones, which are then kept."""
    storage, name = split_address(tar.location)
    about = {
        "format": GROUPS_FORMAT,
        "location": tar.location,
        "fingerprint": tar.fingerprint,
        "modified": storage.modified(name),
        "field": field,
    }
    kept = open_storage(folder)
    file = f"{xxhash.xxh3_64_hexdigest(f'{tar.location} {field}'.encode())}-groups.npz"
    try:
        return TarGroups.from_bytes(kept.read(file), about)
    except (FileNotFoundError, EOFError, ValueError, KeyError, BadZipFile):
        pass  # not kept yet, or damaged
    groups = TarGroups.read(tar, field)
    kept.put(file, groups.to_bytes(about), owner="index")
    return groups
