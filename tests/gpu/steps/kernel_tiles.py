"""Every kernel of every back end on odd tiles: against float64 on the same device, and twice for equal bits."""

import sys
from pathlib import Path

import torch

from tests.gpu.setting import Setting
from tests.gpu.tile_shapes import TILE_SHAPES, tile_shape
from threetowers.kernels.backends import backend_for
from threetowers.kernels.tiles import TorchTiles

sys.path.insert(0, str(Path(__file__).parents[2] / "emulation"))

from tiles_under_test import Case, answers, check, weights_of

__all__ = ["Case", "answers", "check", "run", "weights_of"]

ELEMENTS = (torch.bfloat16, torch.float16, torch.float32)
CASES = [
    Case(1, 1, 8),
    Case(5, 1, 40, diagonal=-4, labels=True),
    Case(129, 127, 72, diagonal=1, scale=100.0),
    Case(257, 9, 20, diagonal=-(10**12)),
    Case(1000, 777, 640, diagonal=3, scale=50.0, labels=True),
]
FULL = Case(4096, 4096, 768, scale=100.0)


def run(setting: Setting) -> None:
    cases = CASES[:-1] if setting.rehearse else [*CASES, FULL]
    with torch.device(setting.device):
        for shape, backend in TILE_SHAPES.items():
            if setting.rehearse:
                setting.skip(f"tiles of {shape}", "needs a GPU")
                continue
            with tile_shape(shape):
                for element in (torch.bfloat16, torch.float16):
                    for case in cases:
                        compare(case, element, backend)
        for element in ELEMENTS if setting.rehearse else (torch.float32,):
            for case in cases:
                compare(case, element, None if setting.rehearse else "DenseTiles")


def compare(case: Case, element: torch.dtype, expected: str | None) -> None:
    """Raise AssertionError where back end and float64 disagree, two runs differ in a bit, or another one took over."""
    backend = backend_for(case.features(element)[0])
    name = type(backend).__name__
    assert expected in (None, name), f"{name} serves {element}: a kernel of {expected} did not compile or load"
    got = answers(backend, case, element)
    check(got, answers(TorchTiles(torch.float64), case, element), case, element)
    assert answers(backend, case, element).bits() == got.bits(), f"{case} in {element}: two runs differ"
    print(f"agrees: {name} {element} {case.rows} x {case.cols} x {case.width}", flush=True)
