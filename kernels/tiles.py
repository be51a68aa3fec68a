"""Tiles of the similarity matrix: what the loop over tiles asks of a back end, and the back end in plain torch.

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
from typing_extensions import override

LOG2E = math.log2(math.e)


def spans(n: int, most: int) -> Iterator[slice]:
    """Yield 0..n in near-equal spans of at most ``most``, multiples of 64 where there is more than one."""
    if n == 0:
        return
    size = -(-n // -(-n // most))
    size = min(most, -(-size // 64) * 64)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def softplus(z_n: Tensor) -> Tensor:
    """Return log(1 + exp(z)) with full relative accuracy at both ends; 0 at -inf."""
    return z_n.clamp(min=0) + torch.log1p(torch.exp(-z_n.abs()))


def soft_cross_entropy(z_n: Tensor, target_n: Tensor) -> Tensor:
    """Return ``softplus(z) - target z``, without cancellation where a large z meets a target near 1; 0 at -inf."""
    missed_n = torch.where(z_n > 0, (1 - target_n) * z_n, -target_n * z_n.clamp(min=torch.finfo(z_n.dtype).min))
    return missed_n + torch.log1p(torch.exp(-z_n.abs()))


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
class OnlineLogSumExp:
    """Running log-sum-exps in base 2, each in two parts: ``2^max * sum``. Empty is (-inf, 0).

    Both parts are contiguous, and updated in place.
    """

    max_n: Tensor
    sum_n: Tensor

    @classmethod
    def empty(cls, n: int, like: Tensor, dtype: torch.dtype) -> Self:
        """Return n empty ones on the device of ``like``."""
        return cls(torch.full((n,), -torch.inf, dtype=dtype, device=like.device), like.new_zeros(n, dtype=dtype))

    def part(self, positions: slice) -> Self:
        """Return a view of those at these positions."""
        return type(self)(self.max_n[positions], self.sum_n[positions])

    def merge(self, max_n: Tensor, sum_n: Tensor) -> None:
        """Add other partial results, in place."""
        new_n = torch.maximum(self.max_n, max_n)
        base_n = torch.where(new_n == -torch.inf, 0, new_n)  # empty with empty: 2^(-inf - 0) = 0, not NaN
        self.sum_n.mul_(torch.exp2(self.max_n - base_n)).add_(sum_n * torch.exp2(max_n - base_n))
        self.max_n.copy_(new_n)


@dataclass(frozen=True, slots=True)
class SoftmaxWeights:
    """Softmax along one side: the probability of an entry, times its loss weight, is ``factor * 2^(t - shift)``.

    ``shift`` is at least every t of its row (column), so nothing overflows. Factors are such that a row's and a
    column's share of a gradient entry add up to at most 1 in magnitude: back ends that store gradient tiles as 16-bit
    numbers rely on it (the fp16 CUDA kernels store 2^14 times the gradient).
    """

    shift_n: Tensor
    factor_n: Tensor

    def part(self, positions: slice) -> Self:
        """Return a view of the weights at these positions."""
        return type(self)(self.shift_n[positions], self.factor_n[positions])


@dataclass(frozen=True, slots=True)
class SigmoidSums:
    """Running results of the sigmoid loss over admissible entries, z the natural logit. Updated in place."""

    loss_r: Tensor  # += Σ_j softplus(z_ij)
    prob_r: Tensor  # += Σ_j σ(z_ij)
    row_max_r: Tensor  # running max of t
    col_max_c: Tensor


@dataclass(frozen=True, slots=True)
class TeacherTile:
    """A teacher's tile beside the student's: the same rows, columns, diagonal and labels, its own logits."""

    u_rE: Tensor  # as `TileBackend.features` returns them
    v_cE: Tensor
    tile: Tile


@dataclass(frozen=True, slots=True)
class OnlineExpectation:
    """Running sums over a teacher's softmax in base 2: ``2^max * sum = Σ 2^t`` and ``2^max * cross = Σ 2^t dot``.

    t is the teacher's logit and dot the student's dot product, so that cross / sum is the dot's expectation under the
    teacher. Empty is (-inf, 0, 0). All parts are contiguous, and updated in place.
    """

    max_n: Tensor
    sum_n: Tensor
    cross_n: Tensor

    @classmethod
    def empty(cls, n: int, like: Tensor, dtype: torch.dtype) -> Self:
        """Return n empty ones on the device of ``like``."""
        max_n = torch.full((n,), -torch.inf, dtype=dtype, device=like.device)
        return cls(max_n, torch.zeros_like(max_n), torch.zeros_like(max_n))

    def part(self, positions: slice) -> Self:
        """Return a view of those at these positions."""
        return type(self)(self.max_n[positions], self.sum_n[positions], self.cross_n[positions])

    def merge(self, max_n: Tensor, sum_n: Tensor, cross_n: Tensor) -> None:
        """Add other partial results, in place."""
        new_n = torch.maximum(self.max_n, max_n)
        base_n = torch.where(new_n == -torch.inf, 0, new_n)
        old_n, other_n = torch.exp2(self.max_n - base_n), torch.exp2(max_n - base_n)
        self.sum_n.mul_(old_n).add_(sum_n * other_n)
        self.cross_n.mul_(old_n).add_(cross_n * other_n)
        self.max_n.copy_(new_n)


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
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: OnlineLogSumExp,
        cols: OnlineLogSumExp,
        teachers: Sequence[TeacherTile],
        teacher_rows: Sequence[OnlineExpectation],
        teacher_cols: Sequence[OnlineExpectation],
        cache_Krc: Tensor | None,
    ) -> None:
        """Do what `stats` does, and merge each teacher's statistics into its part of teacher_rows and teacher_cols.

        If cache_Krc (1 + K, r, c) is given, store the dots in it: the student's, then each teacher's.
        """

    @abstractmethod
    def distill_grad(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: SoftmaxWeights,
        cols: SoftmaxWeights,
        teachers: Sequence[TeacherTile],
        teacher_rows: Sequence[SoftmaxWeights],
        teacher_cols: Sequence[SoftmaxWeights],
        cache_Krc: Tensor | None,
    ) -> Tensor:
        """Return what `softmax_grad` returns, less the same of each teacher's logits with its own weights.

        The factors of a row's, or column's, teachers add up to no more than the student's.
        """

    @abstractmethod
    def distill_sigmoid(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        sums: SigmoidSums,
        weights_r: Tensor | None,
        teachers: Sequence[TeacherTile],
        teacher_weights: Sequence[float],
    ) -> Tensor | None:
        """Do what `sigmoid` does against the target ``q = Σ_k weight_k σ(t_k)``, with t_k a teacher's natural logit.

        The loss's summands are ``softplus(z) - q z``, the probability's ``σ(z) - q``, and the gradient is
        ``weights_i (σ(z) - q)``. teacher_weights add up to at most 1.
        """

    @abstractmethod
    def add_rows(self, dx_rD: Tensor, grad_rc: Tensor, y_cD: Tensor) -> None:
        """Do ``dx += grad @ y``, accumulated in ``dtype``."""

    @abstractmethod
    def add_cols(self, dy_cD: Tensor, grad_rc: Tensor, x_rD: Tensor) -> None:
        """Do ``dy += grad.T @ x``, accumulated in ``dtype``."""


class LibraryTiles(TileBackend):
    """Base of back ends that multiply with library GEMMs: dots into a scratch buffer, gradients accumulated."""

    def __init__(self, dtype: torch.dtype, rows: int = 2048, cols: int = 2048) -> None:
        self.rows = rows
        self.cols = cols
        self.dtype = self.cache_dtype = dtype
        self._scratch_n = torch.empty(0, dtype=dtype)

    @override
    def features(self, z_nD: Tensor) -> Tensor:
        return z_nD.to(self.dtype)

    def scratch(self, x_rD: Tensor, y_cD: Tensor) -> Tensor:
        """Return an (r, c) buffer, the same memory at every call."""
        return self.scratch_tiles(1, x_rD, y_cD)[0]

    def scratch_tiles(self, count: int, x_rD: Tensor, y_cD: Tensor) -> Tensor:
        """Return a (count, r, c) buffer, the same memory at every call."""
        size = count * len(x_rD) * len(y_cD)
        if self._scratch_n.numel() < size:
            self._scratch_n = x_rD.new_empty(size)
        return self._scratch_n[:size].view(count, len(x_rD), len(y_cD))

    def dots(self, x_rD: Tensor, y_cD: Tensor, out_rc: Tensor | None = None) -> Tensor:
        """Return ``x @ y.T`` in out_rc, or else in the scratch buffer."""
        return torch.mm(x_rD, y_cD.T, out=self.scratch(x_rD, y_cD) if out_rc is None else out_rc)

    def all_dots(
        self, x_rD: Tensor, y_cD: Tensor, teachers: Sequence[TeacherTile], out_Krc: Tensor | None = None
    ) -> Tensor:
        """Return the student's dots and each teacher's, (1 + K, r, c), in out_Krc, or else in the scratch buffer."""
        dots_Krc = self.scratch_tiles(1 + len(teachers), x_rD, y_cD) if out_Krc is None else out_Krc
        torch.mm(x_rD, y_cD.T, out=dots_Krc[0])
        for teacher, dots_rc in zip(teachers, dots_Krc[1:], strict=True):
            torch.mm(teacher.u_rE, teacher.v_cE.T, out=dots_rc)
        return dots_Krc

    @override
    def add_rows(self, dx_rD: Tensor, grad_rc: Tensor, y_cD: Tensor) -> None:
        dx_rD.addmm_(grad_rc, y_cD)

    @override
    def add_cols(self, dy_cD: Tensor, grad_rc: Tensor, x_rD: Tensor) -> None:
        dy_cD.addmm_(grad_rc.T, x_rD)

    @override
    def distill_stats(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: OnlineLogSumExp,
        cols: OnlineLogSumExp,
        teachers: Sequence[TeacherTile],
        teacher_rows: Sequence[OnlineExpectation],
        teacher_cols: Sequence[OnlineExpectation],
        cache_Krc: Tensor | None,
    ) -> None:
        dots_Krc = self.all_dots(x_rD, y_cD, teachers, cache_Krc)
        t_rc = _logits(dots_Krc[0], tile, tile.logit_map.base2_2[0])
        for side, dim in ((rows, 1), (cols, 0)):
            power_rc, max_n = _powers(t_rc, dim)
            side.merge(max_n, power_rc.sum(dim))
        for k, teacher in enumerate(teachers):
            t_rc = _logits(dots_Krc[1 + k], teacher.tile, teacher.tile.logit_map.base2_2[0])
            for expectation, dim in ((teacher_rows[k], 1), (teacher_cols[k], 0)):
                power_rc, max_n = _powers(t_rc, dim)
                expectation.merge(max_n, power_rc.sum(dim), (power_rc * dots_Krc[0]).sum(dim))

    @override
    def distill_grad(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: SoftmaxWeights,
        cols: SoftmaxWeights,
        teachers: Sequence[TeacherTile],
        teacher_rows: Sequence[SoftmaxWeights],
        teacher_cols: Sequence[SoftmaxWeights],
        cache_Krc: Tensor | None,
    ) -> Tensor:
        dots_Krc = self.all_dots(x_rD, y_cD, teachers) if cache_Krc is None else cache_Krc
        grad_rc = _probabilities(dots_Krc[0], tile, rows, cols)
        for k, teacher in enumerate(teachers):
            grad_rc -= _probabilities(dots_Krc[1 + k], teacher.tile, teacher_rows[k], teacher_cols[k])
        return grad_rc

    @override
    def distill_sigmoid(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        sums: SigmoidSums,
        weights_r: Tensor | None,
        teachers: Sequence[TeacherTile],
        teacher_weights: Sequence[float],
    ) -> Tensor | None:
        dots_Krc = self.all_dots(x_rD, y_cD, teachers)
        z_rc = _logits(dots_Krc[0], tile, *tile.logit_map.natural_2)
        target_rc = torch.zeros_like(z_rc)
        for teacher, weight, dots_rc in zip(teachers, teacher_weights, dots_Krc[1:], strict=True):
            logits_rc = _logits(dots_rc, teacher.tile, *teacher.tile.logit_map.natural_2)
            target_rc.add_(torch.sigmoid(logits_rc), alpha=weight)
        difference_rc = torch.sigmoid(z_rc) - target_rc
        sums.loss_r.add_(soft_cross_entropy(z_rc, target_rc).sum(1))
        sums.prob_r.add_(difference_rc.sum(1))
        torch.maximum(sums.row_max_r, z_rc.amax(1) * LOG2E, out=sums.row_max_r)
        torch.maximum(sums.col_max_c, z_rc.amax(0) * LOG2E, out=sums.col_max_c)
        return None if weights_r is None else difference_rc.mul_(weights_r[:, None])


def _logits(dot_rc: Tensor, tile: Tile, factor: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return ``dot * factor + offset`` as a new tensor, with -inf where excluded."""
    t_rc = dot_rc * factor
    if offset is not None:
        t_rc += offset
    if tile.row_labels_r is not None and tile.col_labels_c is not None:
        t_rc.masked_fill_(tile.row_labels_r[:, None] == tile.col_labels_c, -torch.inf)
    if tile.row_limits_r is not None and tile.col_limits_c is not None:
        t_rc.masked_fill_(dot_rc > torch.minimum(tile.row_limits_r[:, None], tile.col_limits_c), -torch.inf)
    if -len(t_rc) < tile.diagonal < t_rc.shape[1]:
        t_rc.diagonal(tile.diagonal).fill_(-torch.inf)
    return t_rc


