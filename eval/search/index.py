"""Nearest-neighbour search over embeddings with FAISS: exact by default, approximate by factory string."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from threetowers.eval.search.chunks import blocks

log = logging.getLogger(__name__)

GPU_MAX_K = 2048
TRAINING_ROWS = 1 << 18  # at most; FAISS itself samples 256 a list or code
BLOCK_BYTES = 128 << 20  # of vectors that are in memory at a time, twice, in an exact search from disk
Device = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class Neighbours:
    """What a search found, best first: inner products `scores_NK` (float32) and gallery rows `ids_NK` (int64).

    An approximate index that found fewer than k pads with id -1 and score -inf.
    """

    scores_NK: NDArray[np.float32]
    ids_NK: NDArray[np.int64]


@dataclass(frozen=True)
class VectorIndex:
    """A searchable set of vectors. `gpus` is how many hold it, 0 for the CPU; `faiss_index` is FAISS's own object."""

    faiss_index: Any
    spec: str
    size: int
    width: int
    gpus: int

    @property
    def exact(self) -> bool:
        """Whether every vector is compared in full precision."""
        return self.spec == "Flat"

    def search(self, queries_ND: ArrayLike, k: int) -> Neighbours:
        """The k gallery rows with the largest inner product to each query.

        Raises ValueError if k is not in 1..size (or above the GPU's limit), or if the queries are of another width or
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
        return Neighbours(np.where(ids_NK < 0, np.float32(-np.inf), scores_NK), ids_NK)


def build_index(
    vectors_MD: ArrayLike, spec: str = "Flat", *, parameters: str = "", device: Device = "auto"
) -> VectorIndex:
    """Index vectors by inner product, which is the cosine if they are unit-norm.

    `spec` is any FAISS factory string ("Flat" is exact; "IVF1024,Flat", "OPQ64,IVF4096,PQ64", "HNSW32" are not) and
    `parameters` its search settings ("nprobe=16"; FAISS's default of 1 finds little). An index that needs training is
    trained on the vectors themselves. With `device="auto"` it is sharded over the GPUs there are, if FAISS can hold
    that kind on one, and stays on the CPU otherwise; "gpu" refuses where "auto" falls back. Vectors may be
    memory-mapped: an index that compresses them needs only its own memory, and is trained on `TRAINING_ROWS` of them.

    Raises ValueError for vectors that are empty or not finite and for a spec or parameters FAISS refuses.
    """
    import faiss

    vectors_MD = _matrix(vectors_MD, "vectors")
    size, width = vectors_MD.shape
    step = max(1, BLOCK_BYTES // (4 * width))
    try:
        # The factory's own default metric is L2, under which the largest cosine is not the nearest for other norms.
        index = faiss.index_factory(width, spec, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            sample = vectors_MD[:: -(-size // TRAINING_ROWS)]
            index.train(_checked(sample, "vectors"))
        for start, block_mD in blocks(vectors_MD, step):
            _finite(block_mD, "vectors", start)
            index.add(block_mD)
        if parameters:
            space: Any = faiss.ParameterSpace()
            space.set_index_parameters(index, parameters)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS cannot build {spec!r} with parameters {parameters!r} from {size} vectors of width {width}: "
            f"{_reason(error)}; use another spec (IVF lists and PQ codes need that many training vectors), or 'Flat'"
        ) from error
    index, gpus = _place(index, spec, device)
    return VectorIndex(index, spec, size, width, gpus)


def exact_search(
    vectors_MD: ArrayLike,
    queries_ND: ArrayLike,
    k: int,
    *,
    block_bytes: int = BLOCK_BYTES,
    device: Device = "auto",
) -> Neighbours:
    """The k rows with the largest inner product to each query, exactly, from vectors that need not fit into memory.

    `vectors_MD`, of any float type, is read block by block, from its file where it is memory-mapped; beyond queries and
    results, two blocks are in memory. All cores are used; with `device="gpu"` (and "auto", where FAISS sees GPUs) all
    GPUs instead, each on its share of the queries.

    Raises ValueError for k not in 1..M, widths that differ, and vectors or queries that are empty or not finite.
    """
    queries_ND, vectors_MD = _checked(queries_ND, "queries"), _matrix(vectors_MD, "vectors")
    size, width = vectors_MD.shape
    if queries_ND.shape[1] != width:
        raise ValueError(f"queries have width {queries_ND.shape[1]}, the gallery holds vectors of width {width}")
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the {size} vectors of the gallery, got {k}")
    gpus = _gpus(device)
    if gpus and k > GPU_MAX_K:
        raise ValueError(f"k must be at most {GPU_MAX_K} on a GPU, got {k}: use device='cpu'")
    scores_NK = np.full((len(queries_ND), k), -np.inf, np.float32)
    ids_NK = np.full((len(queries_ND), k), -1, np.int64)
    for start, block_mD in blocks(vectors_MD, max(1, block_bytes // (4 * width))):
        _finite(block_mD, "vectors", start)
        scores, ids = _block_search(queries_ND, block_mD, min(k, len(block_mD)), gpus)
        scores_NK, ids_NK = _merged(scores_NK, ids_NK, scores, ids + start)
    return Neighbours(scores_NK, ids_NK)


def _block_search(
    queries_ND: NDArray[np.float32], block_mD: NDArray[np.float32], k: int, gpus: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    import faiss

    inner = faiss.METRIC_INNER_PRODUCT
    if not gpus:
        scores_NK, ids_NK = faiss.knn(queries_ND, block_mD, k, metric=inner)
        return scores_NK, ids_NK

    def search(device: int, queries_nD: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        resources = faiss.StandardGpuResources()
        scores_nK, ids_nK = faiss.knn_gpu(resources, queries_nD, block_mD, k, metric=inner, device=device)
        return scores_nK, ids_nK

    with ThreadPoolExecutor(gpus) as pool:
        found = list(pool.map(search, range(gpus), np.array_split(queries_ND, gpus)))
    return np.concatenate([scores for scores, _ in found]), np.concatenate([ids for _, ids in found])


def _merged(
    scores_NK: NDArray[np.float32],
    ids_NK: NDArray[np.int64],
    more_NK: NDArray[np.float32],
    more_ids_NK: NDArray[np.int64],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best of two lists, each sorted; the first wins ties, as its rows come first."""
    k = ids_NK.shape[1]
    scores, ids = np.concatenate([scores_NK, more_NK], axis=1), np.concatenate([ids_NK, more_ids_NK], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def recall_against_exact(
    index: VectorIndex, vectors_MD: ArrayLike, queries_ND: ArrayLike, k: int, *, sample: int = 1000, seed: int = 0
) -> float:
    """Share of the exact k nearest vectors that `index` finds, over a random sample of the queries, in 0..1.

    Raises ValueError if `vectors_MD` are not as many as the index holds, and for what `search` refuses.
    """
    queries_ND = _checked(queries_ND, "queries")
    chosen = np.random.default_rng(seed).permutation(len(queries_ND))[:sample]
    vectors_MD = np.asanyarray(vectors_MD)
    if len(vectors_MD) != index.size:
        raise ValueError(f"the index holds {index.size} vectors but {len(vectors_MD)} were given to compare it with")
    found = index.search(queries_ND[chosen], k).ids_NK
    truth = exact_search(vectors_MD, queries_ND[chosen], k).ids_NK
    return float(np.mean([np.isin(true_K, found_K).mean() for true_K, found_K in zip(truth, found, strict=True)]))


def _checked(vectors: ArrayLike, name: str) -> NDArray[np.float32]:
    array = _matrix(vectors, name)
    _finite(array, name)
    return np.ascontiguousarray(array, dtype=np.float32)


def _matrix(vectors: ArrayLike, name: str) -> NDArray[np.floating[Any]]:
    array: NDArray[np.floating[Any]] = np.asanyarray(vectors)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must be a non-empty matrix of floats (rows, width), got {array.shape} of {array.dtype}"
        )
    return array


def _finite(array: NDArray[np.floating[Any]], name: str, first_row: int = 0) -> None:
    # A sum is finite unless a summand is not, or it overflows: only then is it worth looking at each.
    if np.isfinite(array.sum(dtype=np.float64)):
        return
    bad_N = np.atleast_1d(~np.isfinite(array).all(axis=1))
    if bad_N.any():
        raise ValueError(
            f"{int(bad_N.sum())} of {len(array)} {name} hold NaN or infinity, the first in row "
            f"{first_row + int(bad_N.argmax())}: FAISS would return arbitrary neighbours; find what produced them"
        )


def _place(index: Any, spec: str, device: Device) -> tuple[Any, int]:
    """Shard the index over the GPUs, or leave it on the CPU and say why."""
    import faiss

    gpus = _gpus(device)
    if gpus == 0:
        return index, 0
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options), gpus
    except RuntimeError as error:
        if device == "gpu":
            raise ValueError(f"FAISS cannot put {spec!r} on {gpus} GPUs: {_reason(error)}; use device='cpu'") from error
        log.warning("index %s stays on the CPU: %s", spec, _reason(error))
        return index, 0


def _gpus(device: Device) -> int:
    """How many GPUs to search on. Raises ValueError where "gpu" is asked for and there is none."""
    import faiss

    gpus = int(faiss.get_num_gpus()) if device != "cpu" else 0
    if gpus == 0 and device == "gpu":
        raise ValueError("device='gpu' but FAISS sees no GPU: use device='auto' or 'cpu'")
    return gpus


def _reason(error: RuntimeError) -> str:
    """FAISS's message without the C++ function, file and line it opens with."""
    return re.split(r"\.(?:cpp|cu|h):\d+: (?:Error: )?", str(error))[-1].splitlines()[0]
