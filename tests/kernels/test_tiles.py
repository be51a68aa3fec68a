"""Every instruction set's sweep against the torch back end in float64, tile by tile."""

import logging
from pathlib import Path

import pytest
import torch

from threetowers.kernels.backends import backend_for
from threetowers.kernels.cpu import CpuTiles, library, sweep_library
from threetowers.kernels.cpu.cpu_tiles import best_isa
from threetowers.kernels.tiles.statistics import OnlineLogSumExp, SigmoidSums, SoftmaxWeights
from threetowers.kernels.tiles.tile_backend import LOG2E, LogitMap, Tile
from threetowers.kernels.tiles.torch_tiles import TorchTiles

SHAPES = [(1, 1), (3, 17), (33, 15), (70, 1029), (129, 64)]


def _map(scale: float, bias: float = 0.0, dtype: torch.dtype = torch.float32) -> LogitMap:
    return LogitMap.of(torch.tensor([scale, bias], dtype=torch.float64), dtype)


def _tile(rows: int, cols: int, diagonal: int, excluded: str, bias: float = 0.0) -> Tile:
    g = torch.Generator().manual_seed(rows)
    labels = [torch.randint(0, 5, (n,), generator=g, dtype=torch.int32) for n in (rows, cols)]
    limits = [torch.randn(n, generator=g) + 2 for n in (rows, cols)]
    limits[0][::3] = torch.inf
    parts = [*(labels if "labels" in excluded else [None] * 2), *(limits if "limits" in excluded else [])]
    return Tile(_map(2.0, bias), diagonal, *parts)


