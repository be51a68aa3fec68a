"""The layout of the rows: row `tar_id * rows_per_tar + ordinal`, and one file for each array and tar."""

import enum
import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.views import N_PARAMS
from threetowers.cache.webdataset.defects import ImageDefect

STORE = "store.zarr"
CHUNK_BYTES = 1 << 20
MIN_CHUNKS = 8


class RowStatus(enum.IntEnum):
    """State of a row. Only OK rows have an embedding, in all views; the others hold the fill value."""

    ABSENT = 0
    OK = 1
    UNDECODABLE = 2
    FILTERED = 3
    NON_FINITE = 4
    NO_IMAGE = 5
    AMBIGUOUS_IMAGE = 6
    TOO_LARGE = 7
    UNKNOWN_FORMAT = 8
    NOT_A_FILE = 9

    @classmethod
    def of(cls, defect: ImageDefect) -> Self:
        """Return the status of a sample whose image has this defect: the one of the same name."""
        return cls[defect.name]


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array.

    Attributes:
        name: its name in the store.
        dtype: its NumPy type.
        row: shape of the values of one sample.
        fill: value of rows without an embedding.
        chunked: whether the rows of a tar are divided into the manifest's chunks, or one chunk.
        logical_dtype: type that the stored numbers stand for, if it is another one.
    """

    name: str
    dtype: str
    row: tuple[int, ...]
    fill: float | int
    chunked: bool = False
    logical_dtype: str | None = None

    def chunk_rows(self, manifest: Manifest) -> int:
        """Return the rows of one chunk."""
        return manifest.chunk_rows if self.chunked else manifest.rows_per_tar


def emb_name(view: int) -> str:
    """Return the name of a view's embeddings: `emb`, `emb_1`, ..."""
    return f"emb_{view}" if view else "emb"


def scale_name(view: int) -> str:
    """Return the name of a view's row scales (int8): `scale`, `scale_1`, ..."""
    return f"scale_{view}" if view else "scale"


def arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return all arrays of a cache by name: embeddings of each view, their scales, hashes, status, crop parameters."""
    dtype = manifest.storage_dtype
    views = manifest.views
    logical = dtype.name if dtype.name != dtype.stored else None
    row = (manifest.dim,)
    specs = [ArraySpec(emb_name(v), dtype.stored, row, dtype.fill, True, logical) for v in range(views.count)]
    if dtype.scaled:
        specs += [ArraySpec(scale_name(v), "float32", (), float("nan")) for v in range(views.count)]
    specs += [
        ArraySpec("key_hash", "uint64", (), 0),
        ArraySpec("image_hash", "uint64", (), 0),
        ArraySpec("status", "uint8", (), RowStatus.ABSENT.value),
    ]
    if views.cropped:
        specs.append(ArraySpec("view_params", "float32", (views.count, N_PARAMS), float("nan")))
    return {spec.name: spec for spec in specs}


def rows_and_chunk(row_bytes: int, largest_tar: int) -> tuple[int, int]:
    """Return rows_per_tar and chunk_rows for rows of so many bytes and tars of up to `largest_tar` samples.

    Chunks have about CHUNK_BYTES, and there are at least MIN_CHUNKS of them, because the last chunk of a smaller tar is
    padded to its full size.
    """
    wanted = round(largest_tar * row_bytes / CHUNK_BYTES)
    n_chunks = min(max(MIN_CHUNKS, wanted), largest_tar)
    chunk_rows = math.ceil(largest_tar / n_chunks)
    return math.ceil(largest_tar / chunk_rows) * chunk_rows, chunk_rows


def tar_files(manifest: Manifest, tar_id: int) -> dict[str, str]:
    """Return the file of each array that holds the rows of one tar, relative to the cache: a Zarr shard each."""
    return {name: f"{STORE}/{name}/c/{tar_id}{'/0' * len(spec.row)}" for name, spec in arrays(manifest).items()}


def stored_rows(manifest: Manifest, spec: ArraySpec, n_samples: int) -> int:
    """Return the rows of an array on disk for a tar of so many samples: a multiple of the chunk."""
    rows = spec.chunk_rows(manifest)
    return math.ceil(n_samples / rows) * rows


def stored_bytes(manifest: Manifest, n_samples: int) -> int:
    """Return the bytes of all files of a tar of so many samples, without its done record."""
    total = 0
    for spec in arrays(manifest).values():
        row_bytes = int(np.dtype(spec.dtype).itemsize * np.prod(spec.row, dtype=np.int64))
        chunk_rows = spec.chunk_rows(manifest)
        rows = stored_rows(manifest, spec, n_samples)
        checksums = 4 * (rows // chunk_rows)
        index = 16 * (manifest.rows_per_tar // chunk_rows) + 4
        total += rows * row_bytes + checksums + index
    return total
