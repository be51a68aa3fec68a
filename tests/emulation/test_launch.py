"""The host side of the CUDA kernels: what is launched, what is refused, and how arguments are laid out."""

import ctypes
import logging
import math
from pathlib import Path

import pytest
import torch
from emulator import HOPPER, LARGE, SMALL, EmulationError, Emulator, tensor_arguments
from torch import Tensor
from torch.torch_version import TorchVersion

from threetowers.kernels import cuda
from threetowers.kernels.cuda.arguments import In, Out, PackedArguments
from threetowers.kernels.cuda.block_shape import (
    SWEEP,
    WIDE_BLOCK,
    block_launch,
    default_tiles,
    narrow_block,
    tiles_from_environment,
)
from threetowers.kernels.cuda.cuda_tiles import DenseTiles, LibraryDotsTiles, TensorCoreTiles
from threetowers.kernels.cuda.distillation import sweep_launch
from threetowers.kernels.cuda.launch import (
    SHARED_RESERVED,
    Launch,
    Limits,
    UnsupportedError,
    blocks_over,
    check_operands,
    check_torch,
    checked,
    clipped_diagonal,
    columns_launch,
    pairs_launch,
    rows_launch,
)

TURING = Limits((7, 5), 64 * 1024, 64 * 1024)


BLACKWELL = Limits((12, 0), 99 * 1024, 100 * 1024)


def test_stages_leave_room_for_the_blocks_of_a_processor() -> None:
    assert [narrow_block(limits).stages for limits in (SMALL, LARGE, HOPPER)] == [3, 4, 4]
    assert WIDE_BLOCK.shared_bytes + SHARED_RESERVED <= min(SMALL.shared_per_processor, HOPPER.shared_per_block)
    assert 2 * (SWEEP.shared_bytes + SHARED_RESERVED) <= SMALL.shared_per_processor


def test_wide_blocks_are_the_default_where_shared_memory_would_not_keep_up() -> None:
    names = [default_tiles(limits) for limits in (SMALL, LARGE, HOPPER, BLACKWELL)]
    assert names == ["128x128", "128x128", "128x256", "128x128"]