def _powers(t_rc: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return ``2^(t - max)`` and the maxima along dim, in which all may be excluded."""
    max_n = t_rc.amax(dim)
    base_n = torch.where(max_n == -torch.inf, 0, max_n)
    return torch.exp2(t_rc - base_n.unsqueeze(dim)), max_n


def _probabilities(dot_rc: Tensor, tile: Tile, rows: SoftmaxWeights, cols: SoftmaxWeights) -> Tensor:
    """Return the weighted probabilities of a row's and of a column's softmax, summed; 0 where excluded."""
    t_rc = _logits(dot_rc, tile, tile.logit_map.base2_2[0])
    sum_rc = torch.exp2(t_rc - rows.shift_n[:, None]).mul_(rows.factor_n[:, None])
    return sum_rc.add_(torch.exp2(t_rc - cols.shift_n).mul_(cols.factor_n))


class TorchTiles(LibraryTiles):
    """Tiles on any device, float32 or float64, in plain torch ops: the other back ends' reference and replacement."""

    def __init__(self, dtype: torch.dtype, rows: int = 1024, cols: int = 2048) -> None:
        super().__init__(dtype, rows, cols)

    @override
    def stats(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: OnlineLogSumExp,
        cols: OnlineLogSumExp,
        cache_rc: Tensor | None,
    ) -> None:
        t_rc = _logits(self.dots(x_rD, y_cD, cache_rc), tile, tile.logit_map.base2_2[0])
        for side, dim in ((rows, 1), (cols, 0)):
            power_rc, max_n = _powers(t_rc, dim)
            side.merge(max_n, power_rc.sum(dim))

    @override
    def softmax_grad(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: SoftmaxWeights,
        cols: SoftmaxWeights,
        cache_rc: Tensor | None,
    ) -> Tensor:
        dot_rc = self.dots(x_rD, y_cD) if cache_rc is None else cache_rc
        return _probabilities(dot_rc, tile, rows, cols)

    @override
    def sigmoid(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, sums: SigmoidSums, weights_r: Tensor | None
    ) -> Tensor | None:
        z_rc = _logits(self.dots(x_rD, y_cD), tile, *tile.logit_map.natural_2)
        prob_rc = torch.sigmoid(z_rc)
        sums.loss_r.add_(softplus(z_rc).sum(1))
        sums.prob_r.add_(prob_rc.sum(1))
        torch.maximum(sums.row_max_r, z_rc.amax(1) * LOG2E, out=sums.row_max_r)
        torch.maximum(sums.col_max_c, z_rc.amax(0) * LOG2E, out=sums.col_max_c)
        return None if weights_r is None else prob_rc.mul_(weights_r[:, None])
