"""One tile's inputs, and the results of the CUDA back ends, run by the emulator, and of float64."""

import math
from dataclasses import dataclass, replace

import torch
from emulator import Emulator
from torch import Tensor
from torch.nn.functional import normalize

from threetowers.kernels.cuda.cuda_tiles import GAIN, DenseTiles, TensorCoreTiles, tensor_core_tiles
from threetowers.kernels.tiles.statistics import OnlineExpectation, OnlineLogSumExp, SigmoidSums, SoftmaxWeights
from threetowers.kernels.tiles.tile_backend import LogitMap, Tile, TileBackend
from threetowers.kernels.tiles.torch_tiles import TorchTiles

LogSums = OnlineLogSumExp | OnlineExpectation
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}


def emulated(emulator: Emulator, element: torch.dtype, tiles: str | None = None) -> TileBackend:
    """Return the back end that `cuda_backend` would choose, on the emulator.

    Its library GEMMs run in float32: torch has no 16-bit product with that result on the CPU.
    """
    if element == torch.float32:
        return DenseTiles(emulator)
    backend = tensor_core_tiles(emulator, element, tiles)

    def add_product(sum_nD: Tensor, grad_nk: Tensor, z_kD: Tensor) -> None:
        sum_nD.addmm_(grad_nk.float(), z_kD.float(), alpha=1 / GAIN[element])

    def multiply(x_rD: Tensor, y_cD: Tensor, out_rc: Tensor) -> None:
        torch.mm(x_rD.float(), y_cD.float().T, out=out_rc)

    vars(backend).update(_add_product=add_product, _multiply=multiply)
    return backend


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one tile."""

    rows: int
    cols: int
    width: int
    diagonal: int = 0
    scale: float = 20.0
    labels: bool = False
    limits: bool = False

    def features(self, element: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(torch.get_default_device()).manual_seed(self.rows + 1000 * self.cols + self.width)
        x_rD = normalize(torch.randn(self.rows, self.width, generator=generator), dim=1)
        y_cD = normalize(torch.randn(self.cols, self.width, generator=generator), dim=1)
        return x_rD.to(element), y_cD.to(element)

    def tile(self, dtype: torch.dtype, bias: float = 0.0) -> Tile:
        scale_and_bias = torch.tensor([self.scale, bias], dtype=torch.float64)
        logit_map = LogitMap.of(scale_and_bias, dtype)
        tile = Tile(logit_map, self.diagonal)
        if self.labels:
            row_labels_r = torch.arange(self.rows, dtype=torch.int32) % 7
            col_labels_c = torch.arange(self.cols, dtype=torch.int32) % 11
            tile = replace(tile, row_labels_r=row_labels_r, col_labels_c=col_labels_c)
        if self.limits:
            # Between neighbouring dots of bf16 features that are far enough apart for rounding to move none over it
            x_rD, y_cD = (z.double() for z in self.features(torch.bfloat16))
            dots_n = (x_rD @ y_cD.T).flatten().sort().values
            wide_n = torch.nonzero(dots_n.diff() > 1e-5).flatten()
            middle_n = (dots_n[wide_n] + dots_n[wide_n + 1]) / 2
            limits = []
            for n in (self.rows, self.cols):
                limit_n = middle_n[torch.arange(n) * 7919 % len(middle_n)].to(dtype)
                limits.append(limit_n.masked_fill(torch.arange(n) % 2 == 1, torch.inf))
            tile = replace(tile, row_limits_r=limits[0], col_limits_c=limits[1])
        return tile


@dataclass(frozen=True)
class Answers:
    """Everything that a back end computes of one tile."""

    rows: OnlineLogSumExp
    cols: OnlineLogSumExp
    cached_rc: Tensor
    grad_rc: Tensor
    grad_from_cached_rc: Tensor
    sums: SigmoidSums
    sigmoid_grad_rc: Tensor
    dx_rD: Tensor
    dy_cD: Tensor

    def bits(self) -> bytes:
        """Return all numbers of the tile, to be compared bit by bit."""
        tensors = (self.cached_rc, self.grad_rc, self.grad_from_cached_rc, self.sigmoid_grad_rc, self.dx_rD, self.dy_cD)
        sums = (self.sums.loss_r, self.sums.prob_r, self.sums.row_max_r, self.sums.col_max_c)
        running = (self.rows.max_n, self.rows.sum_n, self.cols.max_n, self.cols.sum_n)
        return bits_of(*tensors, *sums, *running)


def gain_of(backend: TileBackend, element: torch.dtype) -> float:
    """Return what the back end's gradient tiles are multiplied by."""
    return GAIN[element] if isinstance(backend, TensorCoreTiles) else 1.0


