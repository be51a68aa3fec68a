"""Where the rows of a tar lie: row `tar_id * slot + ordinal`, and one file per array and tar."""

from __future__ import annotations

import enum
import math

import numpy as np

STORE = "store.zarr"
CHUNK_BYTES = 1 << 20


class Status(enum.IntEnum):
    """What a row holds. Only OK rows carry an embedding; all others are NaN."""

    ABSENT = 0
    OK = 1
    UNDECODABLE = 2
    FILTERED = 3
    NON_FINITE = 4


def slot_and_chunk(dim: int, dtype: str, largest_tar: int) -> tuple[int, int]:
    """(slot, chunk_rows) in rows: chunks of about CHUNK_BYTES, a power of two, and no more than an eighth of the
    largest tar, because a tar's last chunk is padded to its full size."""
    wanted = CHUNK_BYTES / (dim * np.dtype(dtype).itemsize)
    chunk_rows = 2 ** max(0, min(round(math.log2(wanted)), math.floor(math.log2(largest_tar / 8))))
    return math.ceil(largest_tar / chunk_rows) * chunk_rows, chunk_rows


def slot_files(tar_id: int) -> dict[str, str]:
    """The file of each array that holds the rows of one tar, relative to the cache folder: a Zarr shard each."""
    return {
        "emb": f"{STORE}/emb/c/{tar_id}/0",
        "key_hash": f"{STORE}/key_hash/c/{tar_id}",
        "status": f"{STORE}/status/c/{tar_id}",
    }
