"""The layout of the rows: which arrays a cache has, what a tar has of each, and one file for each array and tar.

In a cache of images each sample has one row, `tar_id * rows_per_tar + ordinal`. In a cache of text each caption has
one, and the rows of a tar are packed: the *run* of sample `ordinal` is `row_end[ordinal - 1]` (0 for the first sample)
to `row_end[ordinal]`, counted from `tar_id * rows_per_tar`.
"""

import enum
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np

from threetowers.cache.format.manifest import Manifest
from threetowers.cache.webdataset.defects import ImageDefect

STORE = "store.zarr"
CHUNK_BYTES = 1 << 20
MIN_CHUNKS = 8
# The last chunk of a tar is padded. All tars but the last have about as many samples, but not as many captions.
MIN_TEXT_CHUNKS = 64
MIN_TEXT_CHUNK_ROWS = 16
TEXT_RESERVE = 4  # times the captions of the densest known tar: a chunk that is reserved and not used costs 16 bytes

Axis = Literal["row", "sample"]


class RowStatus(enum.IntEnum):
    """State of a sample. Only OK ones have an embedding, in all views, or of each caption.

    In a cache of images the rows of the others hold the fill value; in a cache of text these have no rows.
    """

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
    NO_CAPTION = 10

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
        row: shape of the values of one row, or sample.
        fill: value where there is none.
        axis: what it has one value for: each row, or each sample. In a cache of images these are the same.
        chunked: whether what a tar has of it is divided into the manifest's chunks, or one chunk.
        logical_dtype: type that the stored numbers stand for, if it is another one.
    """

    name: str
    dtype: str
    row: tuple[int, ...]
    fill: float | int
    axis: Axis = "row"
    chunked: bool = False
    logical_dtype: str | None = None

    def per_tar(self, manifest: Manifest) -> int:
        """Return the length that is reserved for each tar."""
        return manifest.rows_per_tar if self.axis == "row" else manifest.samples_per_tar

    def chunk_rows(self, manifest: Manifest) -> int:
        """Return the length of one chunk."""
        return manifest.chunk_rows if self.chunked else self.per_tar(manifest)

    def length(self, n_samples: int, n_rows: int) -> int:
        """Return the length of what a tar of so many samples and rows has."""
        return n_rows if self.axis == "row" else n_samples

    def stored_length(self, manifest: Manifest, length: int) -> int:
        """Return this length on disk: a multiple of the chunk."""
        chunk_rows = self.chunk_rows(manifest)
        return math.ceil(length / chunk_rows) * chunk_rows


class TarRoom(NamedTuple):
    """What is reserved for each tar: the fields of the manifest that say so."""

    samples_per_tar: int
    rows_per_tar: int
    chunk_rows: int


def emb_name(view: int) -> str:
    """Return the name of a view's embeddings: `emb`, `emb_1`, ..."""
    return f"emb_{view}" if view else "emb"


def scale_name(view: int) -> str:
    """Return the name of a view's row scales (int8): `scale`, `scale_1`, ..."""
    return f"scale_{view}" if view else "scale"


def params_name(view: int) -> str:
    """Return the name of a view's parameters (crops): `view_params`, `view_params_1`, ..."""
    return f"view_params_{view}" if view else "view_params"


def arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return all arrays of a cache by name.

    These are the embeddings of each view, their scales, hashes, statuses, and the parameters of views; for text also
    where the run of each sample ends, and the hash and the source of each caption.
    """
    specs = _text_arrays(manifest) if manifest.of == "text" else _image_arrays(manifest)
    return {spec.name: spec for spec in specs}


def _image_arrays(manifest: Manifest) -> list[ArraySpec]:
    views = manifest.views
    specs = [_embeddings(manifest, view) for view in range(views.count)]
    if manifest.storage_dtype.scaled:
        specs += [ArraySpec(scale_name(view), "float32", (), float("nan")) for view in range(views.count)]
    specs += [
        ArraySpec("key_hash", "uint64", (), 0, "sample"),
        ArraySpec("image_hash", "uint64", (), 0, "sample"),
        ArraySpec("status", "uint8", (), RowStatus.ABSENT.value, "sample"),
    ]
    if views.cropped:
        row = (views.n_params,)
        specs += [ArraySpec(params_name(view), "float32", row, float("nan"), "sample") for view in range(views.count)]
    return specs


def _text_arrays(manifest: Manifest) -> list[ArraySpec]:
    specs = [_embeddings(manifest, 0)]
    if manifest.storage_dtype.scaled:
        specs.append(ArraySpec(scale_name(0), "float32", (), float("nan"), chunked=True))
    return [
        *specs,
        ArraySpec("caption_hash", "uint64", (), 0, chunked=True),
        ArraySpec("caption_source", "uint8", (), 0, chunked=True),
        ArraySpec("key_hash", "uint64", (), 0, "sample"),
        ArraySpec("status", "uint8", (), RowStatus.ABSENT.value, "sample"),
        ArraySpec("row_end", "uint32", (), 0, "sample"),
    ]


def _embeddings(manifest: Manifest, view: int) -> ArraySpec:
    dtype = manifest.storage_dtype
    logical = dtype.name if dtype.name != dtype.stored else None
    return ArraySpec(emb_name(view), dtype.stored, (manifest.dim,), dtype.fill, chunked=True, logical_dtype=logical)


def image_room(row_bytes: int, largest_tar: int) -> TarRoom:
    """Return the room of each tar for rows of so many bytes and tars of up to `largest_tar` samples.

    Chunks have about CHUNK_BYTES, and there are at least MIN_CHUNKS of them, because the last chunk of a smaller tar is
    padded to its full size.
    """
    wanted = round(largest_tar * row_bytes / CHUNK_BYTES)
    n_chunks = min(max(MIN_CHUNKS, wanted), largest_tar)
    chunk_rows = math.ceil(largest_tar / n_chunks)
    rows_per_tar = math.ceil(largest_tar / chunk_rows) * chunk_rows
    return TarRoom(rows_per_tar, rows_per_tar, chunk_rows)


def text_room(row_bytes: int, largest_tar: int, captions: int, rows_per_tar: int | None = None) -> TarRoom:
    """Return the room of each tar in a cache of text.

    Chunks have about CHUNK_BYTES, or less, so that the padding of the last one is a small part of a tar.

    Args:
        row_bytes: of the embedding of a caption.
        largest_tar: samples of the largest tar.
        captions: of the densest of the tars whose captions were counted.
        rows_per_tar: captions for which each tar has room; None: TEXT_RESERVE times as many as were counted.
    """
    wanted = max(MIN_TEXT_CHUNKS, round(captions * row_bytes / CHUNK_BYTES))
    chunk_rows = max(MIN_TEXT_CHUNK_ROWS, math.ceil(captions / wanted))
    n_chunks = math.ceil((rows_per_tar or max(1, TEXT_RESERVE * captions)) / chunk_rows)
    return TarRoom(largest_tar, n_chunks * chunk_rows, chunk_rows)


def tar_files(manifest: Manifest, tar_id: int) -> dict[str, str]:
    """Return the file of each array that holds what one tar has, relative to the cache: a Zarr shard each."""
    return {name: f"{STORE}/{name}/c/{tar_id}{'/0' * len(spec.row)}" for name, spec in arrays(manifest).items()}


def stored_bytes(manifest: Manifest, n_samples: int, n_rows: int) -> int:
    """Return the bytes of all files of a tar of so many samples and rows, without its done record."""
    total = 0
    for spec in arrays(manifest).values():
        row_bytes = np.dtype(spec.dtype).itemsize * math.prod(spec.row)
        chunk_rows = spec.chunk_rows(manifest)
        length = spec.stored_length(manifest, spec.length(n_samples, n_rows))
        checksums = 4 * (length // chunk_rows)
        index = 16 * (spec.per_tar(manifest) // chunk_rows) + 4
        total += length * row_bytes + checksums + index
    return total
