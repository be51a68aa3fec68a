"""The store is plain Zarr v3: other readers see the same values. Those that are not fork-safe run in processes of their
own.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from tests.cache.caches import DTYPES, make_cache, make_text_cache, some_captions
from threetowers.cache.format.dtypes import storage_dtype
from threetowers.cache.format.layout import STORE
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache

SIZES = [40, 33, 9]
VIEWS = Views("crops:2", 1, 0.5)
ARRAYS = ("emb", "emb_1", "key_hash", "image_hash", "status", "view_params", "view_params_1")


@pytest.fixture(scope="module", params=DTYPES)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_cache(folder, SIZES, 7, request.param, VIEWS)
    return folder


def names(cache: Path) -> list[str]:
    scaled = EmbeddingCache.open(cache).manifest.storage_dtype.scaled
    return [*ARRAYS, *(("scale", "scale_1") if scaled else ())]


def by_zarr(cache: Path, name: str) -> np.ndarray:
    return np.asarray(zarr.open_group(cache / STORE, mode="r")[name][:])


def by_tensorstore(cache: Path, name: str) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache / STORE / name)}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def by_zarrs(cache: Path, name: str) -> np.ndarray:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return by_zarr(cache, name)


def by_dask(cache: Path, name: str) -> np.ndarray:
    dask_array = pytest.importorskip("dask.array")
    lazy = dask_array.from_zarr(zarr.open_array(cache / STORE / name, mode="r"))
    return np.asarray(lazy.compute(scheduler="synchronous"))


def read_all(read: Callable[[Path, str], np.ndarray], cache: Path) -> dict[str, np.ndarray]:
    return {name: read(cache, name) for name in names(cache)}


@pytest.fixture(scope="module")
def elsewhere() -> Any:
    """A process that is started, not forked."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.mark.parametrize("read", [by_zarr, by_tensorstore, by_zarrs, by_dask])
def test_all_readers_see_the_same_values(read: Callable[[Path, str], np.ndarray], cache: Path, elsewhere: Any) -> None:
    opened = EmbeddingCache.open(cache)
    found = elsewhere.apply(read_all, (read, cache))
    slot, tier = opened.manifest.rows_per_tar, opened.manifest.storage_dtype
    for tar_id, n in enumerate(SIZES):
        rows = slice(tar_id * slot, tar_id * slot + n)
        good = opened.status(tar_id) == 1
        assert np.array_equal(found["status"][rows], opened.status(tar_id))
        assert np.array_equal(found["key_hash"][rows], opened.columns(tar_id).key_hash_n)
        for view in range(2):
            scale = found[f"scale{'_1' * view}"][rows] if tier.scaled else None
            decoded = tier.decode(found[f"emb{'_1' * view}"][rows], scale)
            assert np.array_equal(decoded[good], opened.tar(tar_id, view)[good])
            assert good.sum() > n // 2
            for ordinal in range(n):
                params = found[f"view_params{'_1' * view}"][rows][ordinal]
                assert np.array_equal(params, opened.view_params(tar_id, ordinal, view))
        rest = slice(tar_id * slot + n, (tar_id + 1) * slot)
        assert (found["status"][rest] == 0).all()
    logical = zarr.open_array(cache / STORE / "emb", mode="r").attrs.get("logical_dtype")
    assert logical == ("bfloat16" if tier.name == "bfloat16" else None)


TEXT_ARRAYS = ("emb", "caption_hash", "caption_source", "key_hash", "status", "row_end")


def read_text(read: Callable[[Path, str], np.ndarray], cache: Path, scaled: bool) -> dict[str, np.ndarray]:
    return {name: read(cache, name) for name in (*TEXT_ARRAYS, *(("scale",) if scaled else ()))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("read", [by_zarr, by_tensorstore, by_zarrs, by_dask])
def test_all_readers_find_the_runs_of_captions(
    read: Callable[[Path, str], np.ndarray], dtype: str, tmp_path: Path, elsewhere: Any
) -> None:
    """By what the attributes of the store say alone; one tar has no caption at all."""
    tars = some_captions(np.random.default_rng(3), [9, 4, 7])
    tars[1] = [{}] * 4
    make_text_cache(tmp_path, tars, 7, dtype, ("txt", "json.captions"))
    opened, tier = EmbeddingCache.open(tmp_path), storage_dtype(dtype)
    found = elsewhere.apply(read_text, (read, tmp_path, tier.scaled))
    attributes = zarr.open_group(tmp_path / STORE, mode="r").attrs
    per_tar, samples_per_tar = int(attributes["rows_per_tar"]), int(attributes["samples_per_tar"])  # type: ignore[call-overload]
    n_read = 0
    for tar_id, tar in enumerate(tars):
        for ordinal, captions in enumerate(tar):
            at = tar_id * samples_per_tar + ordinal
            start = found["row_end"][at - 1] if ordinal else 0
            run = slice(tar_id * per_tar + int(start), tar_id * per_tar + int(found["row_end"][at]))
            assert found["status"][at] == (1 if captions else 10)
            assert run.stop - run.start == sum(map(len, captions.values()))
            if captions:
                scale = found["scale"][run] if tier.scaled else None
                address = tar_id, ordinal, f"{tar_id}/{ordinal}"
                assert np.array_equal(tier.decode(found["emb"][run], scale), opened.caption_rows(*address))
                expected = opened.captions(*address)
                assert np.array_equal(found["caption_hash"][run], expected.hash_k)
                assert np.array_equal(found["caption_source"][run], expected.source_k)
                n_read += len(expected.hash_k)
    assert n_read > 20


def test_an_array_converts_to_numpy_torch_and_dask(tmp_path: Path) -> None:
    dask_array = pytest.importorskip("dask.array")
    make_cache(tmp_path, SIZES, 7)
    opened = EmbeddingCache.open(tmp_path)
    array = opened.array()
    rows = array[opened.manifest.rows_per_tar :][: SIZES[1]]
    assert np.array_equal(rows.astype(np.float32), opened.tar(1), equal_nan=True)
    assert torch.equal(torch.from_numpy(rows).float().nan_to_num(), torch.from_numpy(opened.tar(1)).nan_to_num())
    lazy = dask_array.from_zarr(array)
    mean = dask_array.nanmean(lazy.astype(np.float32), axis=0).compute(scheduler="synchronous")
    np.testing.assert_allclose(mean, opened.moments()[0], rtol=1e-4)


def test_the_store_has_the_dtype_of_the_manifest(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    assert opened.array(1).dtype == np.dtype(storage_dtype(opened.manifest.dtype).stored)
