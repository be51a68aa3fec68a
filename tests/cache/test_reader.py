import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from threetowers.cache.contract import Contract, ContractError, Preprocessing, TarEntry, TarTable, to_json
from threetowers.cache.layout import Status, slot_and_chunk
from threetowers.cache.place import place_of
from threetowers.cache.reader import EmbeddingCache
from threetowers.cache.record import Norms, Record, record_name
from threetowers.cache.store import create, write_slot
from threetowers.cache.tars import key_hash


def make_cache(folder: Path, sizes: list[int], dim: int, dtype: str, seed: int = 0) -> list[np.ndarray]:
    """A cache of random rows, every seventh without an embedding; returns the rows of each tar."""
    rng = np.random.default_rng(seed)
    table = TarTable("/tars", tuple(TarEntry(i, f"{i}.tar", 1, n, f"print {i}") for i, n in enumerate(sizes)))
    slot, chunk_rows = slot_and_chunk(dim, dtype, max(sizes))
    transform = Preprocessing((8, 8), "bicubic", 0.9, "center", (0.5,) * 3, (0.5,) * 3)
    contract = Contract("b", "w", "d", transform, dim, dtype, slot, chunk_rows, table.digest, {})  # type: ignore[arg-type]
    place = place_of(folder)
    create(place, contract, len(sizes))
    tars = []
    for i, n in enumerate(sizes):
        emb_nD = (rng.normal(size=(n, dim)) * 3 + 5).astype(dtype)
        status_n = np.where(np.arange(n) % 7 == 6, Status.UNDECODABLE, Status.OK).astype(np.uint8)
        emb_nD[status_n != Status.OK] = np.nan
        keys_n = np.array([key_hash(f"{i}/{k}") for k in range(n)], dtype=np.uint64)
        files, sums = write_slot(place, contract, i, emb_nD, keys_n, status_n)
        record = Record(
            tar_id=i,
            fingerprint=f"print {i}",
            contract=contract.digest,
            n_samples=n,
            n_ok=int((status_n == Status.OK).sum()),
            counts={},
            bad=(),
            ignored_members=0,
            files=files,
            chunk_crc32c=tuple(sums),
            norms=Norms(None, None, None),
            sum=0.0,
            max_abs=0.0,
            tar_xxh3_128="",
            batch_size=1,
            device="cpu",
            seconds=0.0,
            finished="",
            host="",
        )
        place.put(record_name(i), to_json(record), owner=f"{i}.done")
        tars.append(emb_nD)
    place.put("tars.json", to_json(table), owner="contract")
    place.put("manifest.json", to_json(contract), owner="contract")
    return tars


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dim=st.integers(1, 17),
    dtype=st.sampled_from(["float16", "float32"]),
    open_tars=st.integers(1, 3),
)
def test_rows_are_where_the_layout_says(
    sizes: list[int], dim: int, dtype: str, open_tars: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    tars = make_cache(folder, sizes, dim, dtype)
    opened = EmbeddingCache.open(folder, open_tars=open_tars)
    group = zarr.open_group(folder / "store.zarr", mode="r")
    everything, slot = group["emb"][:], opened.contract.slot
    assert everything.shape == (len(sizes) * slot, dim)
    assert everything.dtype == dtype
    for ordinal in range(max(sizes)):
        for tar_id, n in enumerate(sizes):
            stored = everything[tar_id * slot + ordinal] if ordinal < slot else None
            if ordinal >= n:
                assert stored is None or np.isnan(stored).all()
            elif opened.status(tar_id)[ordinal] == Status.OK:
                row = opened.row(tar_id, ordinal, f"{tar_id}/{ordinal}")
                assert row.dtype == np.float32
                assert np.array_equal(row, tars[tar_id][ordinal].astype(np.float32))
                assert np.array_equal(row, stored.astype(np.float32))
    for tar_id in range(len(sizes)):
        assert np.array_equal(opened.tar(tar_id), tars[tar_id].astype(np.float32), equal_nan=True)
    assert len(opened) == sum(sizes)
    assert len(opened._slots) <= open_tars


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    make_cache(folder, [50, 31, 9], 6, "float16")
    return folder


def test_a_row_of_another_key_is_never_handed_out(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    with pytest.raises(ContractError, match=r"tar 1\.tar \(1\), ordinal 4, key '1/5': the row there is of another key"):
        opened.row(1, 4, "1/5")
    with pytest.raises(ContractError, match=r"ordinal 6, key '1/6': no embedding: undecodable"):
        opened.row(1, 6, "1/6")
    for ordinal in (-1, 31):
        with pytest.raises(ContractError, match="the tar has 31 samples"):
            opened.row(1, ordinal, "1/30")


def test_rows_and_statuses_are_copies(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    for change in (lambda: opened.row(0, 3, "0/3"), lambda: opened.status(0), lambda: opened.tar(0)):
        before = change().copy()
        change().fill(1)
        assert np.array_equal(change(), before, equal_nan=True)


def test_moments_are_exact_on_small_caches_and_repeatable(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    rows = np.concatenate([opened.tar(i) for i in range(3)]).astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    mean, std = opened.moments()
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, rows.std(axis=0), rtol=1e-6)
    some = np.concatenate([opened.tar(i) for i in (0, 2)])
    np.testing.assert_allclose(opened.moments([2, 0])[0], some[np.isfinite(some).all(axis=1)].mean(axis=0), rtol=1e-5)
    few = [EmbeddingCache.open(cache).moments(max_rows=20, seed=seed)[0] for seed in (0, 0, 1)]
    assert np.array_equal(few[0], few[1])
    assert not np.array_equal(few[0], few[2])
    assert not np.array_equal(few[0], mean)


def test_a_chunk_is_checked_when_first_touched(tmp_path: Path) -> None:
    make_cache(tmp_path, [64], 5, "float32")
    path = tmp_path / "store.zarr/emb/c/0/0"
    data = bytearray(path.read_bytes())
    data[3 * (8 * 5 * 4 + 4) + 17] ^= 64  # a row of the fourth chunk of 8 rows
    path.write_bytes(data)
    opened = EmbeddingCache.open(tmp_path)
    assert opened.contract.chunk_rows == 8
    assert np.isfinite(opened.row(0, 23, "0/23")).all()
    assert np.isfinite(opened.row(0, 32, "0/32")).all()
    for ordinal in (24, 31, 25):
        with pytest.raises(ContractError, match=r"rows of tar 0\.tar \(0\) are damaged: crc32c of the chunk"):
            opened.row(0, ordinal, f"0/{ordinal}")


def read_all(opened: EmbeddingCache, queue: Any) -> None:
    queue.put([float(opened.row(tar, 3, f"{tar}/3").sum()) for tar in range(3)])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_cache_crosses_into_workers(method: str, cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    expected = [float(opened.row(tar, 3, f"{tar}/3").sum()) for tar in range(3)]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=read_all, args=(opened, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert results == [expected, expected]
    assert len(pickle.dumps(opened)) < 5000


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no cache here .*manifest\.json is missing"):
        EmbeddingCache.open(tmp_path)
