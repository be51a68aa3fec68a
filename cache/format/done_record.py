"""The done record of a tar: written last, so that its presence means that the rows of the tar are whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import xxhash
from pydantic import ConfigDict

from threetowers.cache.format.layout import slot_files
from threetowers.cache.format.manifest import Manifest, ManifestError, from_json
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.storage.storage import Storage

DONE = "done"


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and xxh3_128 of a whole file.

    Not crc32c: each part of a shard is followed by its own crc32c, and over such a file crc32c is a constant, the same
    for every sound shard, so that it could not tell swapped files apart.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    size: int
    xxh3_128: str

    @classmethod
    def of(cls, data: bytes) -> FileSum:
        return cls(len(data), xxhash.xxh3_128_hexdigest(data))


@dataclass(frozen=True)
class RejectedSample:
    """A sample without an embedding, and why."""

    ordinal: int
    key: str
    status: int
    reason: str


@dataclass(frozen=True)
class Norms:
    """L2 norms over the OK rows as stored; None where there is no such row."""

    min: float | None
    mean: float | None
    max: float | None


@dataclass(frozen=True)
class Cosines:
    """Cosines of the rows as stored with the rows as computed; None where there is no OK row."""

    min: float | None
    mean: float | None


@dataclass(frozen=True)
class DoneRecord:
    """What was written for one tar.

    `manifest` is the digest of the cache's contract, `chunk_crc32c` has one entry per stored chunk of each array of
    embeddings, `bad` the first few of the samples that `counts` counts by status; `norms`, `sum` and `max_abs` run over
    the OK rows as stored, `cosines` too, in all views; `tar_xxh3_128` over the bytes of the tar as they were streamed.
    `source` says who made the rows: the `teacher`, or a `rekey` of another cache, which hands on its cosines.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    tar_id: int
    fingerprint: str
    manifest: str
    n_samples: int
    n_ok: int
    counts: dict[str, int]
    bad: tuple[RejectedSample, ...]
    ignored_members: int
    files: dict[str, FileSum]
    chunk_crc32c: dict[str, tuple[int, ...]]
    norms: Norms
    cosines: Cosines
    sum: float
    max_abs: float
    tar_xxh3_128: str
    batch_size: int
    device: str
    seconds: float
    finished: str
    host: str
    source: Literal["teacher", "remap"] = "teacher"

    def undated(self) -> DoneRecord:
        """The record without what differs between two builds of the same bytes."""
        return dataclasses.replace(self, seconds=0.0, finished="", host="")


def done_record_name(tar_id: int) -> str:
    """The name of a tar's done record in the place of a cache."""
    return f"{DONE}/{tar_id}.json"


def read_done_record(storage: Storage, manifest: Manifest, entry: TarEntry) -> DoneRecord:
    """The done record of a tar, checked against contract, tar table and the sizes of its files.

    Raises:
        ContractError: there is none, it is of another tar or cache, or a file is missing or has another size.
    """
    path = storage.uri(done_record_name(entry.id))
    again = "run `threetowers cache build` again"
    try:
        record = from_json(DoneRecord, storage, done_record_name(entry.id))
    except FileNotFoundError:
        raise ManifestError(f"tar {entry.path} ({entry.id}): half built, no {path}: {again}") from None
    for field, expected in (
        ("tar_id", entry.id),
        ("fingerprint", entry.fingerprint),
        ("n_samples", entry.n_samples),
        ("manifest", manifest.digest),
    ):
        if getattr(record, field) != expected:
            raise ManifestError(
                f"tar {entry.path} ({entry.id}): {path} is of another tar or cache: {field}: expected {expected}, "
                f"found {getattr(record, field)}. Delete it and {again}"
            )
    for name, relative in slot_files(manifest, entry.id).items():
        size = storage.size(relative)
        expected_size = record.files[name].size if name in record.files else None
        if size is None or size != expected_size:
            raise ManifestError(
                f"tar {entry.path} ({entry.id}): {storage.uri(relative)}: expected {expected_size} bytes, found "
                f"{'no file' if size is None else size}. Delete {path} and {again}"
            )
    return record
