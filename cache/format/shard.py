"""The bytes of one Zarr v3 shard without a compressor: chunks of rows, each followed by its crc32c, then an index.

Zarr-python reads and writes the same format. It is implemented here so that the bytes of a cache do not depend on the
release that wrote them, and so that one row can be read from a memory map in microseconds. The index at the end is
(offset, size) per chunk as little-endian uint64, all ones where a chunk is absent, and its own crc32c
(Zarr's sharding_indexed codec, with `bytes` and `crc32c` inside).
"""

import google_crc32c
import numpy as np
import numpy.typing as npt

CRC = 4
ABSENT_CHUNK = np.uint64(2**64 - 1)


class BadShard(ValueError):
    """Bytes that are not a complete, undamaged shard."""


def encode(rows: npt.NDArray[np.generic], chunk_rows: int, n_chunks: int) -> tuple[bytes, list[int]]:
    """Return the shard that begins with `rows`, a multiple of `chunk_rows`, and the crc32c of each of its chunks."""
    index = np.full((n_chunks, 2), ABSENT_CHUNK, dtype="<u8")
    parts: list[bytes] = []
    sums: list[int] = []
    offset = 0
    for i in range(len(rows) // chunk_rows):
        payload = np.ascontiguousarray(rows[i * chunk_rows : (i + 1) * chunk_rows]).tobytes()
        sums.append(google_crc32c.value(payload))
        parts += [payload, sums[-1].to_bytes(CRC, "little")]
        index[i] = offset, len(payload) + CRC
        offset += len(payload) + CRC
    table = index.tobytes()
    return b"".join([*parts, table, google_crc32c.value(table).to_bytes(CRC, "little")]), sums


def chunk_offsets(
    shard: npt.NDArray[np.uint8], n_chunks: int, n_stored: int, chunk_bytes: int
) -> npt.NDArray[np.int64]:
    """Return the offsets of the first `n_stored` chunks of a shard, from its checked index.

    Raises:
        BadShard: the shard has another length, a damaged index, or other chunks than expected.
    """
    length = n_stored * (chunk_bytes + CRC) + n_chunks * 16 + CRC
    if len(shard) != length:
        raise BadShard(f"expected {length} bytes, found {len(shard)}")
    table = shard[length - CRC - n_chunks * 16 : length - CRC].tobytes()
    if google_crc32c.value(table).to_bytes(CRC, "little") != shard[length - CRC :].tobytes():
        raise BadShard("crc32c of the shard index does not match")
    index = np.frombuffer(table, dtype="<u8").reshape(n_chunks, 2)
    stored, absent = index[:n_stored], index[n_stored:]
    sizes_fit = (stored[:, 1] == chunk_bytes + CRC).all() and (absent == ABSENT_CHUNK).all()
    if not sizes_fit or (stored[:, 0] + stored[:, 1] > len(shard)).any():
        raise BadShard(f"expected {n_stored} chunks of {chunk_bytes} bytes in the shard index, found others")
    return stored[:, 0].astype(np.int64)


def chunk(
    shard: npt.NDArray[np.uint8], offset: int, chunk_bytes: int, expected: int | None = None
) -> npt.NDArray[np.uint8]:
    """Return the bytes of the chunk at `offset`, without a copy, after checking its crc32c.

    Args:
        shard: the bytes of the shard.
        offset: start of the chunk.
        chunk_bytes: length of the chunk without its checksum.
        expected: crc32c that the chunk should have, if known from elsewhere.

    Raises:
        BadShard: the chunk is damaged, or is intact but another one than expected.
    """
    payload = shard[offset : offset + chunk_bytes]
    found = google_crc32c.value(payload)
    if found.to_bytes(CRC, "little") != shard[offset + chunk_bytes : offset + chunk_bytes + CRC].tobytes():
        raise BadShard(f"crc32c of the chunk at byte {offset} does not match")
    if expected is not None and found != expected:
        raise BadShard(
            f"the chunk at byte {offset} is intact but belongs elsewhere (crc32c {found}, expected {expected})"
        )
    return payload
