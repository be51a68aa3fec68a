"""One tile of a student and its teachers, and the results of the back ends and of float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tiles_under_test import (
    ROUNDING,
    Case,
    bits_of,
    check_cached,
    check_log_sums,
    close,
    empty_sums,
    gain_of,
    logit_error,
    rounded,
    varied_weights,
)
from torch import Tensor

from threetowers.kernels.tiles.statistics import OnlineExpectation, PairWeights, SigmoidSums, SoftmaxStatistics
from threetowers.kernels.tiles.tile_backend import StudentTile, TeacherTile, TileBackend
from threetowers.kernels.tiles.torch_tiles import TorchTiles

BIASES = (-3.0, -1.0, -5.0, 1.0)  # of the sigmoid: the student's, and its teachers'


@dataclass(frozen=True)
class DistillationCase:
    """A student's tile, and its teachers by their widths, which are not the student's."""

    student: Case
    widths: tuple[int, ...]

    @property
    def teachers(self) -> list[Case]:
        """Return the teachers' tiles: the same pairs, other features, other scales."""
        scales = [self.student.scale * factor for factor in (0.6, 1.5, 0.3)]
        return [
            replace(self.student, width=width, scale=scale) for width, scale in zip(self.widths, scales, strict=False)
        ]

    def tile(self, backend: TileBackend, element: torch.dtype, biased: bool) -> StudentTile:
        """Return the tile as the back end takes it; the teachers' weights are different, and 0.9 in all."""
        parts = range(1, 1 + len(self.widths))
        teachers = []
        for case, bias, part in zip(self.teachers, BIASES[1:], parts, strict=False):
            u_rE, v_cE = (backend.features(z_nE) for z_nE in case.features(element))
            tile = case.tile(backend.dtype, bias if biased else 0.0)
            teachers.append(TeacherTile(u_rE, v_cE, tile, 0.9 * part / sum(parts)))
        x_rD, y_cD = (backend.features(z_nD) for z_nD in self.student.features(element))
        return StudentTile(x_rD, y_cD, self.student.tile(backend.dtype, BIASES[0] if biased else 0.0), teachers)


@dataclass(frozen=True)
class Answers:
    """Everything that a back end computes of one tile."""

    rows: SoftmaxStatistics
    cols: SoftmaxStatistics
    cached_Krc: Tensor
    grad_rc: Tensor
    grad_from_cached_rc: Tensor
    sums: SigmoidSums
    sigmoid_grad_rc: Tensor

    def bits(self) -> bytes:
        """Return all numbers of the tile, to be compared bit by bit."""
        tensors = [self.cached_Krc, self.grad_rc, self.grad_from_cached_rc, self.sigmoid_grad_rc]
        tensors += [self.sums.loss_r, self.sums.prob_r, self.sums.row_max_r, self.sums.col_max_c]
        for side in (self.rows, self.cols):
            tensors += [side.student.max_n, side.student.sum_n]
            tensors += [part for teacher in side.teachers for part in (teacher.max_n, teacher.sum_n, teacher.cross_n)]
        return bits_of(*tensors)


def statistics_call(
    backend: TileBackend, case: DistillationCase, element: torch.dtype
) -> tuple[SoftmaxStatistics, SoftmaxStatistics, Callable[[Tensor | None], None]]:
    """Return empty statistics of rows and of columns, and `distill_stats` with all but its cache, merging into them."""
    student = case.tile(backend, element, biased=False)
    sides = (case.student.rows, case.student.cols)
    rows, cols = (SoftmaxStatistics.empty(n, len(case.widths), torch.empty(0), backend.dtype) for n in sides)
    return rows, cols, lambda cache_Krc: backend.distill_stats(student, rows, cols, cache_Krc)


def weights_of(side: SoftmaxStatistics, dtype: torch.dtype) -> PairWeights:
    """Return softmax weights as the loss would compute them; the teachers share 0.9 of the target."""
    share = 0.9 / len(side.teachers)
    teachers = [rounded(varied_weights(part.max_n, part.sum_n, share), dtype) for part in side.teachers]
    return PairWeights(rounded(varied_weights(side.student.max_n, side.student.sum_n), dtype), teachers)


