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

from threetowers.cache.format import shard
from threetowers.cache.format.done_record import DoneRecord, FileSum
from threetowers.cache.format.layout import STORE, arrays, slot_files, stored_rows
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.format.tar_table import TarEntry, TarTable, read_table
from threetowers.cache.storage.storage import Storage

MANIFEST_OWNER = "manifest"
Arrays = dict[str, npt.NDArray[Any]]


def empty_group(manifest: Manifest, n_tars: int, store: MemoryStore) -> zarr.Group:
    """The group of all arrays, without rows."""
    group = zarr.create_group(store, attributes={"row": "tar_id * slot + ordinal", "slot": manifest.slot})
    for spec in arrays(manifest).values():
        group.create_array(
            spec.name,
            shape=(n_tars * manifest.slot, *spec.row),
            dtype=spec.dtype,
            chunks=(spec.chunk_rows(manifest), *spec.row),
            shards=(manifest.slot, *spec.row),
            compressors=[Crc32cCodec()],
            fill_value=spec.fill,
            attributes={"logical_dtype": spec.logical_dtype} if spec.logical_dtype else None,
        )
    return group


def metadata(manifest: Manifest, n_tars: int) -> dict[str, bytes]:
    """Each metadata file of the store, by its name in the cache."""
    files: dict[str, Buffer] = {}
    empty_group(manifest, n_tars, MemoryStore(files))
    return {
        f"{STORE}/{path}": json.dumps(json.loads(text.to_bytes()), indent=1).encode() + b"\n"
        for path, text in files.items()
    }


def fit_to_table(storage: Storage, manifest: Manifest) -> TarTable:
    """Bring the store's metadata to the length of the tar table, and return the table. Rows are not touched.

    Safe beside another that does the same: whoever writes last has seen the longest table.

    Raises:
        WriteError: the place does not take it.
    """
    table = read_table(storage)
    while True:
        for name, data in metadata(manifest, len(table.entries)).items():
            if storage.size(name) != len(data) or storage.read(name) != data:
                storage.put(name, data, owner=MANIFEST_OWNER)
        again = read_table(storage)
        if len(again.entries) == len(table.entries):
            return table
        table = again


def write_slot(
    storage: Storage, manifest: Manifest, tar_id: int, rows: Mapping[str, npt.NDArray[np.generic]]
) -> tuple[dict[str, FileSum], dict[str, tuple[int, ...]]]:
    """Write the rows of one tar, (n, ...) of each array by name.

    Returns size and digest of each file, and the crc32c of each chunk of each array of embeddings.

    Raises:
        WriteError: the place does not take it.
    """
    files, sums = {}, {}
    for name, path in slot_files(manifest, tar_id).items():
        spec = arrays(manifest)[name]
        chunk_rows, n = spec.chunk_rows(manifest), len(rows[name])
        padded = np.full(
            (stored_rows(manifest, spec, n), *spec.row), spec.fill, dtype=np.dtype(spec.dtype).newbyteorder("<")
        )
        padded[:n] = rows[name]
        data, crcs = shard.encode(padded, chunk_rows, manifest.slot // chunk_rows)
        storage.put(path, data, owner=f"{tar_id}.{name}")
        files[name] = FileSum.of(data)
        if spec.chunked:
            sums[name] = tuple(crcs)
    return files, sums


def read_slot(
    storage: Storage, manifest: Manifest, entry: TarEntry, record: DoneRecord, names: Sequence[str] | None = None
) -> Arrays:
    """The rows of a tar, (slot, ...) of each array, or of those named, decoded by zarr-python.

    Raises:
        ContractError: a file is not the one that was written, or zarr cannot read it.
    """
    buffer = default_buffer_prototype().buffer
    content: dict[str, Buffer] = {}
    where = f"tar {entry.path} ({entry.id})"
    first = slot_files(manifest, 0)  # each is read as if it were the only slot of its array
    files, wanted = slot_files(manifest, entry.id), names or list(arrays(manifest))
    for name in wanted:
        path = files[name]
        try:
            data = storage.read(path)
        except FileNotFoundError:
            raise ManifestError(f"{where}: {path} is missing") from None
        if FileSum.of(data) != record.files[name]:
            raise ManifestError(f"{where}: {path} is not the file that was written")
        content[first[name].removeprefix(f"{STORE}/")] = buffer.from_bytes(data)
    group: Any = empty_group(manifest, 1, MemoryStore(content))
    try:
        return {name: np.asarray(group[name][:]) for name in wanted}
    except ValueError as error:  # zarr's checksums
        raise ManifestError(f"{where}: zarr cannot read it: {error}") from error
