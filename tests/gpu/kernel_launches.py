"""Launches every kernel, and compares nothing: a program for compute-sanitizer and ncu to look at.

python -m tests.gpu.kernel_launches            # odd tiles, all elements
python -m tests.gpu.kernel_launches --large library   # full tiles of bfloat16, of this tile shape
python -m tests.gpu.kernel_launches --overrun  # a kernel that writes past its output: the sanitizer must find it
"""

import sys

import torch

from tests.gpu.steps.kernel_tiles import ELEMENTS, Case, DistillationCase, answers
from tests.gpu.tile_shapes import TILE_SHAPES, tile_shape
from threetowers.kernels.backends import backend_for
from threetowers.kernels.tiles.statistics import OnlineLogSumExp

CASES = [
    Case(1, 1, 8),
    Case(129, 127, 72, labels=True),
    Case(257, 9, 20),
    Case(300, 257, 512, labels=True),
    DistillationCase(Case(129, 127, 72, labels=True), (40,)),
    DistillationCase(Case(257, 9, 20), (8, 36)),
]
LARGE = Case(4096, 4096, 768), DistillationCase(Case(4096, 4096, 768), (512,))


def launch_all(device: torch.device) -> None:
    """Run every method of every back end."""
    for shape in TILE_SHAPES:
        for element in ELEMENTS:
            for case in CASES:
                launch(device, shape, element, case)


def launch(device: torch.device, shape: str, element: torch.dtype, case: Case | DistillationCase) -> None:
    """Run every method of the back end that serves these features."""
    with torch.device(device), tile_shape(shape):
        backend = backend_for(torch.empty(1, 8, dtype=element))
        answers(backend, case, element)
    print(f"ran {type(backend).__name__} {shape} {element} {case}", flush=True)


def overrun(device: torch.device) -> None:
    """Merge statistics of 256 rows into memory of 192, whose end is the end of its allocation."""
    from threetowers.kernels.cuda.merging import merge_parts

    x_rD = torch.ones(1, 8, device=device, dtype=torch.bfloat16)
    short = OnlineLogSumExp.empty(192, x_rD, torch.float32)
    merge_parts(backend_for(x_rD)._launcher, torch.zeros(1, 256, 2, device=device), short)
    torch.cuda.synchronize()


if __name__ == "__main__":
    gpu = torch.device("cuda", 0)
    match sys.argv[1:]:
        case ["--overrun"]:
            overrun(gpu)
        case ["--large", shape]:
            for large in LARGE:
                launch(gpu, shape, ELEMENTS[0], large)
        case _:
            launch_all(gpu)
    torch.cuda.synchronize()
