"""Every instruction set's sweep of a student's tile and its teachers', against the torch back end in float64."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from threetowers.kernels.cpu import CpuTiles
from threetowers.kernels.tiles import (
    LOG2E,
    LogitMap,
    OnlineExpectation,
    OnlineLogSumExp,
    SigmoidSums,
    SoftmaxWeights,
    TeacherTile,
    Tile,
    TileBackend,
    TorchTiles,
)

SHAPES = [(1, 1), (1, 65), (63, 1), (65, 63), (34, 1029)]
REFERENCE = TorchTiles(torch.float64)


class Operands(NamedTuple):
    """What the methods of distillation take first, and the teachers."""

    student: tuple[Tensor, Tensor, Tile]
    teachers: list[TeacherTile]

    def double(self) -> "Operands":
        x_rD, y_cD, tile = self.student
        teachers = [TeacherTile(part.u_rE.double(), part.v_cE.double(), part.tile) for part in self.teachers]
        return Operands((x_rD.double(), y_cD.double(), tile), teachers)


def _map(scale: float, bias: float = 0.0) -> LogitMap:
    return LogitMap.of(torch.tensor([scale, bias], dtype=torch.float64), torch.float32)


def _operands(rows: int, cols: int, teachers: int, diagonal: int, labelled: bool = False) -> Operands:
    g = torch.Generator().manual_seed(100 * rows + cols)
    row_labels_r, col_labels_c = (
        torch.randint(0, 5, (n,), generator=g, dtype=torch.int32) if labelled else None for n in (rows, cols)
    )
    tiles = [Tile(_map(0.5 + k, -k), diagonal, row_labels_r, col_labels_c) for k in range(1 + teachers)]
    sides = [[torch.randn(n, 5 + k, generator=g) for n in (rows, cols)] for k in range(1 + teachers)]
    student = sides[0][0], sides[0][1], tiles[0]
    return Operands(student, [TeacherTile(u, v, tile) for (u, v), tile in zip(sides[1:], tiles[1:], strict=True)])


class Statistics(NamedTuple):
    """Of one side."""

    student: OnlineLogSumExp
    teachers: list[OnlineExpectation]


def _statistics(
    backend: TileBackend, operands: Operands, cache_Krc: Tensor | None, merges: int = 1
) -> list[Statistics]:
    """Return those of the rows and of the columns, the tile merged as often as said."""
    x_rD, y_cD, _ = operands.student
    sides = [
        Statistics(
            OnlineLogSumExp.empty(len(part), part, backend.dtype),
            [OnlineExpectation.empty(len(part), part, backend.dtype) for _ in operands.teachers],
        )
        for part in (x_rD, y_cD)
    ]
    for _ in range(merges):
        backend.distill_stats(
            *operands.student,
            *(side.student for side in sides),
            operands.teachers,
            *(side.teachers for side in sides),
            cache_Krc,
        )
    return sides


def _weights(side: Statistics) -> list[SoftmaxWeights]:
    """Return the student's and the teachers' softmax, in float64."""
    parts: list[OnlineLogSumExp | OnlineExpectation] = [side.student, *side.teachers]
    return [SoftmaxWeights(torch.where(part.max_n.isinf(), 0, part.max_n), 1 / (part.sum_n + 1)) for part in parts]


def _gradient(
    backend: TileBackend, operands: Operands, weights: Sequence[list[SoftmaxWeights]], cache_Krc: Tensor | None
) -> Tensor:
    rows, cols = (
        [SoftmaxWeights(part.shift_n.to(backend.dtype), part.factor_n.to(backend.dtype)) for part in side]
        for side in weights
    )
    gradient_rc = backend.distill_grad(
        *operands.student, rows[0], cols[0], operands.teachers, rows[1:], cols[1:], cache_Krc
    )
    return gradient_rc.clone()  # it lies in the scratch buffer, which the next call fills


def _assert_same(found: Statistics, truth: Statistics, rtol: float) -> None:
    pairs = [(found.student, truth.student), *zip(found.teachers, truth.teachers, strict=True)]
    for a, b in pairs:
        logs = [(part.max_n.double() + part.sum_n.double().log2()) for part in (a, b)]
        torch.testing.assert_close(*logs, rtol=rtol, atol=rtol)
    for own, other in zip(found.teachers, truth.teachers, strict=True):
        some_n = other.sum_n > 0
        assert torch.equal(own.sum_n > 0, some_n)
        assert (own.cross_n[~some_n] == 0).all()
        means = [(part.cross_n.double() / part.sum_n.double())[some_n] for part in (own, other)]
        torch.testing.assert_close(*means, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("teachers", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_softmax_sweeps(sweep: CpuTiles, rows: int, cols: int, teachers: int, labelled: bool) -> None:
    for diagonal in (-rows - 3, -1, 0, 2):
        operands = _operands(rows, cols, teachers, diagonal, labelled)
        cache_Krc = torch.full((1 + teachers, rows, cols), torch.nan)
        found = _statistics(sweep, operands, cache_Krc, merges=2)
        truth = _statistics(REFERENCE, operands.double(), None, merges=2)
        for own, other in zip(found, truth, strict=True):
            _assert_same(own, other, 1e-5)

        weights = [_weights(side) for side in truth]
        want_rc = _gradient(REFERENCE, operands.double(), weights, None)
        cache_before = cache_Krc.clone()
        computed_rc = _gradient(sweep, operands, weights, None)
        torch.testing.assert_close(computed_rc.double(), want_rc, rtol=1e-4, atol=1e-6)
        assert torch.equal(_gradient(sweep, operands, weights, cache_Krc), computed_rc)
        assert torch.equal(cache_Krc, cache_before)


@pytest.mark.parametrize("apart", [0, 63, 65, 1000])
def test_maxima_near_and_far_apart(sweep: CpuTiles, apart: int) -> None:
    """One power serves a row and a column up to a distance of their maxima, two beyond, in student and teacher alike.

    All dots are exact, and base-2 logits: what differs from float64 is the sweep's own rounding.
    """
    base_2 = Tile(LogitMap(torch.tensor([1 / LOG2E, 0.0]), torch.tensor([1.0, 0.0])), 0)
    t_r = (torch.linspace(0, apart, 70) * 4).round()[torch.arange(70) * 27 % 70] / 4
    low_c = -(torch.arange(1029) * 7 % 40) / 4
    spread_rD, spread_cD = torch.stack([t_r, torch.ones(70)], 1), torch.stack([torch.ones(1029), low_c], 1)
    near_rD, near_cD = (torch.arange(70) % 9 / 4).unsqueeze(1), (torch.arange(1029) % 13 / 4 - 1).unsqueeze(1)
    spread, near = (spread_rD, spread_cD, base_2), (near_rD, near_cD, base_2)
    for student, teacher in ((spread, near), (near, spread)):
        operands = Operands(student, [TeacherTile(*teacher)])
        found, truth = _statistics(sweep, operands, None), _statistics(REFERENCE, operands.double(), None)
        for own, other in zip(found, truth, strict=True):
            _assert_same(own, other, 2e-6)
        weights = [_weights(side) for side in truth]
        for silent in (0, 1):  # first the teacher's part alone, then the student's: neither hides the other's errors
            single = [list(side) for side in weights]
            for side in single:
                side[silent] = SoftmaxWeights(side[silent].shift_n, torch.zeros_like(side[silent].factor_n))
            want_rc = _gradient(REFERENCE, operands.double(), single, None)
            found_rc = _gradient(sweep, operands, single, None)
            torch.testing.assert_close(found_rc.double(), want_rc, rtol=2e-6, atol=1e-36)
        both_rc = _gradient(sweep, operands, weights, None)
        want_rc = _gradient(REFERENCE, operands.double(), weights, None)
        torch.testing.assert_close(both_rc.double(), want_rc, rtol=0, atol=1e-6)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_sigmoid_sweep(sweep: CpuTiles, rows: int, cols: int, teachers: int, labelled: bool) -> None:
    operands = _operands(rows, cols, teachers, 1, labelled)
    shares = [0.9 / teachers] * teachers
    results = []
    for backend, given in ((sweep, operands), (REFERENCE, operands.double())):
        sums = SigmoidSums(
            loss_r=torch.ones(rows, dtype=backend.dtype),
            prob_r=torch.ones(rows, dtype=backend.dtype),
            row_max_r=torch.full((rows,), -torch.inf, dtype=backend.dtype),
            col_max_c=torch.full((cols,), -torch.inf, dtype=backend.dtype),
        )
        weights_r = torch.linspace(0.5, 1, rows, dtype=backend.dtype)
        gradient_rc = backend.distill_sigmoid(*given.student, sums, weights_r, given.teachers, shares)
        assert gradient_rc is not None
        gradient_rc = gradient_rc.clone()
        assert backend.distill_sigmoid(*given.student, sums, None, given.teachers, shares) is None  # merged twice
        parts = (gradient_rc, sums.loss_r, sums.prob_r, sums.row_max_r, sums.col_max_c)
        results.append([part.double() for part in parts])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * cols**0.5)


def test_a_small_loss_keeps_its_relative_accuracy(sweep: CpuTiles) -> None:
    """Both terms of ``softplus(z) - q z`` are tiny where z is far below 0 and the teacher agrees."""
    z_c = torch.linspace(-80, -1, 80)[:, None]
    for j in range(80):
        side = torch.ones(1, 1), z_c[j : j + 1], Tile(_map(1.0), 7)
        sums = SigmoidSums(torch.zeros(1), torch.zeros(1), torch.full((1,), -torch.inf), torch.full((1,), -torch.inf))
        sweep.distill_sigmoid(*side, sums, None, [TeacherTile(*side)], [0.5])
        z = z_c[j].double()
        torch.testing.assert_close(sums.loss_r.double(), torch.log1p(z.exp()) - z * z.sigmoid() / 2, rtol=1e-5, atol=0)
        torch.testing.assert_close(sums.prob_r.double(), z.sigmoid() / 2, rtol=1e-5, atol=0)


def test_bits_do_not_depend_on_threads(sweep: CpuTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = _operands(300, 1100, 2, 0)
    dots_Krc = sweep.all_dots(operands.student[0], operands.student[1], operands.teachers).clone()
    # The product's own bits may depend on threads.
    monkeypatch.setattr(sweep, "all_dots", lambda *_: dots_Krc.clone())
    weights = [_weights(side) for side in _statistics(REFERENCE, operands.double(), None)]
    outcomes = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parts = []
            for side in _statistics(sweep, operands, None):
                parts += [side.student.max_n, side.student.sum_n]
                parts += [part for each in side.teachers for part in (each.max_n, each.sum_n, each.cross_n)]
            sums = SigmoidSums(
                torch.zeros(300), torch.zeros(300), torch.full((300,), -torch.inf), torch.full((1100,), -torch.inf)
            )
            gradient_rc = sweep.distill_sigmoid(*operands.student, sums, torch.ones(300), operands.teachers, [0.5, 0.5])
            assert gradient_rc is not None
            parts += [sums.loss_r, sums.prob_r, sums.row_max_r, sums.col_max_c, gradient_rc.flatten()]
            parts.append(_gradient(sweep, operands, weights, None).flatten())
            outcomes.append(torch.cat(parts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])
