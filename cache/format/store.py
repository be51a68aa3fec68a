"""The Zarr store: the metadata of its arrays, and the rows of one tar, written at once.

Each array has one Zarr shard per tar, so a file has exactly one writer.
"""

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
from threetowers.cache.format.layout import STORE, arrays, tar_files
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.format.tar_table import TarEntry, TarTable, read_table
from threetowers.cache.storage.storage import Storage

MANIFEST_OWNER = "manifest"
Arrays = dict[str, npt.NDArray[Any]]


def empty_group(manifest: Manifest, n_tars: int, store: MemoryStore) -> zarr.Group:
    """Create the group of all arrays, without rows."""
    group = zarr.create_group(store, attributes=_addresses(manifest))
    for spec in arrays(manifest).values():
        per_tar = spec.per_tar(manifest)
        group.create_array(
            spec.name,
            shape=(n_tars * per_tar, *spec.row),
            dtype=spec.dtype,
            chunks=(spec.chunk_rows(manifest), *spec.row),
            shards=(per_tar, *spec.row),
            compressors=[Crc32cCodec()],
            fill_value=spec.fill,
            attributes={"logical_dtype": spec.logical_dtype} if spec.logical_dtype else None,
        )
    return group


def _addresses(manifest: Manifest) -> dict[str, str | int]:
    """Return what tells other readers of the store which rows are whose."""
    if manifest.of == "image":
        return {"row": "tar_id * rows_per_tar + ordinal", "rows_per_tar": manifest.rows_per_tar}
    return {
        "sample": "tar_id * samples_per_tar + ordinal: key_hash, status, row_end",
        "row": "tar_id * rows_per_tar + r, r from row_end[sample - 1] (0 for ordinal 0) to row_end[sample]: the others",
        "samples_per_tar": manifest.samples_per_tar,
        "rows_per_tar": manifest.rows_per_tar,
    }


def metadata(manifest: Manifest, n_tars: int) -> dict[str, bytes]:
    """Return each metadata file of the store, by its name in the cache."""
    files: dict[str, Buffer] = {}
    empty_group(manifest, n_tars, MemoryStore(files))
    return {
        f"{STORE}/{path}": json.dumps(json.loads(text.to_bytes()), indent=1).encode() + b"\n"
        for path, text in files.items()
    }


def fit_to_table(storage: Storage, manifest: Manifest) -> TarTable:
    """Bring the store's metadata to the length of the tar table, and return the table. Rows are not touched.

    Several processes may do this at once: the last to write has read the longest table.

    Raises:
        WriteError: the storage cannot be written.
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


def write_tar_rows(
    storage: Storage, manifest: Manifest, tar_id: int, rows: Mapping[str, npt.NDArray[np.generic]]
) -> tuple[dict[str, FileSum], dict[str, tuple[int, ...]]]:
    """Write what one tar has of each array, by name: (rows, ...) or (samples, ...).

    Returns:
        Size and digest of each file, and the crc32c of each chunk of each array that is divided into chunks.

    Raises:
        WriteError: the storage cannot be written.
    """
    files = {}
    sums = {}
    for name, path in tar_files(manifest, tar_id).items():
        spec = arrays(manifest)[name]
        chunk_rows = spec.chunk_rows(manifest)
        n = len(rows[name])
        shape = (spec.stored_length(manifest, n), *spec.row)
        padded = np.full(shape, spec.fill, dtype=np.dtype(spec.dtype).newbyteorder("<"))
        padded[:n] = rows[name]
        data, crcs = shard.encode(padded, chunk_rows, spec.per_tar(manifest) // chunk_rows)
        storage.put(path, data, owner=f"{tar_id}.{name}")
        files[name] = FileSum.of(data)
        if spec.chunked:
            sums[name] = tuple(crcs)
    return files, sums


def read_tar_rows(
    storage: Storage, manifest: Manifest, entry: TarEntry, record: DoneRecord, names: Sequence[str] | None = None
) -> Arrays:
    """Read what a tar has of each array, or of those named, decoded by zarr-python.

    The arrays are as long as they are on disk (`ArraySpec.stored_length`), with the padding after the last row.

    Raises:
        ManifestError: a file is missing or not the one that was written, or zarr cannot read it.
    """
    buffer = default_buffer_prototype().buffer
    content: dict[str, Buffer] = {}
    where = f"tar {entry.path} ({entry.id})"
    first = tar_files(manifest, 0)  # the tar is read as if it were the only one of each array
    files = tar_files(manifest, entry.id)
    wanted = names or list(arrays(manifest))
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
        return {name: np.asarray(group[name][: _stored(manifest, record, name)]) for name in wanted}
    except ValueError as error:  # zarr's checksums
        raise ManifestError(f"{where}: zarr cannot read it: {error}") from error


def _stored(manifest: Manifest, record: DoneRecord, name: str) -> int:
    spec = arrays(manifest)[name]
    return spec.stored_length(manifest, spec.length(record.n_samples, record.n_rows))
