"""The kernels of distillation, run thread by thread on the CPU, against float64."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from distillation_under_test import Answers, DistillationCase, answers, check
from emulator import HOPPER, SMALL, Emulator, Schedule
from tiles_under_test import Case, emulated
from torch import Tensor

from threetowers.kernels import Teacher, distillation_loss, reference_distillation_loss
from threetowers.kernels.cuda.block_shape import LIBRARY, NARROW, WIDE
from threetowers.kernels.tiles.torch_tiles import TorchTiles

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


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
def test_the_public_loss_on_emulated_kernels(
    kind: str, element: torch.dtype, builds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two teachers of other widths than the student, repeated samples, some of the target on the samples' own pairs."""
    backend = functools.partial(emulated, Emulator(builds), element)
    monkeypatch.setattr("threetowers.kernels.operator.operators.backend_for", lambda x_bD: backend())
    batch, ids = 150, torch.arange(150) % 149
    features = [Case(batch, batch, width).features(element) for width in (36, 20, 60)]
    for logit_cache_bytes in (0, 2**30):
        results = []
        for loss_of, dtype in ((distillation_loss, element), (reference_distillation_loss, torch.float64)):
            scalars = torch.promote_types(dtype, torch.float32)
            (x_bD, y_bD), *taught = ([z.to(dtype, copy=True) for z in sides] for sides in features)
            leaves = [x_bD.requires_grad_(), y_bD.requires_grad_(), torch.tensor([2.5], dtype=scalars).requires_grad_()]
            biases = [torch.tensor([bias], dtype=scalars) if kind == "sigmoid" else None for bias in (-4.0, -3.0, -6.0)]
            teachers = [
                Teacher(*sides, torch.tensor([log_scale], dtype=scalars), bias, weight)
                for sides, log_scale, bias, weight in zip(taught, (3.0, 2.0), biases[1:], (1.0, 3.0), strict=True)
            ]
            options = {"logit_cache_bytes": logit_cache_bytes} if loss_of is distillation_loss else {}
            loss: Tensor = loss_of(
                *leaves, teachers, bias=biases[0], hard_weight=0.25, kind=kind, group_ids=ids, **options
            )
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        for got, expected in zip(*results, strict=True):
            error = (got.double() - expected).norm() / expected.norm()
            assert error <= {torch.float32: 2e-5}.get(element, 4e-3), error
