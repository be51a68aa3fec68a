"""Every kernel of every back end on odd tiles: against float64 on the same device, and twice for equal bits."""

import sys
from pathlib import Path
from typing import Any

import torch

from tests.gpu.setting import Setting
from tests.gpu.tile_shapes import TILE_SHAPES, tile_shape
from threetowers.kernels.backends import backend_for
from threetowers.kernels.tiles.tile_backend import TileBackend
from threetowers.kernels.tiles.torch_tiles import TorchTiles

sys.path.insert(0, str(Path(__file__).parents[2] / "emulation"))

import distillation_under_test
import tiles_under_test
from distillation_under_test import DistillationCase, gradient_call, sigmoid_call, statistics_call
from tiles_under_test import Case, empty_sums, weights_of

__all__ = [
    "Case",
    "DistillationCase",
    "answers",
    "empty_sums",
    "gradient_call",
    "run",
    "sigmoid_call",
    "statistics_call",
    "weights_of",
]

ELEMENTS = (torch.bfloat16, torch.float16, torch.float32)
CASES = [
    Case(1, 1, 8),
    Case(5, 1, 40, diagonal=-4, labels=True),
    Case(129, 127, 72, diagonal=1, scale=100.0),
    Case(257, 9, 20, diagonal=-(10**12)),
    Case(1000, 777, 640, diagonal=3, scale=50.0, labels=True),
]
FULL = Case(4096, 4096, 768, scale=100.0)
DISTILLATION_CASES = [
    DistillationCase(Case(5, 1, 40, diagonal=-4, labels=True), (8,)),
    DistillationCase(Case(65, 130, 72, diagonal=1, scale=100.0, labels=True), (36, 9)),
    DistillationCase(Case(1000, 777, 640, diagonal=3, scale=50.0, labels=True), (264, 512)),
]


def run(setting: Setting) -> None:
    cases: list[Case | DistillationCase] = [*CASES[:-1], *DISTILLATION_CASES[:-1]]
    if not setting.rehearse:
        cases += [CASES[-1], DISTILLATION_CASES[-1], FULL]
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


def compare(case: Case | DistillationCase, element: torch.dtype, expected: str | None) -> None:
    """Raise AssertionError where back end and float64 disagree, two runs differ in a bit, or another one took over."""
    student = case.student if isinstance(case, DistillationCase) else case
    backend = backend_for(student.features(element)[0])
    name = type(backend).__name__
    assert expected in (None, name), f"{name} serves {element}: a kernel of {expected} did not compile or load"
    got, reference = answers(backend, case, element), answers(TorchTiles(torch.float64), case, element)
    if isinstance(case, DistillationCase):
        distillation_under_test.check(got, reference, case, element)
    else:
        tiles_under_test.check(got, reference, case, element)
    assert answers(backend, case, element).bits() == got.bits(), f"{case} in {element}: two runs differ"
    print(f"agrees: {name} {element} {case}", flush=True)


def answers(backend: TileBackend, case: Case | DistillationCase, element: torch.dtype) -> Any:
    """Run all methods of a back end: those of the losses without teachers, or those of distillation."""
    module = distillation_under_test if isinstance(case, DistillationCase) else tiles_under_test
    return module.answers(backend, case, element)
