"""Nearest-neighbour search over embeddings with FAISS: exact by default, approximate by factory string."""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from threetowers.eval.search.chunks import iter_chunks

logger = logging.getLogger(__name__)

GPU_MAX_K = 2048
TRAINING_ROWS = 1 << 18  # at most; FAISS itself samples 256 a list or code
SEARCH_CHUNK_BYTES = 128 << 20  # of vectors in memory at a time, twice, in an exact search from disk
Device = str  # auto, cpu, gpu or cuda:N


@dataclass(frozen=True)
class NearestNeighbours:
    """The K nearest gallery rows of each of N queries, best first.

    Attributes:
        scores_NK: Inner products; -inf where an approximate index found fewer than K rows.
        ids_NK: Gallery rows; -1 there.
    """

    scores_NK: NDArray[np.float32]
    ids_NK: NDArray[np.int64]


@dataclass(frozen=True)
class VectorIndex:
    """A FAISS index of `size` vectors of one `width`, built from the factory string `spec`.

    `gpus` is the number of GPUs that hold it, 0 for the CPU.
    """

    faiss_index: Any
    spec: str
    size: int
    width: int
    gpus: int

    @property
    def exact(self) -> bool:
        """Whether every vector is compared in full precision."""
        return self.spec == "Flat"

    def search(self, queries_ND: ArrayLike, k: int) -> NearestNeighbours:
        """Return the k gallery rows with the largest inner product to each query.

        Raises:
            ValueError: If k is not in 1..size (or above the limit of a GPU), or if the queries are of another width or
                not finite.
        """
        limit = min(self.size, GPU_MAX_K) if self.gpus else self.size
        if not 1 <= k <= limit:
            where = f"on {self.gpus} GPUs" if self.gpus else "on the CPU"
            raise ValueError(f"k must be between 1 and {limit} for an index of {self.size} vectors {where}, got {k}")
        queries_ND = _checked(queries_ND, "queries")
        if queries_ND.shape[1] != self.width:
            raise ValueError(f"queries have width {queries_ND.shape[1]}, the index holds vectors of width {self.width}")
        scores_NK, ids_NK = self.faiss_index.search(queries_ND, k)
        return NearestNeighbours(np.where(ids_NK < 0, np.float32(-np.inf), scores_NK), ids_NK)


