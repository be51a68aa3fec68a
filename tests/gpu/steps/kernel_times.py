"""The GPU's time for each kernel and product of a tile, by graph replay; the host's for each call; the card's ceilings.

The kernels' shares say what the loss can reach: its 4 passes are `stats`, `softmax_grad`, `add_rows` and `add_cols`.
"""

from collections.abc import Callable

import torch

from tests.gpu.setting import Setting
from tests.gpu.steps.kernel_tiles import (
    Case,
    DistillationCase,
    empty_sums,
    gradient_call,
    sigmoid_call,
    statistics_call,
    weights_of,
)
from tests.gpu.tile_shapes import TILE_SHAPES, tile_shape
from tests.gpu.timing import gpu_microseconds, host_microseconds
from threetowers.kernels.backends import backend_for
from threetowers.kernels.tiles.statistics import OnlineLogSumExp
from threetowers.kernels.tiles.tile_backend import TileBackend

BIG = 10**9  # a diagonal outside of the tile
TILES = [
    Case(4096, 4096, 768, diagonal=BIG, scale=50.0),
    Case(4096, 2048, 768, diagonal=BIG, scale=50.0),
    Case(2048, 4096, 768, diagonal=BIG, scale=50.0),
    Case(4096, 4096, 512, diagonal=BIG, scale=50.0),
    Case(4096, 4096, 768, diagonal=BIG, scale=50.0, labels=True),
]
DISTILLATION_TILES = [DistillationCase(TILES[0], (768,)), DistillationCase(TILES[0], (768, 1024))]
SMALL = Case(256, 256, 64, diagonal=BIG)  # the GPU is done with it before the host has enqueued the next


def run(setting: Setting) -> None:
    with torch.device(setting.device):
        for name, call in (calls(SMALL) | distillation_calls(DistillationCase(SMALL, (48,)))).items():
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
            for distilled in DISTILLATION_TILES:  # by the same kernels, whatever the shape
                time_distillation(setting, distilled, stream)


def calls(case: Case, backend: TileBackend | None = None) -> dict[str, Callable[[], object]]:
    """Return the parts of a tile's forward and backward pass as calls without arguments."""
    element = torch.bfloat16
    if backend is None:
        backend = backend_for(case.features(element)[0])
    x_rD, y_cD = (backend.features(z_nD) for z_nD in case.features(element))
    rows, cols = (OnlineLogSumExp.empty(n, x_rD, backend.dtype) for n in (case.rows, case.cols))
    dx_rD, dy_cD = (torch.zeros(n, case.width, dtype=backend.dtype) for n in (case.rows, case.cols))
    sums = empty_sums(case, backend.dtype)
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


def distillation_calls(case: DistillationCase) -> dict[str, Callable[[], object]]:
    """Return the parts that distillation has in place of `stats`, `softmax_grad` and `sigmoid`."""
    element = torch.bfloat16
    backend = backend_for(case.student.features(element)[0])
    _, _, add_statistics = statistics_call(backend, case, element)
    gradient = gradient_call(backend, case, element)
    sigmoid = sigmoid_call(backend, case, element, empty_sums(case.student, backend.dtype))
    factors_r = torch.ones(case.student.rows, dtype=backend.dtype)
    return {
        "distill_stats": lambda: add_statistics(None),
        "distill_grad": lambda: gradient(None),
        "distill_sigmoid": lambda: sigmoid(factors_r),
    }


def time_distillation(setting: Setting, case: DistillationCase, stream: torch.cuda.Stream) -> None:
    """Record the rate of each part, whose passes are the student's and each teacher's."""
    student = case.student
    name = f"{student.rows} x {student.cols} x {student.width}, {len(case.widths)} teachers"
    passes = 2 * student.rows * student.cols * (student.width + sum(case.widths))
    for part, call in distillation_calls(case).items():
        microseconds = gpu_microseconds(call, stream)
        print(f"    {microseconds:.1f} us")
        setting.record(f"{part} {name}", passes / microseconds / 1e6, "TFLOP/s")


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
