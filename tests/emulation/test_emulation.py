"""The CUDA kernels, run thread by thread on the CPU, against float64: shapes, schedules, and the whole loss."""

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulator import HOPPER, LARGE, SMALL, Emulator, Schedule
from tiles_under_test import Answers, Case, answers, check, emulated

from threetowers.kernels import contrastive_loss, reference_contrastive_loss
from threetowers.kernels.cuda.block_shape import LIBRARY, NARROW, WIDE
from threetowers.kernels.tiles.torch_tiles import TorchTiles

ELEMENTS = [torch.bfloat16, torch.float16, torch.float32]
RACES = Schedule(False, False, True, 0)
ADVERSARIES = [
    Schedule(greedy, early, False, seed)
    for greedy, early, seed in itertools.product([False, True], [False, True], [1, 2])
]
VARIANTS = [(SMALL, NARROW), (LARGE, NARROW), (HOPPER, WIDE), (SMALL, LIBRARY)]
KINDS = [
    (torch.bfloat16, NARROW),
    (torch.bfloat16, WIDE),
    (torch.bfloat16, LIBRARY),
    (torch.float16, NARROW),
    pytest.param(torch.float16, WIDE, marks=pytest.mark.slow),
    pytest.param(torch.float16, LIBRARY, marks=pytest.mark.slow),
    (torch.float32, NARROW),  # which has one kind of tiles, whatever is asked for
]

CASES = [
    Case(1, 1, 8),
    Case(1, 5, 8, diagonal=3),
    Case(5, 1, 40, diagonal=-4, labels=True),
    Case(70, 130, 96, labels=True),
    Case(128, 128, 32),
    Case(129, 127, 72, diagonal=1, scale=100.0),
    Case(3, 300, 264, diagonal=10**12, scale=1.0),
    Case(257, 9, 20, diagonal=-(10**12)),
    Case(130, 140, 128, diagonal=-70, scale=1000.0, labels=True),
]


def name_of(value: object) -> str:
    if isinstance(value, Case):
        return f"{value.rows}x{value.cols}x{value.width}"
    return str(value).removeprefix("torch.")


def reference_of(case: Case, element: torch.dtype) -> Answers:
    return answers(TorchTiles(torch.float64), case, element)


@pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tiles_equal_float64_without_illegal_accesses(case: Case, element: torch.dtype, builds: Path) -> None:
    """All block shapes and ring sizes; every access is checked for bounds, alignment, ownership and happens-before."""
    reference = reference_of(case, element)
    for limits, tiles in VARIANTS[:1] if element == torch.float32 else VARIANTS:
        check(
            answers(emulated(Emulator(builds, limits, RACES), element, tiles), case, element), reference, case, element
        )


@pytest.mark.parametrize("tiles", [NARROW, WIDE, LIBRARY, "float32"])
@pytest.mark.parametrize("case", [Case(70, 131, 96, 1000, limits=True), Case(9, 140, 24, 2, labels=True, limits=True)])
def test_tiles_with_limits(case: Case, tiles: str, builds: Path) -> None:
    """Dots above the limit of their row or of their column are as if they were not there."""
    element = torch.float32 if tiles == "float32" else torch.bfloat16
    emulator = Emulator(builds, HOPPER if tiles == WIDE else SMALL, RACES)
    reference = reference_of(case, element)
    without = reference_of(replace(case, limits=False), element)
    assert (reference.rows.sum_n < without.rows.sum_n).any()
    check(answers(emulated(emulator, element, tiles), case, element), reference, case, element)


@pytest.mark.parametrize(("element", "tiles"), KINDS, ids=name_of)
def test_all_schedules_give_the_same_bits(element: torch.dtype, tiles: str, builds: Path) -> None:
    """The result depends on no order of threads, of blocks, or of copies."""
    case = Case(130, 140, 104, diagonal=2, labels=True)
    first = answers(emulated(Emulator(builds, SMALL, RACES), element, tiles), case, element)
    check(first, reference_of(case, element), case, element)
    for schedule in ADVERSARIES:
        again = answers(emulated(Emulator(builds, SMALL, schedule), element, tiles), case, element)
        assert again.bits() == first.bits(), f"{schedule!r} changes the result"