def bits_of(*tensors: Tensor) -> bytes:
    """Return all numbers, to be compared bit by bit."""
    return b"".join(part.contiguous().view(torch.uint8).cpu().numpy().tobytes() for part in tensors)


def weights_of(case: Case, element: torch.dtype) -> tuple[SoftmaxWeights, SoftmaxWeights]:
    """Return softmax weights as the loss would compute them, in float64: from the true statistics, varied in size."""
    rows, cols = _empty(case, torch.float64)
    reference, (x_rD, y_cD) = TorchTiles(torch.float64), case.features(element)
    reference.stats(x_rD.double(), y_cD.double(), case.tile(torch.float64), rows, cols, None)
    return varied_weights(rows.max_n, rows.sum_n), varied_weights(cols.max_n, cols.sum_n)


def varied_weights(max_n: Tensor, sum_n: Tensor, share: float = 1.0) -> SoftmaxWeights:
    """Return the weights of softmaxes with these statistics, varied in size."""
    shift_n = torch.where(max_n == -torch.inf, 0, max_n)
    varied_n = torch.linspace(0.2, 1, len(shift_n), dtype=torch.float64)
    return SoftmaxWeights(shift_n, 0.5 * share * varied_n / (sum_n + 0.1))


def rounded(weights: SoftmaxWeights, dtype: torch.dtype) -> SoftmaxWeights:
    """Return the weights as a back end takes them."""
    return SoftmaxWeights(weights.shift_n.to(dtype), weights.factor_n.to(dtype))


def answers(backend: TileBackend, case: Case, element: torch.dtype) -> Answers:
    """Run all methods of a back end. Outputs of kernels are filled with NaN before."""
    dtype, (x_rD, y_cD) = backend.dtype, (backend.features(z) for z in case.features(element))
    rows, cols = _empty(case, dtype)
    cached_rc = torch.full((case.rows, case.cols), math.nan, dtype=backend.cache_dtype)
    for _ in range(2):  # merged twice: sums double, maxima stay
        backend.stats(x_rD, y_cD, case.tile(dtype), rows, cols, cached_rc)
    gain = gain_of(backend, element)

    row_weights, col_weights = (rounded(weights, dtype) for weights in weights_of(case, element))
    tile, sigmoid_tile = case.tile(dtype), case.tile(dtype, bias=-3.0)
    grads = []
    for cached in (cached_rc, None):
        grad_rc = backend.softmax_grad(x_rD, y_cD, tile, row_weights, col_weights, cached)
        grads.append(grad_rc.to(dtype) / gain)
    dx_rD, dy_cD = (torch.ones(n, case.width, dtype=dtype) for n in (case.rows, case.cols))
    backend.add_rows(dx_rD, grad_rc, y_cD)
    backend.add_cols(dy_cD, grad_rc, x_rD)

    sums = empty_sums(case, dtype)
    row_factor_r = torch.linspace(0.5, 1, case.rows, dtype=dtype)
    sigmoid_grad_rc = backend.sigmoid(x_rD, y_cD, sigmoid_tile, sums, row_factor_r)
    assert sigmoid_grad_rc is not None
    sigmoid_grad_rc = sigmoid_grad_rc.to(dtype) / gain
    backend.sigmoid(x_rD, y_cD, sigmoid_tile, sums, None)
    return Answers(rows, cols, cached_rc, grads[1], grads[0], sums, sigmoid_grad_rc, dx_rD, dy_cD)


