"""The kernels of distillation, run thread by thread on the CPU, against float64."""

import itertools
from pathlib import Path

import pytest
import torch
from distillation_under_test import Answers, DistillationCase, answers, check
from emulator import HOPPER, SMALL, Emulator, Schedule
from tiles_under_test import Case, emulated

from threetowers.kernels.cuda.block_shape import LIBRARY, NARROW, WIDE
from threetowers.kernels.tiles import TorchTiles

ELEMENTS = [torch.bfloat16, torch.float16, torch.float32]
RACES = Schedule(False, False, True, 0)
ADVERSARIES = [Schedule(greedy, early, False, 1) for greedy, early in itertools.product([False, True], [False, True])]

CASES = [
    DistillationCase(Case(1, 1, 8), (12,)),
    DistillationCase(Case(1, 5, 8, diagonal=3), (24, 16)),
    DistillationCase(Case(5, 1, 40, diagonal=-4, labels=True), (8,)),
    DistillationCase(Case(64, 64, 32), (20, 7, 48)),
    DistillationCase(Case(65, 130, 72, diagonal=1, scale=100.0, labels=True), (36,)),
    DistillationCase(Case(130, 66, 24, diagonal=-70, scale=1000.0, labels=True), (9, 40)),
    DistillationCase(Case(3, 300, 96, diagonal=10**12, scale=1.0), (32,)),
]


def name_of(value: object) -> str:
    if isinstance(value, DistillationCase):
        return f"{value.student.rows}x{value.student.cols}-{len(value.widths)}"
    return str(value).removeprefix("torch.")


def reference_of(case: DistillationCase, element: torch.dtype) -> Answers:
    return answers(TorchTiles(torch.float64), case, element)


@pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tiles_equal_float64_without_illegal_accesses(
    case: DistillationCase, element: torch.dtype, builds: Path
) -> None:
    got = answers(emulated(Emulator(builds, SMALL, RACES), element, NARROW), case, element)
    check(got, reference_of(case, element), case, element)


@pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
def test_all_schedules_give_the_same_bits(element: torch.dtype, builds: Path) -> None:
    case = CASES[4]
    first = answers(emulated(Emulator(builds, SMALL, RACES), element), case, element)
    for schedule in ADVERSARIES:
        again = answers(emulated(Emulator(builds, SMALL, schedule), element), case, element)
        assert again.bits() == first.bits(), f"{schedule!r} changes the result"


def test_all_kinds_of_tiles_give_the_same_bits(builds: Path) -> None:
    """Distillation reads a library's dots in all of them."""
    case, element = CASES[1], torch.bfloat16
    first, *others = (
        answers(emulated(Emulator(builds, HOPPER, RACES), element, tiles), case, element).bits()
        for tiles in (NARROW, WIDE, LIBRARY)
    )
    assert others == [first, first]
