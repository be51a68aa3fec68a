"""The shard format is that of Zarr: zarr-python reads our shards, and we read its shards."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from threetowers.cache.format import shard
from threetowers.cache.format.layout import image_room, text_room


def zarr_array(store: MemoryStore, slots: int, n_chunks: int, chunk_rows: int, dim: int, dtype: str) -> zarr.Array:
    return zarr.create_array(
        store,
        shape=(slots * n_chunks * chunk_rows, dim),
        dtype=dtype,
        shards=(n_chunks * chunk_rows, dim),
        chunks=(chunk_rows, dim),
        compressors=[Crc32cCodec()],
        fill_value=float("nan"),
    )


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 3),
    n_chunks=st.integers(1, 5),
    chunk_rows=st.integers(1, 7),
    dim=st.integers(1, 9),
    dtype=st.sampled_from(["float16", "float32"]),
    data=st.data(),
)
def test_shards_are_exchangeable_with_zarr_python(
    slots: int, n_chunks: int, chunk_rows: int, dim: int, dtype: str, data: st.DataObject
) -> None:
    files: dict[str, zarr.core.buffer.Buffer] = {}
    array = zarr_array(MemoryStore(files), slots, n_chunks, chunk_rows, dim, dtype)
    slot_rows = n_chunks * chunk_rows
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for slot in range(slots):
        stored = data.draw(st.integers(1, n_chunks))
        rows = rng.normal(size=(stored * chunk_rows, dim)).astype(dtype)
        array[slot * slot_rows : slot * slot_rows + len(rows)] = rows
        key = f"c/{slot}/0"
        theirs = np.frombuffer(files[key].to_bytes(), np.uint8)
        ours_bytes, sums = shard.encode(rows, chunk_rows, n_chunks)
        ours = np.frombuffer(ours_bytes, np.uint8)
        chunk_bytes = chunk_rows * dim * rows.itemsize
        for written in (theirs, ours):
            offsets = shard.chunk_offsets(written, n_chunks, stored, chunk_bytes).tolist()
            read = [shard.chunk(written, at, chunk_bytes, sums[i]).tobytes() for i, at in enumerate(offsets)]
            assert b"".join(read) == rows.tobytes()
        files[key] = type(files[key]).from_bytes(ours_bytes)
        again = array[slot * slot_rows : (slot + 1) * slot_rows]
        assert np.array_equal(again[: len(rows)], rows)
        assert np.isnan(again[len(rows) :]).all()


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_detected(at: int, bit: int) -> None:
    rows = np.arange(35, dtype=np.float32).reshape(7, 5)
    data, _ = shard.encode(rows[:6], 2, 4)
    broken = bytearray(data)
    broken[at % len(data)] ^= 1 << bit
    view = np.frombuffer(bytes(broken), np.uint8)
    with pytest.raises(shard.BadShard):
        [shard.chunk(view, offset, 40) for offset in shard.chunk_offsets(view, 4, 3, 40).tolist()]


def test_wrong_length_and_a_chunk_from_elsewhere() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    data, sums = shard.encode(rows, 2, 3)
    view = np.frombuffer(data, np.uint8)
    offsets = shard.chunk_offsets(view, 3, 3, 16)
    with pytest.raises(shard.BadShard, match="belongs elsewhere"):
        shard.chunk(view, int(offsets[1]), 16, sums[0])
    for wrong in (view[:-1], np.zeros(0, np.uint8)):
        with pytest.raises(shard.BadShard, match="expected"):
            shard.chunk_offsets(wrong, 3, 3, 16)


@settings(max_examples=200, deadline=None)
@given(row_bytes=st.integers(1, 32768), largest=st.integers(1, 200_000))
def test_rows_per_tar_are_complete_chunks_for_the_largest_tar(row_bytes: int, largest: int) -> None:
    samples, slot, chunk_rows = image_room(row_bytes, largest)
    assert samples == slot
    assert slot % chunk_rows == 0
    assert largest <= slot < largest + chunk_rows
    assert slot - largest < max(8, largest * row_bytes / 2**20 + 1), "less than a row for each chunk is left over"
    assert chunk_rows <= -(-largest // 8)
    assert chunk_rows == 1 or chunk_rows * row_bytes < 1.6 * 2**20 + row_bytes


@settings(max_examples=200, deadline=None)
@given(row_bytes=st.integers(1, 32768), largest=st.integers(1, 20_000), captions=st.integers(0, 400_000))
def test_a_tar_of_text_has_room_for_more_captions(row_bytes: int, largest: int, captions: int) -> None:
    samples, rows, chunk_rows = text_room(row_bytes, largest, captions)
    assert samples == largest
    assert rows % chunk_rows == 0
    assert max(1, 4 * captions) <= rows < 4 * captions + chunk_rows + 1
    assert chunk_rows == 16 or (chunk_rows - 1) * 64 < captions
    assert chunk_rows == 16 or chunk_rows * row_bytes < 1.6 * 2**20 + row_bytes
    wanted = text_room(row_bytes, largest, captions, rows_per_tar=1000)
    assert wanted.chunk_rows == chunk_rows
    assert 1000 <= wanted.rows_per_tar < 1000 + chunk_rows


def test_no_padding_is_stored_beyond_the_last_chunk(tmp_path: Path) -> None:
    data, sums = shard.encode(np.zeros((4, 8), np.float16), 2, 500)
    assert len(data) == 2 * (2 * 8 * 2 + 4) + 500 * 16 + 4
    assert len(sums) == 2
