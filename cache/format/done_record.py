"""The done record of a tar: written last, so that its presence means that all rows of the tar are stored."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import xxhash
from pydantic import ConfigDict

from threetowers.cache.format.layout import tar_files
from threetowers.cache.format.manifest import MANIFEST, Manifest, ManifestError, from_json, read_manifest
from threetowers.cache.format.tar_table import TarEntry, read_table
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.tar_index import TarIndex

DONE = "done"


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and xxh3_128 of a file.

    Not crc32c: each part of a shard is followed by its own crc32c, and over such a file crc32c is a constant, the same
    for every intact shard, so that it could not tell swapped files apart.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    size: int
    xxh3_128: str

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Return size and digest of a file with these bytes."""
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
    """L2 norms over the embeddings as stored; None where there is none."""

    min: float | None
    mean: float | None
    max: float | None


@dataclass(frozen=True)
class Cosines:
    """Cosines of the embeddings as stored with those as computed; None where there is none."""

    min: float | None
    mean: float | None


@dataclass(frozen=True)
class DoneRecord:
    """What was written for one tar.

    Attributes:
        tar_id: id of the tar in the tar table.
        fingerprint: of the tar.
        manifest: digest of the cache's manifest.
        n_samples: samples in the tar.
        n_rows: rows that are stored: one a sample of images, one a caption of text.
        n_ok: samples with an embedding.
        counts: samples without an embedding, by status.
        bad: the first few of these.
        notes: embedded samples of which something was tolerated, by what it was.
        ignored_members: members of the tar that nothing reads, by the reason.
        files: size and digest of each array's file.
        chunk_crc32c: crc32c of each stored chunk of each array that is divided into chunks.
        norms: over the embeddings as stored, of all views.
        cosines: of these as stored with these as computed.
        sum: of all their components.
        max_abs: their largest magnitude.
        tar_xxh3_128: digest of the tar as it was streamed.
        batch_size: images or captions per forward pass.
        device: type of the teacher's device.
        seconds: wall time of the tar.
        finished: when, in ISO 8601.
        host: where.
        source: what made the rows: the `teacher`, a `remap` of another cache, whose cosines are inherited, or an
            `import` of another tool's files.
        runtime: what ran the teacher's forward pass.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    tar_id: int
    fingerprint: str
    manifest: str
    n_samples: int
    n_rows: int
    n_ok: int
    counts: dict[str, int]
    bad: tuple[RejectedSample, ...]
    ignored_members: dict[str, int]
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
    source: Literal["teacher", "remap", "import"] = "teacher"
    notes: dict[str, int] = field(default_factory=dict)
    runtime: str = "torch"


def done_record_name(tar_id: int) -> str:
    """Return the name of a tar's done record in the cache."""
    return f"{DONE}/{tar_id}.json"


def read_done_record(storage: Storage, manifest: Manifest, entry: TarEntry) -> DoneRecord:
    """Read the done record of a tar, and check it against manifest, tar table and the sizes of its files.

    Raises:
        ManifestError: the tar is incomplete, the record belongs to another tar or cache, or a file is missing or has
            another size.
    """
    path = storage.uri(done_record_name(entry.id))
    again = "run `threetowers cache build` again"
    try:
        record = from_json(DoneRecord, storage, done_record_name(entry.id))
    except FileNotFoundError:
        raise ManifestError(f"tar {entry.path} ({entry.id}): incomplete, {path} is missing: {again}") from None
    for name, expected in (
        ("tar_id", entry.id),
        ("fingerprint", entry.fingerprint),
        ("n_samples", entry.n_samples),
        ("manifest", manifest.digest),
    ):
        if getattr(record, name) != expected:
            raise ManifestError(
                f"tar {entry.path} ({entry.id}): {path} belongs to another tar or cache: {name}: expected {expected}, "
                f"found {getattr(record, name)}. Delete it and {again}"
            )
    for name, relative in tar_files(manifest, entry.id).items():
        size = storage.size(relative)
        expected_size = record.files[name].size if name in record.files else None
        if size is None or size != expected_size:
            raise ManifestError(
                f"tar {entry.path} ({entry.id}): {storage.uri(relative)}: expected {expected_size} bytes, found "
                f"{'no file' if size is None else size}. Delete {path} and {again}"
            )
    return record


def finished_tars(storage: Storage, indexes: Iterable[TarIndex]) -> set[str]:
    """Return the fingerprints of those of these tars that are complete in a cache, or in a folder to become one."""
    if storage.size(MANIFEST) is None:
        return set()
    manifest = read_manifest(storage)
    table = read_table(storage, allow_empty=True)
    finished = set()
    for index in indexes:
        entry = table.by_fingerprint.get(index.fingerprint)
        if entry is not None:
            with contextlib.suppress(ManifestError):
                read_done_record(storage, manifest, entry)
                finished.add(index.fingerprint)
    return finished