def _features(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(cols)
    return torch.randn(rows, 6, generator=g), torch.randn(cols, 6, generator=g)


@pytest.mark.parametrize("excluded", ["", "labels", "limits", "labels and limits"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_softmax_sweeps(sweep: CpuTiles, rows: int, cols: int, excluded: str) -> None:
    reference = TorchTiles(torch.float64)
    x_rD, y_cD = _features(rows, cols)
    for diagonal in (-rows - 3, -1, 0, 2, cols + 5):
        tile = _tile(rows, cols, diagonal, excluded)
        found = [OnlineLogSumExp.empty(n, x_rD, torch.float32) for n in (rows, cols)]
        truth = [OnlineLogSumExp.empty(n, x_rD, torch.float64) for n in (rows, cols)]
        cache_rc = torch.empty(rows, cols)
        for scale in (1.0, 0.5):  # the second call must merge into what the first left
            sweep.stats(scale * x_rD, y_cD, tile, *found, cache_rc if scale == 0.5 else None)
            reference.stats(scale * x_rD.double(), y_cD.double(), tile, *truth, None)
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(
                a.max_n.double() + a.sum_n.double().log2(), b.max_n + b.sum_n.log2(), rtol=1e-5, atol=1e-5
            )
        weights = [SoftmaxWeights(torch.where(b.max_n.isinf(), 0, b.max_n), 1 / (b.sum_n + 1)) for b in truth]
        single = [SoftmaxWeights(w.shift_n.float(), w.factor_n.float()) for w in weights]
        cache_before = cache_rc.clone()
        want = reference.softmax_grad(0.5 * x_rD.double(), y_cD.double(), tile, *weights, None)
        for cached_rc in (None, cache_rc):
            grad_rc = sweep.softmax_grad(0.5 * x_rD, y_cD, tile, *single, cached_rc)
            torch.testing.assert_close(grad_rc.double(), want, rtol=1e-4, atol=1e-7)
        assert torch.equal(cache_rc, cache_before)


@pytest.mark.parametrize("apart", [0, 50, 63, 65, 300])
def test_maxima_near_and_far_apart(sweep: CpuTiles, apart: int) -> None:
    """One power serves a row and a column up to a distance of their maxima, two beyond: both are as exact."""
    base_2 = LogitMap(torch.tensor([1 / LOG2E, 0.0]), torch.tensor([1.0, 0.0]))  # dots are base-2 logits, exactly
    t_r = (torch.linspace(0, apart, 70) * 4).round()[torch.arange(70) * 27 % 70] / 4  # all distances within few rows
    x_rD = torch.stack([t_r, torch.ones(70)], 1)
    y_cD = torch.stack([torch.ones(1029), -(torch.arange(1029) * 7 % 40) / 4], 1)
    t_rc = (x_rD.double() @ y_cD.double().T).fill_diagonal_(-torch.inf)
    found = [OnlineLogSumExp.empty(n, x_rD, torch.float32) for n in (70, 1029)]
    sweep.stats(x_rD, y_cD, Tile(base_2, 0), *found, None)
    truth = [OnlineLogSumExp(t_rc.amax(dim), torch.exp2(t_rc - t_rc.amax(dim, True)).sum(dim)) for dim in (1, 0)]
    for a, b in zip(found, truth, strict=True):
        assert torch.equal(a.max_n.double(), b.max_n)
        torch.testing.assert_close(a.sum_n.double(), b.sum_n, rtol=2e-6, atol=0)

    rows, cols = (SoftmaxWeights(b.max_n, (1 / (b.sum_n + 1))) for b in truth)
    single = [SoftmaxWeights(w.shift_n.float(), w.factor_n.float()) for w in (rows, cols)]
    grad_rc = sweep.softmax_grad(x_rD, y_cD, Tile(base_2, 0), *single, None)
    by_row_rc = torch.exp2(t_rc - rows.shift_n[:, None]) * rows.factor_n[:, None]
    by_col_rc = torch.exp2(t_rc - cols.shift_n) * cols.factor_n
    torch.testing.assert_close(grad_rc.double(), by_row_rc + by_col_rc, rtol=2e-6, atol=1e-36)


@pytest.mark.parametrize("apart", [0, 1000])
def test_powers_below_the_smallest_number_fade_to_zero(sweep: CpuTiles, apart: int) -> None:
    base_2 = LogitMap(torch.tensor([1 / LOG2E, 0.0]), torch.tensor([1.0, 0.0]))
    t_c = torch.arange(-160, 0.25, 0.25)
    rows = SoftmaxWeights(torch.zeros(1), torch.ones(1))
    cols = SoftmaxWeights(torch.full_like(t_c, apart), torch.zeros_like(t_c))  # apart: no base is common
    power_c = sweep.softmax_grad(torch.ones(1, 1), t_c[:, None], Tile(base_2, 10**6), rows, cols, None)[0].double()
    truth_c = torch.exp2(t_c.double())
    torch.testing.assert_close(power_c[t_c >= -126], truth_c[t_c >= -126], rtol=3e-7, atol=0)
    between = (t_c > -127) & (t_c < -126)
    assert (power_c[between] <= truth_c[between]).all()
    assert (power_c[between].diff() >= 0).all()
    assert (power_c[t_c <= -127] == 0).all()


@pytest.mark.parametrize("excluded", ["", "labels", "limits", "labels and limits"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_sigmoid_sweep(sweep: CpuTiles, rows: int, cols: int, excluded: str) -> None:
    x_rD, y_cD = _features(rows, cols)
    tile = _tile(rows, cols, 1, excluded, bias=-3.0)
    results = []
    for backend, dtype in ((sweep, torch.float32), (TorchTiles(torch.float64), torch.float64)):
        sums = SigmoidSums(
            loss_r=torch.ones(rows, dtype=dtype),
            prob_r=torch.ones(rows, dtype=dtype),
            row_max_r=torch.full((rows,), -torch.inf, dtype=dtype),
            col_max_c=torch.full((cols,), -torch.inf, dtype=dtype),
        )
        weights_r = torch.linspace(0.5, 1, rows, dtype=dtype)
        grad_rc = backend.sigmoid(x_rD.to(dtype), y_cD.to(dtype), tile, sums, weights_r)
        assert grad_rc is not None
        grad_rc = grad_rc.clone()  # it lies in the scratch buffer, which the next call fills
        assert backend.sigmoid(x_rD.to(dtype), y_cD.to(dtype), tile, sums, None) is None  # merged twice
        parts = (grad_rc, sums.loss_r, sums.prob_r, sums.row_max_r, sums.col_max_c)
        results.append([part.double() for part in parts])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_small_probabilities_keep_their_relative_accuracy(sweep: CpuTiles) -> None:
    """Softplus and sigmoid of very negative logits are tiny, not 0.

    An exponent near 80 is rounded by up to 80 times 2^-24, and its power is off by as large a part of itself.
    """
    x_rD, y_cD = torch.ones(1, 1), torch.linspace(-80, -1, 80)[:, None]
    for j in range(80):
        sums = SigmoidSums(torch.zeros(1), torch.zeros(1), torch.full((1,), -torch.inf), torch.full((1,), -torch.inf))
        sweep.sigmoid(x_rD, y_cD[j : j + 1], Tile(_map(1.0), 7), sums, None)
        z = y_cD[j].double()
        torch.testing.assert_close(sums.loss_r.double(), torch.log1p(z.exp()), rtol=1e-5, atol=0)
        torch.testing.assert_close(sums.prob_r.double(), z.sigmoid(), rtol=1e-5, atol=0)


def test_bits_do_not_depend_on_threads(sweep: CpuTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    x_rD, y_cD = _features(300, 2100)
    dot_rc = x_rD @ y_cD.T
    outcomes = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows, cols = (OnlineLogSumExp.empty(n, x_rD, torch.float32) for n in (300, 2100))
            monkeypatch.setattr(sweep, "dots", lambda *_: dot_rc.clone())  # the product's bits may depend on threads
            sweep.stats(x_rD, y_cD, Tile(_map(1.0), 0), rows, cols, None)
            outcomes.append(torch.cat([rows.max_n, rows.sum_n, cols.max_n, cols.sum_n]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize(("capability", "expected"), [("DEFAULT", 0), ("AVX2", 1), ("AVX512", 2), ("another", 2)])
def test_the_sweep_uses_no_more_than_torch(monkeypatch: pytest.MonkeyPatch, capability: str, expected: int) -> None:
    library = sweep_library()
    if library is None:
        pytest.skip("not built here")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert best_isa(library) == min(expected, library.threetowers_sweep_isa())


def test_choice_of_the_back_end() -> None:
    assert isinstance(backend_for(torch.zeros(1, 1, dtype=torch.float64)), TorchTiles)
    expected = TorchTiles if sweep_library() is None else CpuTiles
    assert isinstance(backend_for(torch.zeros(1, 1, dtype=torch.bfloat16)), expected)


def test_without_a_library_torch_takes_over_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sweep.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    sweep_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert isinstance(backend_for(torch.zeros(1, 1)), TorchTiles)
            assert isinstance(backend_for(torch.zeros(1, 1)), TorchTiles)
    finally:
        sweep_library.cache_clear()
    assert len(caplog.records) == 1
    assert "sweep.so does not load" in caplog.records[0].message
