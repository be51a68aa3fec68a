"""The GPU's time for each kernel and product of a tile, by graph replay; the host's for each call; the card's ceilings.

The kernels' shares say what the loss can reach: its 4 passes are `stats`, `softmax_grad`, `add_rows` and `add_cols`.
"""

from collections.abc import Callable

import torch

from tests.gpu.setting import Setting
from tests.gpu.steps.kernel_tiles import Case, weights_of
from tests.gpu.tile_shapes import TILE_SHAPES, tile_shape
from tests.gpu.timing import gpu_microseconds, host_microseconds
from threetowers.kernels.backends import backend_for
from threetowers.kernels.tiles import OnlineLogSumExp, SigmoidSums, TileBackend

BIG = 10**9  # a diagonal outside of the tile
TILES = [
    Case(4096, 4096, 768, diagonal=BIG, scale=50.0),
    Case(4096, 2048, 768, diagonal=BIG, scale=50.0),
    Case(2048, 4096, 768, diagonal=BIG, scale=50.0),
    Case(4096, 4096, 512, diagonal=BIG, scale=50.0),
    Case(4096, 4096, 768, diagonal=BIG, scale=50.0, labels=True),
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
        # A back end launches on the stream that was current when it was made.
        stream = torch.cuda.Stream(setting.device)
        with torch.cuda.stream(stream):
            ceilings(setting, stream)
            for case in TILES:
                for shape in TILE_SHAPES:
                    with tile_shape(shape):
                        time_tile(setting, case, shape, stream)


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


def time_tile(setting: Setting, case: Case, shape: str, stream: torch.cuda.Stream) -> None:
    """Record each part's rate, and that of all passes together."""
    name = f"{case.rows} x {case.cols} x {case.width}{' groups' * case.labels}, {shape}"
    one_pass = 2 * case.rows * case.cols * case.width
    taken = {}
    for part, call in calls(case).items():
        taken[part] = gpu_microseconds(call, stream)
        print(f"    {taken[part]:.1f} us")
        setting.record(f"{part} {name}", one_pass / taken[part] / 1e6, "TFLOP/s")
    together = sum(taken[part] for part in ("stats", "softmax_grad", "add_rows", "add_cols"))
    setting.record(f"softmax {name}, 4 passes", 4 * one_pass / together / 1e6, "TFLOP/s")
    together = sum(taken[part] for part in ("sigmoid", "add_rows", "add_cols"))
    setting.record(f"sigmoid {name}, 3 passes", 3 * one_pass / together / 1e6, "TFLOP/s")


def ceilings(setting: Setting, stream: torch.cuda.Stream) -> None:
    """Record what the card reaches in products and copies that libraries make."""
    n = 8192
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a_nn, b_nn = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
        us = gpu_microseconds(lambda a_nn=a_nn, b_nn=b_nn: a_nn @ b_nn, stream, inside=1, replays=5)
        setting.record(f"product {n} x {n} x {n} in {name}", 2 * n**3 / us / 1e6, "TFLOP/s")
    source = torch.empty(2**29)
    target = torch.empty_like(source)
    us = gpu_microseconds(lambda: target.copy_(source), stream, inside=1, replays=5)
    setting.record("copy of 2 GB, read and written", 2 * source.nbytes / us / 1e6, "TB/s")
