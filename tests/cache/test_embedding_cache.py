import copy
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.caches import DTYPES, make_cache
from threetowers.cache.format.dtypes import storage_dtype
from threetowers.cache.format.layout import STORE
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.read.stream import SharedRows, TarRows, stream_rows
from threetowers.cache.storage.local import LocalStorage
from threetowers.cache.storage.storage import open_storage


def stored(rows_nD: np.ndarray, dtype: str) -> np.ndarray:
    """Rows as a reader of this precision sees them."""
    number = storage_dtype(dtype)
    return number.decode(*number.encode(rows_nD))


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dim=st.integers(2, 17),
    dtype=st.sampled_from(DTYPES),
    policy=st.sampled_from(["center", "center+flip", "crops:3"]),
    open_tars=st.integers(1, 3),
    remote=st.booleans(),
)
def test_rows_are_at_the_addresses_of_the_layout(
    sizes: list[int],
    dim: int,
    dtype: str,
    policy: str,
    open_tars: int,
    remote: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    where = f"memory://{folder}" if remote else folder
    views = Views(policy, 1, 0.3) if policy == "crops:3" else Views(policy)
    tars = make_cache(where, sizes, dim, dtype, views)
    opened = EmbeddingCache.open(where, open_tars=open_tars, memory=2000)
    rows_per_tar = opened.manifest.rows_per_tar
    for view in range(views.count):
        everything = opened.array(view)[:]
        assert everything.shape == (len(sizes) * rows_per_tar, dim)
        for tar_id, n in enumerate(sizes):
            expected = stored(tars[tar_id][:, view], dtype)
            assert np.array_equal(opened.tar(tar_id, view), expected, equal_nan=True)
            good = np.flatnonzero(np.arange(n) % 7 != 6)
            keys = [f"{tar_id}/{ordinal}" for ordinal in good]
            rows = opened.rows([tar_id] * len(good), good, keys, view)
            assert rows.dtype == np.float32
            assert np.array_equal(rows, expected[good])
            for ordinal in good[:3].tolist():
                assert np.array_equal(opened.row(tar_id, ordinal, f"{tar_id}/{ordinal}", view), expected[ordinal])
                if dtype in ("float16", "float32"):
                    assert np.array_equal(everything[tar_id * rows_per_tar + ordinal], expected[ordinal].astype(dtype))
            if views.cropped:
                assert np.array_equal(opened.view_params(tar_id, n - 1, view), views.params(n - 1, 40, 30)[view])
    assert len(opened) == sum(sizes)
    assert opened.finished() == list(range(len(sizes)))
    assert max(len(opened._columns), len(opened._shards)) <= open_tars
    assert len(opened._shards) == 1 or sum(block.nbytes for block in opened._shards.values()) <= 2000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    make_cache(folder, [50, 31, 9], 6)
    return folder


@pytest.fixture(scope="module")
def remote(cache: Path) -> str:
    """The same, at a URL."""
    storage, url = LocalStorage(cache), f"memory://{cache}"
    for name in storage.walk():
        open_storage(url).put(name, storage.read(name), owner="copy")
    return url


def test_rows_are_given_in_the_order_asked(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    tars, ordinals = np.array([2, 0, 1, 0, 0, 2]), np.array([3, 49, 30, 0, 21, 3])
    keys = [f"{tar}/{ordinal}" for tar, ordinal in zip(tars, ordinals, strict=True)]
    rows = opened.rows(tars, ordinals, keys)
    assert np.array_equal(rows, np.stack([opened.row(*at) for at in zip(tars, ordinals, keys, strict=True)]))
    assert np.array_equal(rows, opened.rows(tars.tolist(), ordinals.tolist()))
    assert opened.rows([], []).shape == (0, 6)
    for wrong, message in (
        (([0, 0], [0, 6], None), r"tar 0\.tar \(0\), ordinal 6: no embedding: undecodable"),
        (([0, 1], [0, 3], ["0/0", "1/2"]), r"ordinal 3, key '1/2': the row there is of another key"),
        (([1], [31], None), "the tar has 31 samples"),
        (([1], [-1], None), "the tar has 31 samples"),
    ):
        with pytest.raises(ManifestError, match=message):
            opened.rows(*wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 keys: expected one of each"):
        opened.rows([0, 0], [0, 1], ["0/0"])


def test_a_sample_is_found_by_its_key(cache: Path, tmp_path: Path) -> None:
    opened = EmbeddingCache.open(cache)
    assert opened.find("1/30") == (1, 30)
    assert opened.find("0/6") == (0, 6)  # found, though it has no embedding
    with pytest.raises(ManifestError, match="no sample '3/0' in the 3 tars that are built"):
        opened.find("3/0")
    make_cache(tmp_path, [4, 4], 3)
    twice = EmbeddingCache.open(tmp_path)
    twice.columns(1).key_hash_n[2] = twice.columns(0).key_hash_n[3]
    with pytest.raises(ManifestError, match=r"several tars have a sample '0/3': \['0\.tar', '1\.tar'\]"):
        twice.find("0/3")


def test_an_unknown_view_is_refused(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    for read in (opened.array, lambda v: opened.tar(0, v), lambda v: opened.row(0, 0, "0/0", v)):
        with pytest.raises(ValueError, match=r"view 1: expected 0 to 0 \(views: center\)"):
            read(1)


def test_a_row_of_another_key_is_never_returned(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    with pytest.raises(ManifestError, match=r"tar 1\.tar \(1\), ordinal 4, key '1/5': the row there is of another key"):
        opened.row(1, 4, "1/5")
    with pytest.raises(ManifestError, match=r"ordinal 6, key '1/6': no embedding: undecodable"):
        opened.row(1, 6, "1/6")
    for ordinal in (-1, 31):
        with pytest.raises(ManifestError, match="the tar has 31 samples"):
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
    in_double, covariance = opened.covariance()
    np.testing.assert_allclose(in_double, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-12)
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
    for whole in (opened.tar, opened.shard_rows):
        with pytest.raises(ManifestError, match=r"rows of tar 0\.tar \(0\) are damaged: .* is not the file that was"):
            whole(0)
    assert opened.manifest.chunk_rows == 8
    assert np.isfinite(opened.row(0, 23, "0/23")).all()
    assert np.isfinite(opened.row(0, 32, "0/32")).all()
    for ordinal in (24, 31, 25):
        with pytest.raises(ManifestError, match=r"rows of tar 0\.tar \(0\) are damaged: .*crc32c of the chunk"):
            opened.row(0, ordinal, f"0/{ordinal}")


def test_a_shard_of_another_cache_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_cache(tmp_path / name, [64], 5, seed=ord(name))
    (tmp_path / "b/store.zarr/emb/c/0/0").replace(tmp_path / "a/store.zarr/emb/c/0/0")
    with pytest.raises(ManifestError, match="is intact but belongs elsewhere"):
        EmbeddingCache.open(tmp_path / "a").row(0, 0, "0/0")


def read_all(opened: EmbeddingCache, queue: Any) -> None:
    rows = [float(opened.row(tar, 3, f"{tar}/3").sum()) for tar in range(3)]
    queue.put([*rows, *(float(np.nansum(rows.shard.rows_nD)) for rows in stream_rows(opened, [0, 1, 2]))])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_cache_works_in_child_processes(method: str, cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    read_all(opened, queue)
    workers = [context.Process(target=read_all, args=(opened, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    expected, *results = [queue.get(timeout=60) for _ in range(3)]
    for worker in workers:
        worker.join()
    assert results == [expected, expected]
    assert len(pickle.dumps(opened)) < 5000


def read_epochs(folder: Path, queue: Any) -> None:
    opened = EmbeddingCache.open(folder, open_tars=3)
    for _ in range(6):
        for tar_id in np.random.default_rng(0).permutation(8).tolist():
            opened.rows([tar_id] * 600, np.arange(600) // 7 * 7)
        assert sum(len(rows) for rows in stream_rows(opened, range(8))) == 8 * 600
        lines = Path("/proc/self/status").read_text().splitlines()
        queue.put(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")))


def test_memory_stays_flat_over_epochs(tmp_path: Path) -> None:
    make_cache(tmp_path, [600] * 8, 256)  # 0.3 MB a tar: one that is kept each time would be 10 MB in the end
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=read_epochs, args=(tmp_path, queue))
    worker.start()
    kilobytes = [queue.get(timeout=120) for _ in range(6)]
    worker.join()
    assert max(kilobytes) < 1.02 * kilobytes[1]


def test_a_remote_cache_is_fetched_a_shard_at_a_time(cache: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local, fetched = EmbeddingCache.open(cache), EmbeddingCache.open(remote)
    requests: list[str] = []
    read = type(fetched.storage).read
    monkeypatch.setattr(
        type(fetched.storage),
        "read",
        lambda storage, name, *part: (requests.append(name), read(storage, name, *part))[1],
    )
    for tar, ordinal in [(0, 3), (2, 1), (0, 44), (1, 30), (0, 9), (2, 8)]:
        key = f"{tar}/{ordinal}"
        assert np.array_equal(fetched.row(tar, ordinal, key), local.row(tar, ordinal, key))
    assert sorted(name for name in requests if "/emb/" in name) == [f"{STORE}/emb/c/{tar}/0" for tar in range(3)]
    assert np.array_equal(fetched.tar(1), local.tar(1), equal_nan=True)
    assert fetched.find("2/5") == (2, 5)
    assert np.array_equal(fetched.array()[:9], local.array()[:9], equal_nan=True)
    damaged = copy.copy(fetched)
    name = f"{STORE}/emb/c/1/0"
    fetched.storage.put(name, fetched.storage.read(name)[:-1] + b"?", owner="test")
    with pytest.raises(ManifestError, match=r"rows of tar 1\.tar \(1\) are damaged: memory://.* is not the file that"):
        damaged.row(1, 0, "1/0")


def test_tars_are_streamed_in_order(cache: Path, remote: str) -> None:
    opened = EmbeddingCache.open(cache)
    for where in (cache, remote):
        streamed = list(stream_rows(EmbeddingCache.open(where), [2, 0], depth=2))
        assert [rows.tar_id for rows in streamed] == [2, 0]
        assert [len(rows) for rows in streamed] == [9, 50]
        for rows in streamed:
            for ordinal in range(len(rows)):
                row, key = rows.row(ordinal, f"{rows.tar_id}/{ordinal}"), f"{rows.tar_id}/{ordinal}"
                assert (row is None) == (ordinal % 7 == 6)
                assert row is None or np.array_equal(row, opened.row(rows.tar_id, ordinal, key))
        for ordinal in (1, -1, 9):
            with pytest.raises(ManifestError, match=r"tar 2\.tar \(2\), ordinal .* the row there is of another key"):
                streamed[0].row(ordinal, "2/0")


def test_streams_of_one_tar_read_it_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = EmbeddingCache.shard_rows

    def counted(opened: EmbeddingCache, tar_id: int, view: int = 0) -> Any:
        read.append(tar_id)
        return real(opened, tar_id, view)

    monkeypatch.setattr(EmbeddingCache, "shard_rows", counted)
    opened, shared = EmbeddingCache.open(cache), SharedRows()
    for times in (1, 2):  # what nobody keeps is read again
        streams = [stream_rows(opened, [2, 0, 1], shared=shared) for _ in range(5)]
        for expected, of_streams in zip((2, 0, 1), zip(*streams, strict=True), strict=True):
            assert {id(rows) for rows in of_streams} == {id(of_streams[0])}
            assert of_streams[0].tar_id == expected
        assert sorted(read) == sorted([0, 1, 2] * times)
        del of_streams, streams
    assert [len(list(stream_rows(opened, [0], shared=shared))) for _ in range(2)] == [1, 1]
    assert read.count(0) == 4


def test_a_damaged_tar_is_refused_in_its_turn(tmp_path: Path) -> None:
    make_cache(tmp_path, [9, 9, 9], 4)
    path = tmp_path / "store.zarr/emb/c/1/0"
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    seen: list[TarRows] = []
    with pytest.raises(ManifestError, match=r"rows of tar 1\.tar \(1\) are damaged"):
        seen.extend(stream_rows(EmbeddingCache.open(tmp_path), [0, 1, 2]))
    assert [rows.tar_id for rows in stream_rows(EmbeddingCache.open(tmp_path), [2, 0])] == [2, 0]


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no cache here .*manifest\.json is missing"):
        EmbeddingCache.open(tmp_path)
