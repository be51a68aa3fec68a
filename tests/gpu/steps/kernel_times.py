"""The GPU's time for each kernel and product of a tile, by graph replay; the host's for each call; the card's ceilings.

The kernels' shares say what the loss can reach: its 4 passes are `stats`, `softmax_grad`, `add_rows` and `add_cols`.
"""

from collections.abc import Callable

import torch

from tests.gpu.setting import Setting
from tests.gpu.steps.kernel_tiles import Case, weights_of
from tests.gpu.timing import gpu_microseconds, host_microseconds
from threetowers.kernels.backends import backend_for
from threetowers.kernels.tiles import OnlineLogSumExp, SigmoidSums, TileBackend

BIG = 10**9  # a diagonal outside of the tile
TILES = [
    Case(4096, 4096, 768, diagonal=BIG, scale=50.0),
    Case(4096, 4096, 512, diagonal=BIG, scale=50.0),
    Case(4096, 4096, 1024, diagonal=BIG, scale=50.0),
    Case(4096, 4096, 768, diagonal=BIG, scale=50.0, labels=True),
    Case(2048, 2048, 768, diagonal=BIG, scale=50.0),
    Case(4096, 2048, 768, diagonal=BIG, scale=50.0),
    Case(2048, 8192, 768, diagonal=BIG, scale=50.0),
]
SMALL = Case(256, 256, 64, diagonal=BIG)  # the GPU is done with it before the host has enqueued the next


def run(setting: Setting) -> None:
    with torch.device(setting.device):
        for name, call in calls(SMALL).items():
            setting.record(
                f"host, a call of {name}",
                host_microseconds(call, setting.device, 20 if setting.rehearse else 200),
                "us",
            )
        if not setting.gpu_only("times of kernels by graph replay"):
            return
        ceilings(setting)
        for case in TILES:
            time_tile(setting, case)


def calls(case: Case, backend: TileBackend | None = None) -> dict[str, Callable[[], object]]:
    """Return the parts of a tile's forward and backward pass as calls without arguments."""
    element = torch.bfloat16
    if backend is None:
        backend = backend_for(case.features(element)[0])
    x_rD, y_cD = (backend.features(z_nD) for z_nD in case.features(element))
    rows, cols = (OnlineLogSumExp.empty(n, x_rD, backend.dtype) for n in (case.rows, case.cols))
    dx_rD, dy_cD = (torch.zeros(n, case.width, dtype=backend.dtype) for n in (case.rows, case.cols))
    low_r, low_c = (torch.full((n,), -torch.inf, dtype=backend.dtype) for n in (case.rows, case.cols))
    sums = SigmoidSums(torch.zeros(case.rows), torch.zeros(case.rows), low_r, low_c)
    factors_r = torch.ones(case.rows, dtype=backend.dtype)
    row_weights, col_weights = (
        type(weights)(weights.shift_n.to(backend.dtype), weights.factor_n.to(backend.dtype))
        for weights in weights_of(case, element)
    )
    tile, sigmoid_tile = case.tile(backend.dtype), case.tile(backend.dtype, bias=-10.0)
    grad_rc = backend.softmax_grad(x_rD, y_cD, tile, row_weights, col_weights, None)
    return {
        "stats": lambda: backend.stats(x_rD, y_cD, tile, rows, cols, None),
        "softmax_grad": lambda: backend.softmax_grad(x_rD, y_cD, tile, row_weights, col_weights, None),
        "sigmoid": lambda: backend.sigmoid(x_rD, y_cD, sigmoid_tile, sums, factors_r),
        "add_rows": lambda: backend.add_rows(dx_rD, grad_rc, y_cD),
        "add_cols": lambda: backend.add_cols(dy_cD, grad_rc, x_rD),
    }


def time_tile(setting: Setting, case: Case) -> None:
    """Record each part's time, and the rate of all four passes together."""
    shape = f"{case.rows} x {case.cols} x {case.width}{' groups' * case.labels}"
    one_pass = 2 * case.rows * case.cols * case.width
    taken = {}
    for name, call in calls(case).items():
        taken[name] = gpu_microseconds(call)
        setting.record(f"{name} {shape}", taken[name], "us")
        print(f"    {one_pass / taken[name] / 1e6:.0f} TFLOP/s")
    together = sum(taken[name] for name in ("stats", "softmax_grad", "add_rows", "add_cols"))
    setting.record(f"softmax tile {shape}, 4 passes", 4 * one_pass / together / 1e6, "TFLOP/s")
    together = sum(taken[name] for name in ("sigmoid", "add_rows", "add_cols"))
    setting.record(f"sigmoid tile {shape}, 3 passes", 3 * one_pass / together / 1e6, "TFLOP/s")


def ceilings(setting: Setting) -> None:
    """Record what the card reaches in products and copies that libraries make."""
    n = 8192
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a_nn, b_nn = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
        us = gpu_microseconds(lambda a_nn=a_nn, b_nn=b_nn: a_nn @ b_nn, inside=1, replays=5)
        setting.record(f"product {n} x {n} x {n} in {name}", 2 * n**3 / us / 1e6, "TFLOP/s")
    source = torch.empty(2**29)
    target = torch.empty_like(source)
    us = gpu_microseconds(lambda: target.copy_(source), inside=1, replays=5)
    setting.record("copy of 2 GB, read and written", 2 * source.nbytes / us / 1e6, "TB/s")