def test_grids_cover_ragged_tiles_once() -> None:
    assert [blocks_over(n, 128) for n in (1, 128, 129)] == [1, 1, 2]
    launch = block_launch("stats", torch.float16, 129, 4096, narrow_block(SMALL), SMALL)
    assert launch == Launch("stats", ("FP16", "COLUMNS=128", "STAGES=3"), (32, 2), 48 * 1024)
    launch = block_launch("stats", torch.bfloat16, 257, 257, WIDE_BLOCK, HOPPER)
    assert launch == Launch("stats", ("COLUMNS=256", "STAGES=4"), (2, 3), 96 * 1024)
    launch = block_launch("stats", torch.bfloat16, 257, 257, SWEEP, SMALL)
    assert launch == Launch("stats", ("COLUMNS=128", "LIBRARY_DOTS"), (3, 3), 40 * 1024)
    launch = sweep_launch("distill_sigmoid", ("FP16",), 65, 256, 2, SMALL)
    assert launch.defines == ("FP16", "ROWS=64", "COLUMNS=64", "LIBRARY_DOTS", "TEACHERS=2")
    assert launch.grid == (4, 2)
    assert rows_launch("dense_row_stats", 9, SMALL).grid == (2, 1)
    assert columns_launch("dense_column_stats", 257, 3, SMALL).grid == (2, 3)
    assert pairs_launch("dense_softmax_gradient", 7, 256, TURING) == Launch("dense_softmax_gradient", (), (1, 7))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: block_launch("stats", torch.bfloat16, 1, 1, SWEEP, TURING),
            r"capability 8\.0 or later; got \(7, 5\)",
        ),
        (lambda: block_launch("stats", torch.float32, 1, 1, SWEEP, SMALL), "bfloat16 or float16 features"),
        (lambda: check_torch(TorchVersion("2.9.1+cu130")), r"torch 2\.10 or later; got 2\.9\.1"),
        (lambda: pairs_launch("merge", 65536, 1, SMALL), "65536 blocks along y; expected 1 to 65535"),
        (lambda: rows_launch("merge", 0, SMALL), "0 blocks along x"),
        (lambda: checked(Launch("stats", (), (1, 1), 2**17), SMALL), "needs 131072 bytes.* has 101376"),
    ],
)
def test_what_a_device_cannot_run_is_refused(make: object, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        make()  # type: ignore[operator]


def halves(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x_rD", "y_cD"),
    [
        (halves(2, 12), halves(3, 12)),  # not whole chunks
        (halves(2, 8), halves(3, 16)),  # two widths
        (halves(2, 16)[:, :8], halves(3, 8)),  # rows apart
        (halves(33)[1:].view(4, 8), halves(3, 8)),  # 2 bytes off
        (halves(2, 8), halves(3, 8).half()),
        (halves(2, 8).float(), halves(3, 8).float()),
    ],
)
def test_operands_that_cannot_be_copied_in_chunks_are_refused(x_rD: Tensor, y_cD: Tensor) -> None:
    with pytest.raises(UnsupportedError, match=r"[xy] (has|is)"):
        check_operands(x_rD, y_cD)


def counted(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.bfloat16).view(shape)


@pytest.mark.parametrize("z_nD", [counted(5, 13), counted(5, 32)[:, ::2], counted(41)[1:].view(5, 8), torch.ones(5, 8)])
def test_features_become_operands(z_nD: Tensor, builds: Path) -> None:
    ready_nD = LibraryDotsTiles(Emulator(builds), torch.bfloat16).features(z_nD)
    check_operands(ready_nD, ready_nD)
    width = z_nD.shape[1]
    assert torch.equal(ready_nD[:, :width], z_nD.bfloat16())
    assert not ready_nD[:, width:].any()


@pytest.mark.parametrize(
    ("diagonal", "clipped"), [(0, 0), (-4, -4), (6, 6), (-5, -5), (7, 7), (10**15, 7), (-(10**15), -5)]
)
def test_a_diagonal_far_away_is_moved_just_outside(diagonal: int, clipped: int) -> None:
    assert clipped_diagonal(diagonal, rows=5, columns=7) == clipped


def test_arguments_are_laid_out_as_in_cpp() -> None:
    """A struct like Tile of tile.h, of three pointers and three ints."""
    tensor = torch.zeros(3)
    packed = PackedArguments([(In(tensor), Out(None), In(tensor[1:]), 2, 3, -4), 7, In(tensor)])

    class Tile(ctypes.Structure):
        _fields_ = (
            *[(name, ctypes.c_void_p) for name in ("row_labels", "column_labels", "scale_and_bias")],
            *[(name, ctypes.c_int) for name in ("rows", "columns", "diagonal")],
        )

    tile = Tile.from_address(packed.table[0])
    assert (tile.row_labels, tile.column_labels) == (tensor.data_ptr(), None)
    assert (tile.scale_and_bias, tile.rows, tile.columns, tile.diagonal) == (tensor.data_ptr() + 4, 2, 3, -4)
    assert ctypes.c_int.from_address(packed.table[1]).value == 7
    assert ctypes.c_void_p.from_address(packed.table[2]).value == tensor.data_ptr()

    # Later arguments of the same kinds take the same places.
    packed.fill([(Out(None), In(tensor), In(None), -5, 6, 7), -8, Out(None)])
    tile = Tile.from_address(packed.table[0])
    assert (tile.row_labels, tile.column_labels, tile.scale_and_bias) == (None, tensor.data_ptr(), None)
    assert (tile.rows, tile.columns, tile.diagonal) == (-5, 6, 7)
    assert ctypes.c_int.from_address(packed.table[1]).value == -8
    assert ctypes.c_void_p.from_address(packed.table[2]).value is None
    assert list(tensor_arguments([(In(tensor), 3), 1, Out(None), 2.0])) == [In(tensor), Out(None)]


def chosen(limits: Limits, element: torch.dtype, builds: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Return what `cuda_backend` chooses for a device with these limits, with the emulator as its driver."""
    monkeypatch.setattr("threetowers.kernels.cuda.driver.DriverLauncher", lambda index: Emulator(builds, limits))
    make = cuda._factory.__wrapped__(0, element, tiles_from_environment())
    return None if make is None else make()


def test_the_fastest_back_end_that_a_device_can_run_is_chosen(
    builds: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(chosen(SMALL, torch.bfloat16, builds, monkeypatch), TensorCoreTiles)
        assert isinstance(chosen(LARGE, torch.float32, builds, monkeypatch), DenseTiles)
        assert chosen(LARGE, torch.float64, builds, monkeypatch) is None
        assert not caplog.records
        assert isinstance(chosen(TURING, torch.float16, builds, monkeypatch), DenseTiles)
    (record,) = caplog.records
    assert "cannot use TensorCoreTiles on cuda:0: stats needs compute capability 8.0" in record.message


def test_the_environment_chooses_the_tiles(builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = {}
    for name in ("128x128", "128x256", "library", ""):
        monkeypatch.setenv("THREETOWERS_CUDA_TILES", name)
        backend = chosen(LARGE, torch.float16, builds, monkeypatch)
        assert isinstance(backend, TensorCoreTiles)
        assert isinstance(backend, LibraryDotsTiles) == (name == "library")
        launches[name] = backend.kernels()[0].defines
    assert launches[""] == launches["128x128"] == ("FP16", "COLUMNS=128", "STAGES=4")
    assert launches["128x256"] == ("FP16", "COLUMNS=256", "STAGES=4")
    assert launches["library"] == ("FP16", "COLUMNS=128", "LIBRARY_DOTS")
    monkeypatch.setenv("THREETOWERS_CUDA_TILES", "256x256")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match="THREETOWERS_CUDA_TILES is '256x256'; expected 128x128, 128x256 or library"):
        cuda.cuda_backend(torch.zeros(1, 8))


def test_without_a_driver_there_is_one_warning_and_no_back_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(index: int) -> None:
        raise ImportError("no module named cuda.bindings")

    monkeypatch.setattr("threetowers.kernels.cuda.driver.DriverLauncher", refuse)
    with caplog.at_level(logging.WARNING):
        assert cuda._factory.__wrapped__(0, torch.bfloat16, None) is None
    (record,) = caplog.records
    assert "no CUDA kernels on cuda:0, plain torch instead: no module named cuda.bindings" in record.message


def test_the_emulator_reports_an_illegal_write(builds: Path) -> None:
    """A running maximum shorter than the parts: the host's error, found in the kernel."""
    emulator = Emulator(builds)
    parts_pn2, short_n, sum_n = torch.zeros(2, 5, 2), torch.zeros(4), torch.zeros(5)
    launch = columns_launch("merge", 5, 1, emulator.limits)
    with pytest.raises(EmulationError, match=r"merge under .* thread 4 writes 4 bytes at byte 16 of a buffer of 16"):
        emulator.run(launch, (In(parts_pn2), 2, 5, Out(short_n), Out(sum_n)))


def test_gradient_products_are_calls_that_torch_accepts(builds: Path) -> None:
    """Shapes, strides and dtypes only: the meta device computes nothing, and the CPU has no such product."""
    backend = LibraryDotsTiles(Emulator(builds), torch.float16)
    x_rD, y_cD = (torch.empty(n, 16, dtype=torch.float16, device="meta") for n in (5, 11))
    grad_rc = torch.empty(5, 16, dtype=torch.float16, device="meta")[:, :11]
    for add, rows, other_nD in ((backend.add_rows, 5, y_cD), (backend.add_cols, 11, x_rD)):
        sum_nD = torch.empty(rows, 13, device="meta")  # features were padded from 13 to 16
        add(sum_nD, grad_rc, other_nD)
        assert sum_nD.shape == (rows, 13)
    backend._multiply(x_rD, y_cD, dots_rc := torch.empty(5, 11, device="meta"))
    assert dots_rc.shape == (5, 11)
