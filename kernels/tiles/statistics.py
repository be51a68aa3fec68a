"""What tiles leave behind for each row and column, and what their gradients take from there."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


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


@dataclass(frozen=True, slots=True)
class SoftmaxStatistics:
    """Running statistics of rows, or of columns: the student's, and each teacher's."""

    student: OnlineLogSumExp
    teachers: list[OnlineExpectation]

    @classmethod
    def empty(cls, n: int, teachers: int, like: Tensor, dtype: torch.dtype) -> Self:
        """Return those of n rows or columns that have met nothing yet, on the device of ``like``."""
        expectations = [OnlineExpectation.empty(n, like, dtype) for _ in range(teachers)]
        return cls(OnlineLogSumExp.empty(n, like, dtype), expectations)

    def part(self, positions: slice) -> Self:
        """Return a view of those at these positions."""
        return type(self)(self.student.part(positions), [part.part(positions) for part in self.teachers])


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
class PairWeights:
    """The softmaxes along rows, or along columns: the student's, and each teacher's.

    The factors of a row's, or column's, teachers add up to no more than the student's.
    """

    student: SoftmaxWeights
    teachers: list[SoftmaxWeights]

    def part(self, positions: slice) -> Self:
        """Return a view of those at these positions."""
        return type(self)(self.student.part(positions), [part.part(positions) for part in self.teachers])


@dataclass(frozen=True, slots=True)
class SigmoidSums:
    """Running results of the sigmoid loss over admissible entries, z the natural logit. Updated in place."""

    loss_r: Tensor  # += Σ_j softplus(z_ij)
    prob_r: Tensor  # += Σ_j σ(z_ij)
    row_max_r: Tensor  # running max of t
    col_max_c: Tensor
