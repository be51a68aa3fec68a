"""The Zarr store: its arrays' metadata, and writing the rows of one tar whole.

Each array has one Zarr shard per tar, so a file has exactly one writer.
"""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from threetowers.cache import shard
from threetowers.cache.contract import Contract
from threetowers.cache.layout import STORE, slot_files
from threetowers.cache.place import Place
from threetowers.cache.record import FileSum

CONTRACT_OWNER = "contract"


def empty_group(contract: Contract, n_tars: int, store: MemoryStore) -> zarr.Group:
    """The group of the three arrays, without rows."""
    group = zarr.create_group(store, attributes={"row": "tar_id * slot + ordinal", "slot": contract.slot})
    rows = n_tars * contract.slot
    for name, dtype, shape, chunks, fill in (
        ("emb", contract.dtype, (rows, contract.dim), (contract.chunk_rows, contract.dim), float("nan")),
        ("key_hash", "uint64", (rows,), (contract.slot,), 0),
        ("status", "uint8", (rows,), (contract.slot,), 0),
    ):
        group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=(contract.slot, *shape[1:]),
            compressors=[Crc32cCodec()],
            fill_value=fill,
        )
    return group


def create(place: Place, contract: Contract, n_tars: int) -> None:
    """Write the metadata of the store (not the rows).

    Raises:
        WriteError: the place does not take it.
    """
    files: dict[str, Buffer] = {}
    empty_group(contract, n_tars, MemoryStore(files))
    for path, text in files.items():
        data = json.dumps(json.loads(text.to_bytes()), indent=1).encode() + b"\n"
        place.put(f"{STORE}/{path}", data, owner=CONTRACT_OWNER)


def write_slot(
    place: Place,
    contract: Contract,
    tar_id: int,
    emb_nD: npt.NDArray[np.floating],
    key_hash_n: npt.NDArray[np.uint64],
    status_n: npt.NDArray[np.uint8],
) -> tuple[dict[str, FileSum], list[int]]:
    """Write the rows of one tar: size and digest of each file, and the crc32c of each chunk of embeddings.

    Raises:
        WriteError: the place does not take it.
    """
    n, slot, rows = len(status_n), contract.slot, contract.chunk_rows
    emb = np.full((math.ceil(n / rows) * rows, contract.dim), np.nan, dtype=np.dtype(contract.dtype).newbyteorder("<"))
    emb[:n] = emb_nD
    padded_hash, padded_status = np.zeros(slot, dtype="<u8"), np.zeros(slot, dtype="u1")
    padded_hash[:n], padded_status[:n] = key_hash_n, status_n
    encoded = {
        "emb": shard.encode(emb, rows, slot // rows),
        "key_hash": shard.encode(padded_hash, slot, 1),
        "status": shard.encode(padded_status, slot, 1),
    }
    sums = {}
    for name, path in slot_files(tar_id).items():
        data, _ = encoded[name]
        place.put(path, data, owner=f"{tar_id}.{name}")
        sums[name] = FileSum.of(data)
    return sums, encoded["emb"][1]
