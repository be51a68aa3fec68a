"""Tiles of the similarity matrix: what the loop over tiles asks of a back end.

A tile is the block of logits between r rows of x and c columns of y. Every back end computes
``dot = x_rD @ y_cD.T`` with at least float32 accumulation and works on ``t = (scale * dot + bias) * log2(e)``: logits
in base 2. Three kinds of entries are *excluded* from a tile, as if they were not there: the samples' own pairs (the
positives, which are treated apart in O(B)), found at ``(i, i + tile.diagonal)``; where labels are given, all entries
of equal labels; and where limits are given, all whose dot is above the limit of their row or of their column. Where
columns have owners, the diagonal misses the tile, and labels exclude the own pairs.

Tiles come in a fixed order from one thread (one stream), with r, c >= 1 and never larger than ``backend.rows`` x
``backend.cols``, or, where there are no teachers and neither gradients nor cached dots are asked for, ``stats_rows`` x
``stats_cols``. Statistics are merged into the slices given, in place. A back end must give the same bits for the same
sequence of calls, and must round ``t - shift`` in `softmax_grad` as ``t - max`` in `stats` (both fused, or both from a
rounded t): else probabilities would not sum to 1 where logits are large. Gradient tiles may live in the back end's
scratch memory: they are consumed before the next tile is asked for.

A new back end implements `TileBackend` and is chosen in `backends.backend_for`, nowhere else.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from threetowers.kernels.tiles.statistics import (
    OnlineLogSumExp,
    PairWeights,
    SigmoidSums,
    SoftmaxStatistics,
    SoftmaxWeights,
)

LOG2E = math.log2(math.e)


def spans(n: int, most: int) -> Iterator[slice]:
    """Yield 0..n in near-equal spans of at most ``most``, multiples of 64 where there is more than one."""
    if n == 0:
        return
    size = -(-n // -(-n // most))
    size = min(most, -(-size // 64) * 64)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


@dataclass(frozen=True, slots=True)
class LogitMap:
    """How the dots of a pair become logits, ``scale * dot + bias``, in numbers that lie where its features do.

    Rounded once, here: every tile and the positives then take the same factor. The host need not know them.
    """

    natural_2: Tensor  # (scale, bias) of natural logits, in the back end's dtype
    base2_2: Tensor  # of logits in base 2

    @classmethod
    def of(cls, scalars_2: Tensor, dtype: torch.dtype) -> Self:
        """Return the map of a scale and a bias, float64; the bias is 0 for the softmax."""
        return cls(scalars_2.to(dtype), (scalars_2 * LOG2E).to(dtype))


@dataclass(frozen=True, slots=True)
class Tile:
    """Where a tile lies, and how its dots become logits."""

    logit_map: LogitMap
    diagonal: int  # entry (i, i + diagonal) is the sample's own pair; any integer, often outside the tile
    row_labels_r: Tensor | None = None  # int32, contiguous; both or none
    col_labels_c: Tensor | None = None
    row_limits_r: Tensor | None = None  # in the back end's dtype, contiguous; both or none
    col_limits_c: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TeacherTile:
    """A teacher's tile beside the student's: the same rows, columns, diagonal and labels, its own logits."""

    u_rE: Tensor  # as `TileBackend.features` returns them
    v_cE: Tensor
    tile: Tile
    weight: float  # its share of the target; all add up to at most 1


@dataclass(frozen=True, slots=True)
class StudentTile:
    """A tile with the features of its rows and columns, and those of its teachers, if any."""

    x_rD: Tensor  # as `TileBackend.features` returns them
    y_cD: Tensor
    tile: Tile
    teachers: Sequence[TeacherTile] = ()


class TileBackend(ABC):
    """What computes tiles on one kind of device; the module's docstring has the rules."""

    rows: int  # of a tile whose gradient, or whose dots, have to be in memory
    cols: int
    dtype: torch.dtype  # of statistics, weights and gradients: float32, or float64 for float64 features
    cache_dtype: torch.dtype  # of tiles in the logit cache

    @property
    def stats_rows(self) -> int:
        """Rows of a tile that leaves nothing but statistics."""
        return self.rows

    @property
    def stats_cols(self) -> int:
        """Columns of such a tile."""
        return self.cols

    @abstractmethod
    def features(self, z_nD: Tensor) -> Tensor:
        """Return rows in the form that the methods below take: dtype, contiguity."""

    @abstractmethod
    def stats(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: OnlineLogSumExp,
        cols: OnlineLogSumExp,
        cache_rc: Tensor | None,
    ) -> None:
        """Merge the tile's row and column (max, sum) into rows and cols; if cache_rc is given, store the dots in it.

        Excluded entries may be left as -inf there.
        """

    @abstractmethod
    def softmax_grad(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: SoftmaxWeights,
        cols: SoftmaxWeights,
        cache_rc: Tensor | None,
    ) -> Tensor:
        """Return ``rows.factor_i 2^(t - rows.shift_i) + cols.factor_j 2^(t - cols.shift_j)``, excluded entries 0.

        cache_rc holds the dots that `stats` stored (read only): then no dot needs computing.
        """

    @abstractmethod
    def sigmoid(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, sums: SigmoidSums, weights_r: Tensor | None
    ) -> Tensor | None:
        """Merge into sums; where weights_r (at most 1 in magnitude) is given return ``weights_i σ(z_ij)``.

        Excluded entries are 0 there.
        """

    @abstractmethod
    def distill_stats(
        self, student: StudentTile, rows: SoftmaxStatistics, cols: SoftmaxStatistics, cache_Krc: Tensor | None
    ) -> None:
        """Do what `stats` does, and merge each teacher's statistics into its part of rows and cols.

        If cache_Krc (1 + K, r, c) is given, store the dots in it: the student's, then each teacher's.
        """

    @abstractmethod
    def distill_grad(
        self, student: StudentTile, rows: PairWeights, cols: PairWeights, cache_Krc: Tensor | None
    ) -> Tensor:
        """Return what `softmax_grad` returns, less the same of each teacher's logits with its own weights."""

    @abstractmethod
    def distill_sigmoid(self, student: StudentTile, sums: SigmoidSums, weights_r: Tensor | None) -> Tensor | None:
        """Do what `sigmoid` does against the target ``q = Σ_k weight_k σ(t_k)``, with t_k a teacher's natural logit.

        The loss's summands are ``softplus(z) - q z``, the probability's ``σ(z) - q``, and the gradient is
        ``weights_i (σ(z) - q)``.
        """

    @abstractmethod
    def add_rows(self, dx_rD: Tensor, grad_rc: Tensor, y_cD: Tensor) -> None:
        """Do ``dx += grad @ y``, accumulated in ``dtype``."""

    @abstractmethod
    def add_cols(self, dy_cD: Tensor, grad_rc: Tensor, x_rD: Tensor) -> None:
        """Do ``dy += grad.T @ x``, accumulated in ``dtype``."""