def build_index(
    vectors_MD: ArrayLike, spec: str = "Flat", *, parameters: str = "", device: Device = "auto"
) -> VectorIndex:
    """Index vectors by inner product, which is the cosine if they are unit-norm.

    An index that needs training is trained on the vectors themselves, on at most `TRAINING_ROWS` of them. Vectors may
    be memory-mapped: an index that compresses them needs only its own memory.

    Args:
        vectors_MD: The vectors, of any float type.
        spec: Any FAISS factory string: "Flat" is exact; "IVF1024,Flat", "OPQ64,IVF4096,PQ64", "HNSW32" are not.
        parameters: Search settings of the index, as "nprobe=16" (FAISS's default of 1 finds little).
        device: "auto" shards the index over all GPUs, and leaves it on the CPU where FAISS sees none or cannot hold
            this kind on one; "gpu" raises an error there. "cuda:N" is "auto" with that GPU alone, "cpu" uses none.

    Raises:
        ValueError: For vectors that are empty or not finite, for a spec or parameters that FAISS refuses, and for a
            GPU that is not there.
    """
    import faiss

    vectors_MD = _matrix(vectors_MD, "vectors")
    size, width = vectors_MD.shape
    step = max(1, SEARCH_CHUNK_BYTES // (4 * width))
    try:
        # The factory's own default metric is L2, under which the largest cosine is not the nearest for other norms.
        index = faiss.index_factory(width, spec, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            sample = vectors_MD[:: -(-size // TRAINING_ROWS)]
            index.train(_checked(sample, "vectors"))
        for start, chunk_mD in iter_chunks(vectors_MD, step):
            _check_finite(chunk_mD, "vectors", start)
            index.add(chunk_mD)
        if parameters:
            space: Any = faiss.ParameterSpace()
            space.set_index_parameters(index, parameters)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS cannot build {spec!r} with parameters {parameters!r} from {size} vectors of width {width}: "
            f"{_reason(error)}; use another spec (IVF lists and PQ codes need that many training vectors), or 'Flat'"
        ) from error
    index, gpus = _shard_over_gpus(index, spec, device)
    return VectorIndex(index, spec, size, width, gpus)


def exact_search(
    vectors_MD: ArrayLike,
    queries_ND: ArrayLike,
    k: int,
    *,
    chunk_bytes: int = SEARCH_CHUNK_BYTES,
    device: Device = "auto",
) -> NearestNeighbours:
    """Return the k rows with the largest inner product to each query, from vectors that need not fit into memory.

    All cores are used, or all GPUs, each on its share of the queries.

    Args:
        vectors_MD: The vectors, of any float type, read in chunks, from their file where they are memory-mapped.
        queries_ND: The queries, in memory.
        k: Number of neighbours.
        chunk_bytes: Size of a chunk in float32; two are in memory.
        device: "auto" for all GPUs that FAISS sees, else the CPU; "gpu" raises an error there. "cuda:N" is "auto" with
            that GPU alone, "cpu" uses none.

    Raises:
        ValueError: For k not in 1..M, widths that differ, and vectors or queries that are empty or not finite.
    """
    queries_ND = _checked(queries_ND, "queries")
    vectors_MD = _matrix(vectors_MD, "vectors")
    size, width = vectors_MD.shape
    if queries_ND.shape[1] != width:
        raise ValueError(f"queries have width {queries_ND.shape[1]}, the gallery holds vectors of width {width}")
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the {size} vectors of the gallery, got {k}")
    gpus = _gpus(device)
    if gpus and k > GPU_MAX_K:
        raise ValueError(f"k must be at most {GPU_MAX_K} on a GPU, got {k}: search on the CPU (--device cpu)")
    scores_NK = np.full((len(queries_ND), k), -np.inf, np.float32)
    ids_NK = np.full((len(queries_ND), k), -1, np.int64)
    for start, chunk_mD in iter_chunks(vectors_MD, max(1, chunk_bytes // (4 * width))):
        _check_finite(chunk_mD, "vectors", start)
        chunk_scores_NK, chunk_ids_NK = _search_chunk(queries_ND, chunk_mD, min(k, len(chunk_mD)), gpus)
        # Keep the best of both; the sort is stable, so that the earlier row wins a tie.
        all_scores = np.concatenate([scores_NK, chunk_scores_NK], axis=1)
        all_ids = np.concatenate([ids_NK, chunk_ids_NK + start], axis=1)
        order_NK = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
        scores_NK = np.take_along_axis(all_scores, order_NK, axis=1)
        ids_NK = np.take_along_axis(all_ids, order_NK, axis=1)
    return NearestNeighbours(scores_NK, ids_NK)


def _search_chunk(
    queries_ND: NDArray[np.float32], chunk_mD: NDArray[np.float32], k: int, gpus: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scores and rows (N, k) within one chunk, on the CPU or with the queries split over the GPUs."""
    import faiss

    inner = faiss.METRIC_INNER_PRODUCT
    if not gpus:
        scores_NK, ids_NK = faiss.knn(queries_ND, chunk_mD, k, metric=inner)
        return scores_NK, ids_NK

    def search(gpu: int, queries_nD: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        resources = faiss.StandardGpuResources()
        scores_nK, ids_nK = faiss.knn_gpu(resources, queries_nD, chunk_mD, k, metric=inner, device=gpu)
        return scores_nK, ids_nK

    with ThreadPoolExecutor(len(gpus)) as pool:
        parts = list(pool.map(search, gpus, np.array_split(queries_ND, len(gpus))))
    return np.concatenate([scores for scores, _ in parts]), np.concatenate([ids for _, ids in parts])


def recall_against_exact(
    index: VectorIndex,
    vectors_MD: ArrayLike,
    queries_ND: ArrayLike,
    k: int,
    *,
    sample: int = 1000,
    seed: int = 0,
    device: Device = "auto",
) -> float:
    """Return the share, in 0..1, of the exact k nearest vectors that an index finds, over a sample of the queries.

    Args:
        index: The index, of `vectors_MD`.
        vectors_MD: The vectors that it holds.
        queries_ND: The queries to sample from.
        k: Number of neighbours.
        sample: Size of the sample.
        seed: Of the sample.
        device: Of the exact search, as in `exact_search`.

    Raises:
        ValueError: If the index holds another number of vectors, and for what `search` refuses.
    """
    queries_ND = _checked(queries_ND, "queries")
    vectors_MD = np.asanyarray(vectors_MD)
    if len(vectors_MD) != index.size:
        raise ValueError(f"the index holds {index.size} vectors but {len(vectors_MD)} were given to compare it with")
    chosen = np.random.default_rng(seed).permutation(len(queries_ND))[:sample]
    found_NK = index.search(queries_ND[chosen], k).ids_NK
    exact_NK = exact_search(vectors_MD, queries_ND[chosen], k, device=device).ids_NK
    shares = [np.isin(exact_K, found_K).mean() for exact_K, found_K in zip(exact_NK, found_NK, strict=True)]
    return float(np.mean(shares))


def _checked(vectors: ArrayLike, name: str) -> NDArray[np.float32]:
    """Return vectors as a finite float32 matrix."""
    array = _matrix(vectors, name)
    _check_finite(array, name)
    return np.ascontiguousarray(array, dtype=np.float32)


def _matrix(vectors: ArrayLike, name: str) -> NDArray[np.floating[Any]]:
    array: NDArray[np.floating[Any]] = np.asanyarray(vectors)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must be a non-empty matrix of floats (rows, width), got {array.shape} of {array.dtype}"
        )
    return array


def _check_finite(array: NDArray[np.floating[Any]], name: str, first_row: int = 0) -> None:
    # A sum is finite unless a summand is not, or it overflows: only then is it worth looking at each.
    if np.isfinite(array.sum(dtype=np.float64)):
        return
    bad_N = np.atleast_1d(~np.isfinite(array).all(axis=1))
    if bad_N.any():
        raise ValueError(
            f"{int(bad_N.sum())} of {len(array)} {name} hold NaN or infinity, the first in row "
            f"{first_row + int(bad_N.argmax())}: FAISS would return arbitrary neighbours; find what produced them"
        )


def _shard_over_gpus(index: Any, spec: str, device: Device) -> tuple[Any, int]:
    """Return the index sharded over the GPUs and their number, or left on the CPU and 0."""
    import faiss

    gpus = _gpus(device)
    if not gpus:
        return index, 0
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    try:
        return faiss.index_cpu_to_gpus_list(index, co=options, gpus=gpus), len(gpus)
    except RuntimeError as error:
        if device == "gpu":
            raise ValueError(
                f"FAISS cannot put {spec!r} on {len(gpus)} GPUs: {_reason(error)}; use device='cpu'"
            ) from error
        logger.warning("index %s stays on the CPU: %s", spec, _reason(error))
        return index, 0


def _gpus(device: Device) -> list[int]:
    """Return the numbers of the GPUs to search on; empty for the CPU. Raises ValueError for one that is not there."""
    import faiss

    if device == "cpu":
        return []
    count = int(faiss.get_num_gpus())
    if device == "auto" or (device == "gpu" and count):
        return list(range(count))
    number = device.removeprefix("cuda:")
    if device.startswith("cuda:") and number.isdecimal() and (int(number) < count or not count):
        return [int(number)] if count else []
    raise ValueError(f"device {device!r}: FAISS sees {count} GPUs; use auto or cpu")


def _reason(error: RuntimeError) -> str:
    """Return FAISS's message without the C++ function, file and line that it begins with."""
    return re.split(r"\.(?:cpp|cu|h):\d+: (?:Error: )?", str(error))[-1].splitlines()[0]