def check(got: Answers, reference: Answers, case: Case, element: torch.dtype) -> None:
    """Raise AssertionError unless the answers agree, each within what its arithmetic allows."""
    logit = logit_error(case.scale)
    rounding = ROUNDING[element] + logit
    check_cached(got.cached_rc, reference.cached_rc, case)
    for name in ("rows", "cols"):
        check_log_sums(getattr(got, name), getattr(reference, name), name, logit)
    for name in ("grad_rc", "grad_from_cached_rc", "sigmoid_grad_rc"):
        close(getattr(got, name), getattr(reference, name), name, relative=rounding, absolute=1e-8)
    for name in ("loss_r", "prob_r"):
        close(getattr(got.sums, name), getattr(reference.sums, name), name, relative=logit, absolute=1e-12)
    for name in ("row_max_r", "col_max_c"):
        close(getattr(got.sums, name), getattr(reference.sums, name), name, absolute=logit)
    for name in ("dx_rD", "dy_cD"):
        close(getattr(got, name), getattr(reference, name), name, absolute=4 * rounding)


def logit_error(scale: float) -> float:
    """Return what fp32 dots of unit vectors err, and logits as large as the scale."""
    return 1e-5 + 5e-7 * scale


def check_cached(got_rc: Tensor, reference_rc: Tensor, case: Case) -> None:
    """Raise AssertionError unless the dots agree; a back end may note with -inf what it excludes."""
    index_r, index_c = torch.arange(case.rows)[:, None], torch.arange(case.cols)
    excluded_rc = index_c - index_r == case.diagonal
    if case.labels:
        tile = case.tile(torch.float32)
        excluded_rc |= tile.row_labels_r[:, None] == tile.col_labels_c
    if case.limits:
        tile = case.tile(torch.float64)
        excluded_rc |= reference_rc > torch.minimum(tile.row_limits_r[:, None], tile.col_limits_c)
    unused_rc = excluded_rc & (got_rc == -math.inf)
    close(torch.where(unused_rc, reference_rc, got_rc), reference_rc, "cached dots", absolute=1e-6)


def check_log_sums(got: LogSums, reference: LogSums, name: str, absolute: float) -> None:
    """Raise AssertionError unless maxima and log-sum-exps agree."""
    close(_log_sum(got), _log_sum(reference), f"log-sum-exps of {name}", absolute=absolute)
    close(got.max_n, reference.max_n, f"maxima of {name}", absolute=absolute)


def close(got: Tensor, expected: Tensor, name: str, relative: float = 0.0, absolute: float = 0.0) -> None:
    """Do torch.testing.assert_close with a name; infinities must agree, and NaN is never close."""
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=relative, atol=absolute, msg=lambda text: f"{name}: {text}"
    )


def _log_sum(running: LogSums) -> Tensor:
    return running.max_n.double() + torch.log2(running.sum_n.double())


def _empty(case: Case, dtype: torch.dtype) -> tuple[OnlineLogSumExp, OnlineLogSumExp]:
    like = torch.empty(0)
    return OnlineLogSumExp.empty(case.rows, like, dtype), OnlineLogSumExp.empty(case.cols, like, dtype)


def empty_sums(case: Case, dtype: torch.dtype) -> SigmoidSums:
    """Return sums of the sigmoid loss that have met nothing yet."""
    low_r, low_c = (torch.full((n,), -math.inf, dtype=dtype) for n in (case.rows, case.cols))
    return SigmoidSums(torch.zeros(case.rows, dtype=dtype), torch.zeros(case.rows, dtype=dtype), low_r, low_c)
