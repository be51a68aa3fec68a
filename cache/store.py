"""The Zarr store: its arrays' metadata, and writing the rows of one tar whole.

Each array has one Zarr shard per tar, so a file has exactly one writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from threetowers.cache import shard
from threetowers.cache.contract import Contract, ContractError
from threetowers.cache.layout import STORE, arrays, slot_files, stored_rows
from threetowers.cache.place import Place
from threetowers.cache.record import FileSum, Record
from threetowers.cache.table import TarEntry, TarTable, read_table

CONTRACT_OWNER = "contract"
Arrays = dict[str, npt.NDArray[Any]]


def empty_group(contract: Contract, n_tars: int, store: MemoryStore) -> zarr.Group:
    """The group of all arrays, without rows."""
    group = zarr.create_group(store, attributes={"row": "tar_id * slot + ordinal", "slot": contract.slot})
    for spec in arrays(contract).values():
        group.create_array(
            spec.name,
            shape=(n_tars * contract.slot, *spec.row),
            dtype=spec.dtype,
            chunks=(spec.chunk_rows(contract), *spec.row),
            shards=(contract.slot, *spec.row),
            compressors=[Crc32cCodec()],
            fill_value=spec.fill,
            attributes={"logical_dtype": spec.logical_dtype} if spec.logical_dtype else None,
        )
    return group


def metadata(contract: Contract, n_tars: int) -> dict[str, bytes]:
    """Each metadata file of the store, by its name in the cache."""
    files: dict[str, Buffer] = {}
    empty_group(contract, n_tars, MemoryStore(files))
    return {
        f"{STORE}/{path}": json.dumps(json.loads(text.to_bytes()), indent=1).encode() + b"\n"
        for path, text in files.items()
    }


def fit_to_table(place: Place, contract: Contract) -> TarTable:
    """Bring the store's metadata to the length of the tar table, and return the table. Rows are not touched.

    Safe beside another that does the same: whoever writes last has seen the longest table.

    Raises:
        WriteError: the place does not take it.
    """
    table = read_table(place)
    while True:
        for name, data in metadata(contract, len(table.entries)).items():
            if place.size(name) != len(data) or place.read(name) != data:
                place.put(name, data, owner=CONTRACT_OWNER)
        again = read_table(place)
        if len(again.entries) == len(table.entries):
            return table
        table = again


def write_slot(
    place: Place, contract: Contract, tar_id: int, rows: Mapping[str, npt.NDArray[np.generic]]
) -> tuple[dict[str, FileSum], dict[str, tuple[int, ...]]]:
    """Write the rows of one tar, (n, ...) of each array by name.

    Returns size and digest of each file, and the crc32c of each chunk of each array of embeddings.

    Raises:
        WriteError: the place does not take it.
    """
    files, sums = {}, {}
    for name, path in slot_files(contract, tar_id).items():
        spec = arrays(contract)[name]
        chunk_rows, n = spec.chunk_rows(contract), len(rows[name])
        padded = np.full(
            (stored_rows(contract, spec, n), *spec.row), spec.fill, dtype=np.dtype(spec.dtype).newbyteorder("<")
        )
        padded[:n] = rows[name]
        data, crcs = shard.encode(padded, chunk_rows, contract.slot // chunk_rows)
        place.put(path, data, owner=f"{tar_id}.{name}")
        files[name] = FileSum.of(data)
        if spec.chunked:
            sums[name] = tuple(crcs)
    return files, sums


def read_slot(
    place: Place, contract: Contract, entry: TarEntry, record: Record, names: Sequence[str] | None = None
) -> Arrays:
    """The rows of a tar, (slot, ...) of each array, or of those named, decoded by zarr-python.

    Raises:
        ContractError: a file is not the one that was written, or zarr cannot read it.
    """
    buffer = default_buffer_prototype().buffer
    content: dict[str, Buffer] = {}
    where = f"tar {entry.path} ({entry.id})"
    first = slot_files(contract, 0)  # each is read as if it were the only slot of its array
    files, wanted = slot_files(contract, entry.id), names or list(arrays(contract))
    for name in wanted:
        path = files[name]
        try:
            data = place.read(path)
        except FileNotFoundError:
            raise ContractError(f"{where}: {path} is missing") from None
        if FileSum.of(data) != record.files[name]:
            raise ContractError(f"{where}: {path} is not the file that was written")
        content[first[name].removeprefix(f"{STORE}/")] = buffer.from_bytes(data)
    group: Any = empty_group(contract, 1, MemoryStore(content))
    try:
        return {name: np.asarray(group[name][:]) for name in wanted}
    except ValueError as error:  # zarr's checksums
        raise ContractError(f"{where}: zarr cannot read it: {error}") from error
