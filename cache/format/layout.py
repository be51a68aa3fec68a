"""Where the rows of a tar lie: row `tar_id * slot + ordinal`, and one file per array and tar."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np

from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.views import N_PARAMS

STORE = "store.zarr"
CHUNK_BYTES = 1 << 20
MIN_CHUNKS = 8


class RowStatus(enum.IntEnum):
    """What a row holds. Only OK rows carry an embedding, in all views; the others hold the fill value."""

    ABSENT = 0
    OK = 1
    UNDECODABLE = 2
    FILTERED = 3
    NON_FINITE = 4


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array. `row` is the shape of what belongs to one sample, `chunked` says that a slot is cut into the
    contract's chunks, not kept as one."""

    name: str
    dtype: str
    row: tuple[int, ...]
    fill: float | int
    chunked: bool = False
    logical_dtype: str | None = None

    def chunk_rows(self, manifest: Manifest) -> int:
        return manifest.chunk_rows if self.chunked else manifest.slot


def emb_name(view: int) -> str:
    """The array of a view: `emb`, `emb_1`, ..."""
    return f"emb_{view}" if view else "emb"


def scale_name(view: int) -> str:
    """The array of a view's row scales (int8): `scale`, `scale_1`, ..."""
    return f"scale_{view}" if view else "scale"


def arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """All arrays of a cache, by name: rows of each view, their scales, hash of key and image, status, crop boxes."""
    tier, views = manifest.precision, manifest.views
    logical = tier.name if tier.name != tier.stored else None
    specs = [ArraySpec(emb_name(v), tier.stored, (manifest.dim,), tier.fill, True, logical) for v in range(views.count)]
    if tier.scaled:
        specs += [ArraySpec(scale_name(v), "float32", (), float("nan")) for v in range(views.count)]
    specs += [
        ArraySpec("key_hash", "uint64", (), 0),
        ArraySpec("image_hash", "uint64", (), 0),
        ArraySpec("status", "uint8", (), RowStatus.ABSENT.value),
    ]
    if views.cropped:
        specs.append(ArraySpec("view_params", "float32", (views.count, N_PARAMS), float("nan")))
    return {spec.name: spec for spec in specs}


def slot_and_chunk(row_bytes: int, largest_tar: int) -> tuple[int, int]:
    """(slot, chunk_rows) in rows, for rows of so many bytes: chunks of about CHUNK_BYTES, and at least MIN_CHUNKS of
    them, because the last chunk of a smaller tar is padded to its full size."""
    wanted = round(largest_tar * row_bytes / CHUNK_BYTES)
    n_chunks = min(max(MIN_CHUNKS, wanted), largest_tar)
    chunk_rows = math.ceil(largest_tar / n_chunks)
    return math.ceil(largest_tar / chunk_rows) * chunk_rows, chunk_rows


def slot_files(manifest: Manifest, tar_id: int) -> dict[str, str]:
    """The file of each array that holds the rows of one tar, relative to the cache: a Zarr shard each."""
    return {name: f"{STORE}/{name}/c/{tar_id}{'/0' * len(spec.row)}" for name, spec in arrays(manifest).items()}


def stored_rows(manifest: Manifest, spec: ArraySpec, n_samples: int) -> int:
    """Rows of an array that are on disk for a tar of so many samples: whole chunks."""
    rows = spec.chunk_rows(manifest)
    return math.ceil(n_samples / rows) * rows


def stored_bytes(manifest: Manifest, n_samples: int) -> int:
    """Bytes of all files of a tar of so many samples, without its done record."""
    total = 0
    for spec in arrays(manifest).values():
        row = int(np.dtype(spec.dtype).itemsize * np.prod(spec.row, dtype=np.int64))
        stored, slots = stored_rows(manifest, spec, n_samples), manifest.slot // spec.chunk_rows(manifest)
        total += stored * row + 4 * (stored // spec.chunk_rows(manifest)) + 16 * slots + 4
    return total