def gradient_call(
    backend: TileBackend, case: DistillationCase, element: torch.dtype
) -> Callable[[Tensor | None], Tensor]:
    """Return `distill_grad` with all but its cache, with weights of the true statistics."""
    rows, cols, add = statistics_call(TorchTiles(torch.float64), case, element)
    add(None)
    weights = [weights_of(side, backend.dtype) for side in (rows, cols)]
    student = case.tile(backend, element, biased=False)
    return lambda cache_Krc: backend.distill_grad(student, *weights, cache_Krc)


def sigmoid_call(
    backend: TileBackend, case: DistillationCase, element: torch.dtype, sums: SigmoidSums
) -> Callable[[Tensor | None], Tensor | None]:
    """Return `distill_sigmoid` with all but the weights of rows."""
    student = case.tile(backend, element, biased=True)
    return lambda weights_r: backend.distill_sigmoid(student, sums, weights_r)


def answers(backend: TileBackend, case: DistillationCase, element: torch.dtype) -> Answers:
    """Run all methods of a back end. Outputs of kernels are filled with NaN before."""
    student, dtype, gain = case.student, backend.dtype, gain_of(backend, element)
    layers = 1 + len(case.widths)
    cached_Krc = torch.full((layers, student.rows, student.cols), math.nan, dtype=backend.cache_dtype)
    rows, cols, add = statistics_call(backend, case, element)
    for _ in range(2):  # merged twice: sums double, maxima stay
        add(cached_Krc)

    gradient = gradient_call(backend, case, element)
    grad_from_cached_rc = gradient(cached_Krc).to(dtype) / gain
    grad_rc = gradient(None).to(dtype) / gain

    sums = empty_sums(student, dtype)
    sigmoid = sigmoid_call(backend, case, element, sums)
    sigmoid_grad_rc = sigmoid(torch.linspace(0.5, 1, student.rows, dtype=dtype))
    assert sigmoid_grad_rc is not None
    sigmoid_grad_rc = sigmoid_grad_rc.to(dtype) / gain
    assert sigmoid(None) is None
    return Answers(rows, cols, cached_Krc, grad_rc, grad_from_cached_rc, sums, sigmoid_grad_rc)


def check(got: Answers, reference: Answers, case: DistillationCase, element: torch.dtype) -> None:
    """Raise AssertionError unless the answers agree, each within what its arithmetic allows."""
    error = logit_error(max(part.scale for part in (case.student, *case.teachers)))
    for got_rc, reference_rc in zip(got.cached_Krc, reference.cached_Krc, strict=True):
        check_cached(got_rc, reference_rc, case.student)
    for name in ("rows", "cols"):
        one, other = getattr(got, name), getattr(reference, name)
        check_log_sums(one.student, other.student, name, error)
        for k, (teacher, expected) in enumerate(zip(one.teachers, other.teachers, strict=True)):
            check_log_sums(teacher, expected, f"teacher {k}'s {name}", error)
            close(_mean_dots(teacher), _mean_dots(expected), f"mean dots of teacher {k}'s {name}", absolute=4 * error)

    # A gradient is the difference of what the student and its teachers give; either may err.
    for name in ("grad_rc", "grad_from_cached_rc", "sigmoid_grad_rc"):
        expected_rc = getattr(reference, name)
        close(getattr(got, name), expected_rc, name, relative=ROUNDING[element] + error, absolute=error)
    close(got.sums.loss_r, reference.sums.loss_r, "loss_r", relative=8 * error, absolute=1e-9)
    close(got.sums.prob_r, reference.sums.prob_r, "prob_r", absolute=4 * error * case.student.cols)
    for name in ("row_max_r", "col_max_c"):
        close(getattr(got.sums, name), getattr(reference.sums, name), name, absolute=error)


def _mean_dots(expectation: OnlineExpectation) -> Tensor:
    """Return cross / sum; 0 where nothing was met."""
    sum_n = expectation.sum_n.double()
    return torch.where(sum_n > 0, expectation.cross_n.double() / sum_n, expectation.cross_n.double())
