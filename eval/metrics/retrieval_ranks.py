"""Ranks of the best match in a similarity matrix too large to exist, safe under ties."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

NO_POSITIVE = -1  # the rank of a query that nothing in the gallery matches

# Equal cosines come out of a float32 product some 5e-7 apart, depending on where in the matrix they stand, so closer
# scores than this count as tied. At COCO's size that takes in the real gaps of 0.4 % of queries, most of them far down:
# no recall moves by more than one query (tests/benchmarks/bench_retrieval.py).
TIE = 1e-6
UNIT_NORM_TOLERANCE = 1e-2  # embeddings normalised in bfloat16 are this far off at most


@dataclass(frozen=True)
class RetrievalRanks:
    """0-based rank of every query's best-scoring positive, counted among the gallery items that do not match it.

    `optimistic_N` counts the non-positives that score higher, `pessimistic_N` also those that score the same (int64,
    `NO_POSITIVE` where the gallery holds no match). `positives_N` is how many gallery items match each query.
    """

    optimistic_N: NDArray[np.int64]
    pessimistic_N: NDArray[np.int64]
    positives_N: NDArray[np.int64]
    gallery: int

    @property
    def answerable_N(self) -> NDArray[np.bool_]:
        """Queries with at least one match in the gallery."""
        return self.positives_N > 0


def ranks(
    query_ND: ArrayLike | Tensor,
    gallery_MD: ArrayLike | Tensor,
    query_group_N: ArrayLike | Tensor,
    gallery_group_M: ArrayLike | Tensor,
    *,
    chunk: int = 2048,
    device: str | torch.device = "cpu",
) -> RetrievalRanks:
    """Rank of each query's best positive by float32 cosine, in O(chunk²) extra memory (16 MiB of scores at 2048).

    Vectors may be memory-mapped: no more than a block of them is copied at a time.

    The result depends neither on `chunk` nor on the order of the gallery: scores within `TIE` of each other are equal.
    Raises ValueError for vectors that are empty, not finite, not unit-norm or of unequal width, and for groups that are
    not one integer per vector.
    """
    query, gallery = _side(query_ND, query_group_N, "query"), _side(gallery_MD, gallery_group_M, "gallery")
    return _sweep(query, gallery, chunk, torch.device(device), both=False)[0]


def two_way_ranks(
    image_ND: ArrayLike | Tensor,
    text_MD: ArrayLike | Tensor,
    image_group_N: ArrayLike | Tensor,
    text_group_M: ArrayLike | Tensor,
    *,
    chunk: int = 2048,
    device: str | torch.device = "cpu",
) -> tuple[RetrievalRanks, RetrievalRanks]:
    """`ranks` of images among texts and of texts among images, for the price of one: each score serves both."""
    image, text = _side(image_ND, image_group_N, "image"), _side(text_MD, text_group_M, "text")
    image_ranks, text_ranks = _sweep(image, text, chunk, torch.device(device), both=True)
    return image_ranks, text_ranks


@dataclass(frozen=True)
class _Side:
    """One side of the similarity matrix, sorted by group so that the matches of an item are one interval.

    Vectors stay where they are, perhaps memory-mapped: only blocks of them are copied.
    """

    vectors_ND: NDArray[Any] | Tensor
    groups_N: Tensor
    order_N: Tensor

    def rows(self, sorted_rows: slice | Tensor, device: torch.device) -> Tensor:
        """Vectors by their places in the sorted order, float32."""
        rows = self.order_N[sorted_rows]
        if isinstance(self.vectors_ND, Tensor):
            return self.vectors_ND[rows.to(self.vectors_ND.device)].to(device, torch.float32)
        return torch.from_numpy(np.asarray(self.vectors_ND[rows.numpy()], dtype=np.float32)).to(device)

    def unsort(self, sorted_N: Tensor) -> NDArray[np.int64]:
        values_N = torch.empty_like(sorted_N)
        values_N[self.order_N] = sorted_N
        result: NDArray[np.int64] = values_N.numpy()
        return result


def group_ids(groups: ArrayLike | Tensor, name: str) -> Tensor:
    """Group ids as an int64 tensor (N,) on the CPU. Raises ValueError unless they are a vector of integers."""
    array = groups.cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} groups must be one integer per vector, got shape {array.shape} of {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _side(vectors: ArrayLike | Tensor, groups: ArrayLike | Tensor, name: str) -> _Side:
    vectors_ND = vectors.detach() if isinstance(vectors, Tensor) else np.asanyarray(vectors)
    groups_N = group_ids(groups, name)
    floats = vectors_ND.dtype.is_floating_point if isinstance(vectors_ND, Tensor) else vectors_ND.dtype.kind == "f"
    if vectors_ND.ndim != 2 or 0 in vectors_ND.shape or not floats:
        raise ValueError(
            f"{name} embeddings must be a non-empty matrix of floats, "
            f"got shape {tuple(vectors_ND.shape)} of {vectors_ND.dtype}"
        )
    if len(groups_N) != len(vectors_ND):
        raise ValueError(f"got {len(groups_N)} {name} groups for {len(vectors_ND)} {name} embeddings")
    groups_N, order_N = torch.sort(groups_N, stable=True)
    side = _Side(vectors_ND, groups_N, order_N)
    _check_norms(side, name)
    return side


def _check_norms(side: _Side, name: str, block: int = 65_536) -> None:
    norms_N = torch.empty(len(side.order_N))
    for start in range(0, len(norms_N), block):
        rows = side.order_N[start : start + block]
        norms_N[rows] = torch.linalg.vector_norm(side.rows(slice(start, start + block), torch.device("cpu")), dim=1)
    wrong_N = ~((norms_N - 1).abs() <= UNIT_NORM_TOLERANCE)  # a comparison with NaN is false: NaN is wrong too
    if wrong_N.any():
        row = int(wrong_N.nonzero()[0, 0])
        raise ValueError(
            f"{int(wrong_N.sum())} of {len(norms_N)} {name} embeddings are not unit-norm and finite; the first is row "
            f"{row} with norm {float(norms_N[row]):.4g}: normalise them, and look for what produced NaN or zero rows"
        )


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Compute no product in TF32 or bfloat16, whatever the process has set: their rounding creates ties."""
    mkldnn: Any = torch.backends.mkldnn
    backends: list[Any] = [torch.backends.cuda.matmul, mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _sweep(query: _Side, gallery: _Side, chunk: int, device: torch.device, *, both: bool) -> list[RetrievalRanks]:
    """Ranks of the queries and, if `both`, of the gallery's items as queries, from one pass over tiles of scores."""
    N, M = len(query.groups_N), len(gallery.groups_N)
    if query.vectors_ND.shape[1] != gallery.vectors_ND.shape[1]:
        raise ValueError(
            f"embeddings of widths {query.vectors_ND.shape[1]} and {gallery.vectors_ND.shape[1]} cannot be compared: "
            "both sides must come from one model"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")
    with torch.inference_mode(), _exact_float32():
        tiles = _Tiles(query, gallery, chunk, device, sides=2 if both else 1)
        for start in range(0, N, chunk):
            tiles.count_row_of_tiles(slice(start, min(start + chunk, N)))
        sides = ((query, gallery, M, 0), (gallery, query, N, 1))[: 2 if both else 1]
        return [tiles.ranks(side, other, size, index) for side, other, size, index in sides]


class _Tiles:
    """Walks the score matrix tile by tile, counting the non-positives that beat or equal each item's best positive.

    Every buffer is a tile, a block of vectors or one number per item, so the matrix itself never exists.
    """

    def __init__(self, query: _Side, gallery: _Side, chunk: int, device: torch.device, sides: int) -> None:
        self.chunk, self.device = chunk, device
        self.query, self.gallery = query, gallery
        self.lo_N = torch.searchsorted(gallery.groups_N, query.groups_N)
        self.hi_N = torch.searchsorted(gallery.groups_N, query.groups_N, right=True)
        sizes = (len(query.groups_N), len(gallery.groups_N))
        self.best = [torch.full((size,), -torch.inf, device=device) for size in sizes]
        self._find_best()
        self.counts = [torch.zeros(2, size, dtype=torch.int64, device=device) for size in sizes[:sides]]
        tile = min(chunk, sizes[0]) * min(chunk, sizes[1])
        self.scores, self.beats = torch.empty(tile, device=device), torch.empty(tile, device=device)

    def _rows(self, side: _Side, sorted_rows: slice | Tensor) -> Tensor:
        return side.rows(sorted_rows, self.device)

    def _find_best(self) -> None:
        """Score the matching pairs alone, in blocks of about one tile's memory, and keep each item's maximum."""
        ends_N = (self.hi_N - self.lo_N).cumsum(0)
        width = self.query.vectors_ND.shape[1]
        block = max(1, self.chunk * self.chunk // width)
        for start in range(0, int(ends_N[-1]), block):
            pairs = torch.arange(start, min(start + block, int(ends_N[-1])))
            rows = torch.searchsorted(ends_N, pairs, right=True)
            columns = self.hi_N[rows] - (ends_N[rows] - pairs)
            scores = (self._rows(self.query, rows) * self._rows(self.gallery, columns)).sum(dim=1)
            for best, index in zip(self.best, (rows, columns), strict=True):
                best.scatter_reduce_(0, index.to(self.device), scores, "amax")

    def count_row_of_tiles(self, rows: slice) -> None:
        query_bD = self._rows(self.query, rows)
        for start in range(0, len(self.gallery.groups_N), self.chunk):
            columns = slice(start, min(start + self.chunk, len(self.gallery.groups_N)))
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            scores, beats = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (self.scores, self.beats))
            torch.mm(query_bD, self._rows(self.gallery, columns).T, out=scores)  # with `out`, autocast leaves it alone
            self._hide_positives(scores, rows, columns)
            # A comparison written as float32 0/1 and summed is exact for tiles up to 2^24 wide, and ten times faster
            # than summing booleans.
            for level, (compare, margin) in enumerate(((torch.gt, TIE), (torch.ge, -TIE))):
                compare(scores, self.best[0][rows, None] + margin, out=beats)
                self.counts[0][level, rows] += beats.sum(dim=1).long()
                if len(self.counts) > 1:
                    compare(scores, self.best[1][None, columns] + margin, out=beats)
                    self.counts[1][level, columns] += beats.sum(dim=0).long()

    def _hide_positives(self, scores: Tensor, rows: slice, columns: slice) -> None:
        lo_b = self.lo_N[rows].clamp(columns.start, columns.stop)
        size_b = self.hi_N[rows].clamp(columns.start, columns.stop) - lo_b
        pairs = int(size_b.sum())
        if pairs:
            first_b = lo_b - columns.start - size_b.cumsum(0) + size_b
            row = torch.repeat_interleave(torch.arange(len(size_b)), size_b)
            column = first_b[row] + torch.arange(pairs)
            scores[row.to(self.device), column.to(self.device)] = -torch.inf

    def ranks(self, side: _Side, other: _Side, gallery: int, index: int) -> RetrievalRanks:
        positives_N = torch.searchsorted(other.groups_N, side.groups_N, right=True)
        positives_N -= torch.searchsorted(other.groups_N, side.groups_N)
        optimistic_N, pessimistic_N = self.counts[index].cpu().masked_fill_(positives_N == 0, NO_POSITIVE)
        return RetrievalRanks(side.unsort(optimistic_N), side.unsort(pessimistic_N), side.unsort(positives_N), gallery)
