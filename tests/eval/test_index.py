"""The FAISS wrapper: exact search, approximate search with its cost, and refusals."""

import os
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from threetowers.eval.search.index import _gpus, build_index, exact_search, recall_against_exact

ROUNDING = 16 * 2.0**-24  # of an inner product of unit vectors: 16 products, added in any order


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    rows = np.random.default_rng(0).standard_normal((601, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_flat_search_is_by_inner_product(vectors: NDArray[np.float32]) -> None:
    scaled = vectors * np.linspace(0.5, 2, len(vectors), dtype=np.float32)[:, None]  # by L2 the order would differ
    index = build_index(scaled, device="cpu")
    found = index.search(vectors[:37].astype(np.float64), 5)
    scores = vectors[:37] @ scaled.T
    assert np.array_equal(found.ids_NK, np.argsort(-scores, axis=1)[:, :5])
    rounding = 2 * 2 * ROUNDING  # of either side, and vectors are up to twice as long
    assert found.scores_NK == pytest.approx(-np.sort(-scores, axis=1)[:, :5], abs=rounding)
    assert index.exact
    assert recall_against_exact(index, scaled, vectors, 5, sample=50) == 1.0


def test_recall_of_approximate_search_is_measured(vectors: NDArray[np.float32]) -> None:
    narrow = build_index(vectors, "IVF16,Flat", parameters="nprobe=1", device="cpu")
    wide = build_index(vectors, "IVF16,Flat", parameters="nprobe=16", device="cpu")
    missed = recall_against_exact(narrow, vectors, vectors, 10, sample=100)
    assert 0.1 < missed < 0.9
    assert recall_against_exact(wide, vectors, vectors, 10, sample=100) == 1.0
    assert not narrow.exact
    padded = narrow.search(vectors[:5], 600)
    assert (padded.ids_NK[:, -1] == -1).all()
    assert np.isneginf(padded.scores_NK[padded.ids_NK == -1]).all()


def test_bad_input_is_refused(vectors: NDArray[np.float32]) -> None:
    index = build_index(vectors, device="cpu")
    for k in (0, 602):
        with pytest.raises(ValueError, match=f"k must be between 1 and 601 .* got {k}"):
            index.search(vectors[:2], k)
    with pytest.raises(ValueError, match="width 3, the index holds vectors of width 16"):
        index.search(vectors[:2, :3], 1)
    bad = vectors.copy()
    bad[[4, 9], 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 601 vectors hold NaN or infinity, the first in row 4"):
        build_index(bad)
    with pytest.raises(ValueError, match="2 of 601 queries"):
        index.search(bad, 1)
    with pytest.raises(ValueError, match=r"non-empty matrix of floats .* got \(0, 16\)"):
        build_index(vectors[:0])
    with pytest.raises(ValueError, match="holds 601 vectors but 600"):
        recall_against_exact(index, vectors[1:], vectors, 1)


@pytest.mark.parametrize(
    ("spec", "parameters", "reason"),
    [
        ("Falt", "", "could not parse index string Falt"),
        ("IVF700,Flat", "", r"training points \(601\) should be at least as large as number of clusters \(700\)"),
        ("Flat", "nprobe=4", "could not set parameter nprobe"),
    ],
)
def test_faiss_refusals_name_the_spec(vectors: NDArray[np.float32], spec: str, parameters: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot build '{spec}' with parameters '{parameters}' .*{reason}"):
        build_index(vectors, spec, parameters=parameters, device="cpu")


def test_gpu_must_exist_to_be_asked_for(vectors: NDArray[np.float32]) -> None:
    if faiss.get_num_gpus():
        assert build_index(vectors, device="gpu").gpus == faiss.get_num_gpus()
    else:
        with pytest.raises(ValueError, match="FAISS sees 0 GPUs"):
            build_index(vectors, device="gpu")
        assert build_index(vectors).gpus == 0


@pytest.mark.parametrize(
    ("device", "there", "expected"),
    [
        ("auto", 4, [0, 1, 2, 3]),
        ("gpu", 2, [0, 1]),
        ("cuda:2", 4, [2]),
        ("cuda:2", 0, []),  # FAISS without GPUs, beside a model on one
        ("auto", 0, []),
        ("cpu", 4, []),
    ],
)
def test_search_takes_the_gpus_of_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, there: int, expected: list[int]
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: there)
    assert _gpus(device) == expected


@pytest.mark.parametrize("device", ["cuda:4", "cuda:", "cuda:-1", "gpus"])
def test_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 4)
    with pytest.raises(ValueError, match="FAISS sees 4 GPUs; use auto or cpu"):
        _gpus(device)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("chunk_bytes", [1, 16 * 4 * 37, 1 << 20])
def test_search_from_disk_equals_brute_force(
    vectors: NDArray[np.float32], tmp_path: Path, dtype: type, chunk_bytes: int
) -> None:
    np.save(tmp_path / "vectors.npy", vectors.astype(dtype))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    stored = vectors.astype(dtype).astype(np.float32)
    truth = np.argsort(-(vectors[:41] @ stored.T), axis=1)[:, :7]
    for source in (mapped, mapped[:], np.asarray(mapped)):
        found = exact_search(source, vectors[:41], 7, chunk_bytes=chunk_bytes, device="cpu")
        assert np.array_equal(found.ids_NK, truth)
        assert np.allclose(found.scores_NK, np.take_along_axis(vectors[:41] @ stored.T, truth, 1), atol=2 * ROUNDING)
    part = exact_search(mapped[100:], vectors[100:103], 1, device="cpu")  # a part of a map is not its file
    assert dtype is np.float16 or part.ids_NK.ravel().tolist() == [0, 1, 2]
    assert recall_against_exact(build_index(mapped, device="cpu"), mapped, vectors, 3, sample=20) == 1.0


def test_search_from_disk_refuses_bad_input(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    bad = vectors.copy()
    bad[[400, 409], 0] = np.nan, np.inf
    np.save(tmp_path / "bad.npy", bad)
    mapped = np.load(tmp_path / "bad.npy", mmap_mode="r")
    with pytest.raises(ValueError, match=r"2 of 100 vectors hold NaN or infinity, the first in row 400"):
        exact_search(mapped, vectors[:3], 2, chunk_bytes=100 * 16 * 4, device="cpu")
    with pytest.raises(ValueError, match="k must be between 1 and the 601 vectors"):
        exact_search(vectors, vectors[:3], 602)
    with pytest.raises(ValueError, match="width 3, the gallery holds vectors of width 16"):
        exact_search(vectors, vectors[:3, :3], 1)
    np.save(tmp_path / "short.npy", vectors)
    short = np.load(tmp_path / "short.npy", mmap_mode="r")
    os.truncate(tmp_path / "short.npy", (tmp_path / "short.npy").stat().st_size - 64)
    with pytest.raises(OSError, match="ends before row 601: it is damaged"):
        exact_search(short, vectors[:3], 1, chunk_bytes=64 * 10, device="cpu")


def test_equal_chunks_merge_to_the_first_row(vectors: NDArray[np.float32]) -> None:
    twice = np.concatenate([vectors, vectors])
    found = exact_search(twice, vectors[:9], 2, chunk_bytes=16 * 4 * 601, device="cpu")
    assert np.array_equal(found.ids_NK, np.arange(9)[:, None] + [0, 601])