@pytest.mark.slow
@pytest.mark.parametrize("element", ELEMENTS, ids=name_of)
def test_many_shapes_under_many_schedules(element: torch.dtype, builds: Path) -> None:
    for rows, cols, width in itertools.product([1, 127, 300], [2, 128, 257], [8, 136, 512]):
        case = Case(rows, cols, width, diagonal=cols - rows, scale=50.0, labels=rows % 2 == 1)
        reference = reference_of(case, element)
        for (limits, tiles), schedule in itertools.product(VARIANTS, [RACES, *ADVERSARIES[::2]]):
            got = answers(emulated(Emulator(builds, limits, schedule), element, tiles), case, element)
            check(got, reference, case, element)


def test_an_overflowing_scale_stays_finite(builds: Path) -> None:
    """At scale 10^5 the logits span 2^±144000: only the running maximum keeps the sums finite."""
    case = Case(66, 70, 16, scale=1e5)
    got = answers(emulated(Emulator(builds), torch.bfloat16), case, torch.bfloat16)
    assert all(torch.isfinite(part).all() for part in (got.rows.max_n, got.rows.sum_n, got.cols.sum_n, got.grad_rc))
    assert (got.rows.sum_n >= 1).all()


def test_a_nan_in_the_features_propagates(builds: Path) -> None:
    backend = emulated(Emulator(builds), torch.bfloat16)
    case = Case(40, 50, 16, diagonal=60)
    x_rD, y_cD = case.features(torch.bfloat16)
    x_rD[7, 3] = torch.nan
    rows, cols = (answers(backend, case, torch.bfloat16).rows, answers(backend, case, torch.bfloat16).cols)
    backend.stats(x_rD, y_cD, case.tile(torch.float32), rows, cols, None)
    assert rows.sum_n[7].isnan()
    assert rows.sum_n.isnan().sum() == 1
    assert cols.sum_n.isnan().all()


def test_the_portable_fibers_give_the_same_bits(builds: Path) -> None:
    """The fibers for processors without a hand-written switch."""
    case, element = Case(40, 130, 24, labels=True), torch.bfloat16
    fast, portable = (answers(emulated(Emulator(builds, portable=p), element), case, element) for p in (False, True))
    assert portable.bits() == fast.bits()


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("logit_cache_bytes", [0, 2**30])
@pytest.mark.parametrize(
    ("element", "tiles"),
    [
        (torch.bfloat16, WIDE),
        pytest.param(torch.bfloat16, LIBRARY, marks=pytest.mark.slow),
        (torch.float16, NARROW),
        (torch.float32, NARROW),
    ],
    ids=name_of,
)
def test_the_public_loss_on_emulated_kernels(
    kind: str,
    confident: bool,
    logit_cache_bytes: int,
    element: torch.dtype,
    tiles: str,
    builds: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With CUDA tiles, near chance and where pairs are confident, it equals the reference."""
    backend = functools.partial(emulated, Emulator(builds), element, tiles)
    monkeypatch.setattr("threetowers.kernels.operator.operators.backend_for", lambda x_bD: backend())
    batch = 150
    x_BD, y_BD = Case(batch, batch, 196).features(element)
    features, log_scale_1 = ((x_BD, x_BD), [3.0]) if confident else ((x_BD, y_BD), [2.5])
    ids = None if confident else torch.arange(batch) % 149  # two samples with one id
    results = []
    for loss_of, dtype in ((contrastive_loss, element), (reference_contrastive_loss, torch.float64)):
        x_bD, y_bD = (z.detach().to(dtype, copy=True).requires_grad_() for z in features)
        log_scale = torch.tensor(log_scale_1, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        bias = torch.full_like(log_scale, -14.0 if confident else -4.0).requires_grad_() if kind == "sigmoid" else None
        options = {"logit_cache_bytes": logit_cache_bytes} if loss_of is contrastive_loss else {}
        loss = loss_of(x_bD, y_bD, log_scale, bias=bias, kind=kind, group_ids=ids, **options)
        (loss * 2.0**14 if confident else loss).backward()  # fp16 features cannot hold smaller gradients
        results.append([loss, x_bD.grad, y_bD.grad, log_scale.grad, None if bias is None else bias.grad])
    assert (results[1][0].item() < 0.01) == confident
    for got, expected in zip(*results, strict=True):
        if expected is not None:
            error = (got.double() - expected).norm() / expected.norm()
            assert error <= {torch.float32: 2e-5}.get(element, 4e-3), error
