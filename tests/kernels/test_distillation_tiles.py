"""Every instruction set's sweep of a student's tile and its teachers', against the torch back end in float64."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from threetowers.kernels.cpu import CpuTiles
from threetowers.kernels.tiles.statistics import (
    OnlineExpectation,
    OnlineLogSumExp,
    PairWeights,
    SigmoidSums,
    SoftmaxStatistics,
    SoftmaxWeights,
)
from threetowers.kernels.tiles.tile_backend import LOG2E, LogitMap, StudentTile, TeacherTile, Tile, TileBackend
from threetowers.kernels.tiles.torch_tiles import TorchTiles

SHAPES = [(1, 1), (1, 65), (63, 1), (65, 63), (34, 1029)]
REFERENCE = TorchTiles(torch.float64)


def _double(student: StudentTile) -> StudentTile:
    teachers = [replace(part, u_rE=part.u_rE.double(), v_cE=part.v_cE.double()) for part in student.teachers]
    return replace(student, x_rD=student.x_rD.double(), y_cD=student.y_cD.double(), teachers=teachers)


def _map(scale: float, bias: float = 0.0) -> LogitMap:
    return LogitMap.of(torch.tensor([scale, bias], dtype=torch.float64), torch.float32)


def _student(rows: int, cols: int, teachers: int, diagonal: int, labelled: bool = False) -> StudentTile:
    g = torch.Generator().manual_seed(100 * rows + cols)
    row_labels_r, col_labels_c = (
        torch.randint(0, 5, (n,), generator=g, dtype=torch.int32) if labelled else None for n in (rows, cols)
    )
    tiles = [Tile(_map(0.5 + k, -k), diagonal, row_labels_r, col_labels_c) for k in range(1 + teachers)]
    sides = [[torch.randn(n, 5 + k, generator=g) for n in (rows, cols)] for k in range(1 + teachers)]
    taught = [
        TeacherTile(u_rE, v_cE, tile, 0.9 / teachers) for (u_rE, v_cE), tile in zip(sides[1:], tiles[1:], strict=True)
    ]
    return StudentTile(*sides[0], tiles[0], taught)


def _statistics(
    backend: TileBackend, student: StudentTile, cache_Krc: Tensor | None, merges: int = 1
) -> list[SoftmaxStatistics]:
    """Return those of the rows and of the columns, the tile merged as often as said."""
    rows, cols = (
        SoftmaxStatistics.empty(len(part), len(student.teachers), part, backend.dtype)
        for part in (student.x_rD, student.y_cD)
    )
    for _ in range(merges):
        backend.distill_stats(student, rows, cols, cache_Krc)
    return [rows, cols]


def _weights(side: SoftmaxStatistics) -> PairWeights:
    """Return the student's and the teachers' softmax, in float64."""
    parts: list[OnlineLogSumExp | OnlineExpectation] = [side.student, *side.teachers]
    weights = [SoftmaxWeights(torch.where(part.max_n.isinf(), 0, part.max_n), 1 / (part.sum_n + 1)) for part in parts]
    return PairWeights(weights[0], weights[1:])


def _gradient(
    backend: TileBackend, student: StudentTile, weights: Sequence[PairWeights], cache_Krc: Tensor | None
) -> Tensor:
    def rounded(part: SoftmaxWeights) -> SoftmaxWeights:
        return SoftmaxWeights(part.shift_n.to(backend.dtype), part.factor_n.to(backend.dtype))

    rows, cols = (PairWeights(rounded(side.student), [rounded(part) for part in side.teachers]) for side in weights)
    gradient_rc = backend.distill_grad(student, rows, cols, cache_Krc)
    return gradient_rc.clone()  # it lies in the scratch buffer, which the next call fills


def _assert_same(found: SoftmaxStatistics, truth: SoftmaxStatistics, rtol: float) -> None:
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
        student = _student(rows, cols, teachers, diagonal, labelled)
        cache_Krc = torch.full((1 + teachers, rows, cols), torch.nan)
        found = _statistics(sweep, student, cache_Krc, merges=2)
        truth = _statistics(REFERENCE, _double(student), None, merges=2)
        for own, other in zip(found, truth, strict=True):
            _assert_same(own, other, 1e-5)

        weights = [_weights(side) for side in truth]
        want_rc = _gradient(REFERENCE, _double(student), weights, None)
        cache_before = cache_Krc.clone()
        computed_rc = _gradient(sweep, student, weights, None)
        torch.testing.assert_close(computed_rc.double(), want_rc, rtol=1e-4, atol=1e-6)
        assert torch.equal(_gradient(sweep, student, weights, cache_Krc), computed_rc)
        assert torch.equal(cache_Krc, cache_before)


def _silent(part: SoftmaxWeights) -> SoftmaxWeights:
    return SoftmaxWeights(part.shift_n, torch.zeros_like(part.factor_n))


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
    spread, near = (spread_rD, spread_cD), (near_rD, near_cD)
    for own, teacher in ((spread, near), (near, spread)):
        student = StudentTile(*own, base_2, [TeacherTile(*teacher, base_2, 1.0)])
        found, truth = _statistics(sweep, student, None), _statistics(REFERENCE, _double(student), None)
        for side, true_side in zip(found, truth, strict=True):
            _assert_same(side, true_side, 2e-6)
        weights = [_weights(side) for side in truth]
        # The teacher's part alone, then the student's: neither hides the other's errors.
        of_teacher = [replace(side, student=_silent(side.student)) for side in weights]
        of_student = [replace(side, teachers=[_silent(part) for part in side.teachers]) for side in weights]
        for single in (of_teacher, of_student):
            want_rc = _gradient(REFERENCE, _double(student), single, None)
            found_rc = _gradient(sweep, student, single, None)
            torch.testing.assert_close(found_rc.double(), want_rc, rtol=2e-6, atol=1e-36)
        both_rc = _gradient(sweep, student, weights, None)
        want_rc = _gradient(REFERENCE, _double(student), weights, None)
        torch.testing.assert_close(both_rc.double(), want_rc, rtol=0, atol=1e-6)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_sigmoid_sweep(sweep: CpuTiles, rows: int, cols: int, teachers: int, labelled: bool) -> None:
    student = _student(rows, cols, teachers, 1, labelled)
    results = []
    for backend, given in ((sweep, student), (REFERENCE, _double(student))):
        sums = SigmoidSums(
            loss_r=torch.ones(rows, dtype=backend.dtype),
            prob_r=torch.ones(rows, dtype=backend.dtype),
            row_max_r=torch.full((rows,), -torch.inf, dtype=backend.dtype),
            col_max_c=torch.full((cols,), -torch.inf, dtype=backend.dtype),
        )
        weights_r = torch.linspace(0.5, 1, rows, dtype=backend.dtype)
        gradient_rc = backend.distill_sigmoid(given, sums, weights_r)
        assert gradient_rc is not None
        gradient_rc = gradient_rc.clone()
        assert backend.distill_sigmoid(given, sums, None) is None  # merged twice
        parts = (gradient_rc, sums.loss_r, sums.prob_r, sums.row_max_r, sums.col_max_c)
        results.append([part.double() for part in parts])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * cols**0.5)


def test_a_small_loss_keeps_its_relative_accuracy(sweep: CpuTiles) -> None:
    """Both terms of ``softplus(z) - q z`` are tiny where z is far below 0 and the teacher agrees."""
    z_c = torch.linspace(-80, -1, 80)[:, None]
    for j in range(80):
        side = torch.ones(1, 1), z_c[j : j + 1], Tile(_map(1.0), 7)
        student = StudentTile(*side, [TeacherTile(*side, 0.5)])
        sums = SigmoidSums(torch.zeros(1), torch.zeros(1), torch.full((1,), -torch.inf), torch.full((1,), -torch.inf))
        sweep.distill_sigmoid(student, sums, None)
        z = z_c[j].double()
        torch.testing.assert_close(sums.loss_r.double(), torch.log1p(z.exp()) - z * z.sigmoid() / 2, rtol=1e-5, atol=0)
        torch.testing.assert_close(sums.prob_r.double(), z.sigmoid() / 2, rtol=1e-5, atol=0)


def test_bits_do_not_depend_on_threads(sweep: CpuTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    student = _student(300, 1100, 2, 0)
    dots_Krc = sweep.all_dots(student).clone()
    # The product's own bits may depend on threads.
    monkeypatch.setattr(sweep, "all_dots", lambda *_: dots_Krc.clone())
    weights = [_weights(side) for side in _statistics(REFERENCE, _double(student), None)]
    outcomes = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parts = []
            for side in _statistics(sweep, student, None):
                parts += [side.student.max_n, side.student.sum_n]
                parts += [part for each in side.teachers for part in (each.max_n, each.sum_n, each.cross_n)]
            sums = SigmoidSums(
                torch.zeros(300), torch.zeros(300), torch.full((300,), -torch.inf), torch.full((1100,), -torch.inf)
            )
            gradient_rc = sweep.distill_sigmoid(student, sums, torch.ones(300))
            assert gradient_rc is not None
            parts += [sums.loss_r, sums.prob_r, sums.row_max_r, sums.col_max_c, gradient_rc.flatten()]
            parts.append(_gradient(sweep, student, weights, None).flatten())
            outcomes.append(torch.cat(parts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])
