"""Ranks of the best match of each query, safe under ties, without the similarity matrix in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from threetowers.cache.processes.float32_products import exact_products

NO_POSITIVE = -1  # the rank of a query that nothing in the gallery matches

# Equal cosines come out of a float32 product some 5e-7 apart, depending on where in the matrix they stand, so closer
# scores than this count as tied. At COCO's size that takes in the real gaps of 0.4 % of queries, most of them far down:
# no recall moves by more than one query (tests/benchmarks/bench_retrieval.py).
TIE = 1e-6
UNIT_NORM_TOLERANCE = 1e-2  # embeddings normalised in bfloat16 are this far off at most


@dataclass(frozen=True)
class RetrievalRanks:
    """0-based rank of every query's best-scoring positive among the gallery items that do not match the query.

    Attributes:
        optimistic_N: How many non-positives score higher; `NO_POSITIVE` where the gallery holds no match.
        pessimistic_N: How many non-positives score higher or the same; `NO_POSITIVE` likewise.
        positives_N: How many gallery items match each query.
        gallery: Size of the gallery.
    """

    optimistic_N: NDArray[np.int64]
    pessimistic_N: NDArray[np.int64]
    positives_N: NDArray[np.int64]
    gallery: int

    @property
    def answerable_N(self) -> NDArray[np.bool_]:
        """Whether each query has a match in the gallery."""
        return self.positives_N > 0


def two_way_ranks(
    image_ND: ArrayLike | Tensor,
    text_MD: ArrayLike | Tensor,
    image_group_N: ArrayLike | Tensor,
    text_group_M: ArrayLike | Tensor,
    *,
    chunk: int = 2048,
    device: str | torch.device = "cpu",
) -> tuple[RetrievalRanks, RetrievalRanks]:
    """Return the ranks of images among texts and of texts among images, by cosine in float32.

    One pass over tiles of scores serves both directions, in O(chunk²) extra memory (16 MiB of scores at 2048). Vectors
    may be memory-mapped: no more than a chunk of them is copied at a time. The result depends neither on `chunk` nor on
    the order of either side.

    Args:
        image_ND: Unit-norm image embeddings, of any float type.
        text_MD: Unit-norm text embeddings.
        image_group_N: Group id of each image; an image and a text match iff their ids are equal.
        text_group_M: Group id of each text.
        chunk: Rows and columns of a tile.
        device: Where scores are computed.

    Raises:
        ValueError: For vectors that are empty, not finite, not unit-norm or of unequal width, and for groups that are
            not one integer per vector.
    """
    image = _side(image_ND, image_group_N, "image")
    text = _side(text_MD, text_group_M, "text")
    if image.vectors_ND.shape[1] != text.vectors_ND.shape[1]:
        raise ValueError(
            f"embeddings of widths {image.vectors_ND.shape[1]} and {text.vectors_ND.shape[1]} cannot be compared: "
            "both sides must come from one model"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")
    with torch.inference_mode(), exact_products():
        counter = _RankCounter(image, text, chunk, torch.device(device))
        for start in range(0, len(image.groups_N), chunk):
            counter.count_rows(slice(start, min(start + chunk, len(image.groups_N))))
        return _ranks(image, text, counter.image_counts), _ranks(text, image, counter.text_counts)


@dataclass(frozen=True)
class _Side:
    """One side of the similarity matrix, sorted by group so that the matches of an item are one interval.

    Vectors stay where they are, perhaps memory-mapped: only chunks of them are copied.
    """

    vectors_ND: NDArray[Any] | Tensor
    groups_N: Tensor
    order_N: Tensor

    def rows(self, sorted_rows: slice | Tensor, device: torch.device) -> Tensor:
        """Return vectors by their positions in the sorted order, as float32 on a device."""
        rows = self.order_N[sorted_rows]
        if isinstance(self.vectors_ND, Tensor):
            return self.vectors_ND[rows.to(self.vectors_ND.device)].to(device, torch.float32)
        return torch.from_numpy(np.asarray(self.vectors_ND[rows.numpy()], dtype=np.float32)).to(device)

    def unsort(self, sorted_N: Tensor) -> NDArray[np.int64]:
        """Return values given in the sorted order in the original one."""
        values_N = torch.empty_like(sorted_N)
        values_N[self.order_N] = sorted_N
        result: NDArray[np.int64] = values_N.numpy()
        return result


def group_ids(groups: ArrayLike | Tensor, name: str) -> Tensor:
    """Return group ids as an int64 tensor (N,) on the CPU.

    Raises:
        ValueError: Unless they are a vector of integers.
    """
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


def _check_norms(side: _Side, name: str, chunk: int = 65_536) -> None:
    norms_N = torch.empty(len(side.order_N))
    for start in range(0, len(norms_N), chunk):
        rows = side.order_N[start : start + chunk]
        norms_N[rows] = torch.linalg.vector_norm(side.rows(slice(start, start + chunk), torch.device("cpu")), dim=1)
    wrong_N = ~((norms_N - 1).abs() <= UNIT_NORM_TOLERANCE)  # a comparison with NaN is false: NaN is wrong too
    if wrong_N.any():
        row = int(wrong_N.nonzero()[0, 0])
        raise ValueError(
            f"{int(wrong_N.sum())} of {len(norms_N)} {name} embeddings are not unit-norm and finite; the first is row "
            f"{row} with norm {float(norms_N[row]):.4g}: normalise them, and look for what produced NaN or zero rows"
        )


class _RankCounter:
    """Counts, tile by tile, the non-positives that score higher than each item's best positive, or the same.

    Every buffer is a tile, a chunk of vectors or one number an item, so the score matrix itself never exists. Items are
    in the sorted order of their side. `image_counts` and `text_counts` are (2, items): optimistic, pessimistic.
    """

    def __init__(self, image: _Side, text: _Side, chunk: int, device: torch.device) -> None:
        self.image, self.text = image, text
        self.chunk, self.device = chunk, device
        images, texts = len(image.groups_N), len(text.groups_N)
        # The matches of image i are the texts from lo_N[i] to hi_N[i].
        self.lo_N = torch.searchsorted(text.groups_N, image.groups_N)
        self.hi_N = torch.searchsorted(text.groups_N, image.groups_N, right=True)
        self.image_best = torch.full((images,), -torch.inf, device=device)
        self.text_best = torch.full((texts,), -torch.inf, device=device)
        self._find_best()
        self.image_counts = torch.zeros(2, images, dtype=torch.int64, device=device)
        self.text_counts = torch.zeros(2, texts, dtype=torch.int64, device=device)
        tile = min(chunk, images) * min(chunk, texts)
        self.scores = torch.empty(tile, device=device)
        self.beats = torch.empty(tile, device=device)

    def _find_best(self) -> None:
        """Score the matching pairs alone, some at a time within a tile's memory, and keep each item's maximum."""
        ends_N = (self.hi_N - self.lo_N).cumsum(0)
        total = int(ends_N[-1])
        width = self.image.vectors_ND.shape[1]
        step = max(1, self.chunk * self.chunk // width)
        for start in range(0, total, step):
            pairs = torch.arange(start, min(start + step, total))
            rows = torch.searchsorted(ends_N, pairs, right=True)
            columns = self.hi_N[rows] - (ends_N[rows] - pairs)
            scores = (self.image.rows(rows, self.device) * self.text.rows(columns, self.device)).sum(dim=1)
            self.image_best.scatter_reduce_(0, rows.to(self.device), scores, "amax")
            self.text_best.scatter_reduce_(0, columns.to(self.device), scores, "amax")

    def count_rows(self, rows: slice) -> None:
        """Count the tiles of some images against all texts."""
        image_bD = self.image.rows(rows, self.device)
        for start in range(0, len(self.text.groups_N), self.chunk):
            columns = slice(start, min(start + self.chunk, len(self.text.groups_N)))
            height, width = rows.stop - rows.start, columns.stop - columns.start
            scores = self.scores[: height * width].view(height, width)
            beats = self.beats[: height * width].view(height, width)
            torch.mm(image_bD, self.text.rows(columns, self.device).T, out=scores)  # `out`: autocast leaves it alone
            self._hide_positives(scores, rows, columns)
            levels: tuple[tuple[Callable[..., Tensor], float], ...] = ((torch.gt, TIE), (torch.ge, -TIE))
            for level, (compare, margin) in enumerate(levels):
                # A comparison written as float32 0/1 and summed is exact for tiles up to 2^24 wide, and ten times
                # faster than summing booleans.
                compare(scores, self.image_best[rows, None] + margin, out=beats)
                self.image_counts[level, rows] += beats.sum(dim=1).long()
                compare(scores, self.text_best[None, columns] + margin, out=beats)
                self.text_counts[level, columns] += beats.sum(dim=0).long()

    def _hide_positives(self, scores: Tensor, rows: slice, columns: slice) -> None:
        """Set the scores of the matching pairs of a tile to -inf."""
        lo_b = self.lo_N[rows].clamp(columns.start, columns.stop)
        size_b = self.hi_N[rows].clamp(columns.start, columns.stop) - lo_b
        pairs = int(size_b.sum())
        if pairs:
            first_b = lo_b - columns.start - size_b.cumsum(0) + size_b
            row = torch.repeat_interleave(torch.arange(len(size_b)), size_b)
            column = first_b[row] + torch.arange(pairs)
            scores[row.to(self.device), column.to(self.device)] = -torch.inf


def _ranks(query: _Side, gallery: _Side, counts: Tensor) -> RetrievalRanks:
    """Return counts (2, N) of one side's sorted items as ranks in their original order."""
    positives_N = torch.searchsorted(gallery.groups_N, query.groups_N, right=True)
    positives_N -= torch.searchsorted(gallery.groups_N, query.groups_N)
    optimistic_N, pessimistic_N = counts.cpu().masked_fill_(positives_N == 0, NO_POSITIVE)
    return RetrievalRanks(
        query.unsort(optimistic_N), query.unsort(pessimistic_N), query.unsort(positives_N), len(gallery.groups_N)
    )
