"""Nearest-neighbour search over embeddings with FAISS: exact by default, approximate by factory string."""

import logging
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

log = logging.getLogger(__name__)

GPU_MAX_K = 2048
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
    that kind on one, and stays on the CPU otherwise; "gpu" refuses where "auto" falls back.

    Raises ValueError for vectors that are empty or not finite and for a spec or parameters FAISS refuses.
    """
    import faiss

    vectors_MD = _checked(vectors_MD, "vectors")
    size, width = vectors_MD.shape
    try:
        # The factory's own default metric is L2, under which the largest cosine is not the nearest for other norms.
        index = faiss.index_factory(width, spec, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(vectors_MD)
        index.add(vectors_MD)
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


def recall_against_exact(
    index: VectorIndex, vectors_MD: ArrayLike, queries_ND: ArrayLike, k: int, *, sample: int = 1000, seed: int = 0
) -> float:
    """Share of the exact k nearest vectors that `index` finds, over a random sample of the queries, in 0..1.

    Raises ValueError if `vectors_MD` are not as many as the index holds, and for what `search` refuses.
    """
    queries_ND = _checked(queries_ND, "queries")
    chosen = np.random.default_rng(seed).permutation(len(queries_ND))[:sample]
    exact = build_index(vectors_MD, device="cpu")
    if exact.size != index.size:
        raise ValueError(f"the index holds {index.size} vectors but {exact.size} were given to compare it with")
    found, truth = index.search(queries_ND[chosen], k).ids_NK, exact.search(queries_ND[chosen], k).ids_NK
    return float(np.mean([np.isin(true_K, found_K).mean() for true_K, found_K in zip(truth, found, strict=True)]))


def _checked(vectors: ArrayLike, name: str) -> NDArray[np.float32]:
    array = np.asarray(vectors)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must be a non-empty matrix of floats (rows, width), got {array.shape} of {array.dtype}"
        )
    bad_N = ~np.isfinite(array).all(axis=1)
    if bad_N.any():
        raise ValueError(
            f"{int(bad_N.sum())} of {len(array)} {name} hold NaN or infinity, the first in row {int(bad_N.argmax())}: "
            "FAISS would return arbitrary neighbours; find what produced them"
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def _place(index: Any, spec: str, device: Device) -> tuple[Any, int]:
    """Shard the index over the GPUs, or leave it on the CPU and say why."""
    import faiss

    gpus = int(faiss.get_num_gpus()) if device != "cpu" else 0
    if gpus == 0:
        if device == "gpu":
            raise ValueError("device='gpu' but FAISS sees no GPU: use device='auto' or 'cpu'")
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


def _reason(error: RuntimeError) -> str:
    """FAISS's message without the C++ function, file and line it opens with."""
    return re.split(r"\.(?:cpp|cu|h):\d+: (?:Error: )?", str(error))[-1].splitlines()[0]
