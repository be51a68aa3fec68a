"""Offsets beyond 32 bits: the last block of tiles with more than 2^31 elements, in memory that is mostly untouched.

Every kernel is run on five rows and eight columns near the start of its buffers, and on the same numbers at the end of
buffers of up to a terabyte, of which only the touched pages exist. Both must give the same bits. Then each 64-bit
product of the sources is narrowed to 32 bits, and that must be found.
"""

import mmap
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from emulator import SMALL, Emulator, Mutation
from torch import Tensor

from threetowers.kernels.cuda.arguments import Argument, In, Out, Scalar
from threetowers.kernels.cuda.block_shape import SWEEP, block_launch, narrow_block
from threetowers.kernels.cuda.compiler import SOURCES
from threetowers.kernels.cuda.distillation import sweep_launch
from threetowers.kernels.cuda.launch import (
    BAND,
    Launch,
    blocks_over,
    columns_launch,
    pairs_launch,
    rows_launch,
)

ROWS, COLS = 5, 8
BF16 = torch.bfloat16
NARROW_BLOCK = narrow_block(SMALL)
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return zeros whose pages take memory only when they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    buffer = mmap.mmap(-1, max(1, prod(shape) * dtype.itemsize), flags=flags)
    return torch.frombuffer(buffer, dtype=dtype, count=prod(shape)).view(shape)


def filled(values: Tensor, *before: int) -> Tensor:
    """Return zeros whose last entries along every axis are the values."""
    sizes = [skip + n for skip, n in zip(before, values.shape, strict=True)]
    whole = zeros(*sizes, dtype=values.dtype)
    whole[tuple(slice(skip, None) for skip in before)] = values
    return whole


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(prod(shape))).to(dtype)


Job = tuple[Launch, Sequence[Argument], list[Tensor]]


def tile(rows: int, cols: int) -> tuple[Scalar, ...]:
    return (*[In(None)] * 4, In(torch.tensor([1.5, -0.5])), rows, cols, cols)  # the diagonal is outside


def weights(before: int, count: int) -> tuple[Scalar, ...]:
    return (In(filled(numbers(count), before)), In(filled(numbers(count).abs(), before)), before + count)


def stats(down: int, right: int, depth: int, cache: bool = False) -> Job:
    rows, cols = down + ROWS, right + COLS
    x_rD, y_cD = filled(numbers(ROWS, depth, dtype=BF16), down, 0), filled(numbers(COLS, depth, dtype=BF16), right, 0)
    row_parts, col_parts = zeros(NARROW_BLOCK.across(cols), rows, 2), zeros(NARROW_BLOCK.down(rows), cols, 2)
    cached_rc = zeros(rows, cols) if cache else None
    outputs = Out(row_parts), Out(col_parts), Out(cached_rc)
    results = [row_parts[-1, -ROWS:], col_parts[-1, -COLS:]] + (
        [cached_rc[-ROWS:, -COLS:]] if cached_rc is not None else []
    )
    launch = block_launch("stats", BF16, rows, cols, NARROW_BLOCK, SMALL)
    return launch, ((In(x_rD), In(y_cD), depth), tile(rows, cols), *outputs), results


def softmax_gradient(down: int, right: int, depth: int) -> Job:
    rows, cols = down + ROWS, right + COLS
    x_rD, y_cD = filled(numbers(ROWS, depth, dtype=BF16), down, 0), filled(numbers(COLS, depth, dtype=BF16), right, 0)
    grad_rc = zeros(rows, cols, dtype=BF16)
    sides = weights(down, ROWS), weights(right, COLS)
    launch = block_launch("softmax_gradient", BF16, rows, cols, NARROW_BLOCK, SMALL)
    arguments = (In(x_rD), In(y_cD), depth), tile(rows, cols), *sides, (Out(grad_rc), cols)
    return launch, arguments, [grad_rc[-ROWS:, -COLS:]]


def swept_gradient(down: int, right: int, _: int) -> Job:
    rows, cols = down + ROWS, right + COLS
    grad_rc = zeros(rows, cols, dtype=BF16)
    dots_rc, sides = filled(numbers(ROWS, COLS), down, right), (weights(down, ROWS), weights(right, COLS))
    launch = block_launch("softmax_gradient", BF16, rows, cols, SWEEP, SMALL)
    return launch, ((In(dots_rc), 1), tile(rows, cols), *sides, (Out(grad_rc), cols)), [grad_rc[-ROWS:, -COLS:]]


def dense_row_stats(down: int, right: int, _: int) -> Job:
    rows, cols = down + ROWS, right + COLS
    dots_rc = filled(numbers(ROWS, COLS) + 40, down, right)  # case above the zeros before them
    max_r, sum_r = filled(torch.full((ROWS,), 50.0), down), filled(torch.ones(ROWS), down)
    arguments = In(dots_rc), tile(rows, cols), Out(max_r), Out(sum_r)
    return rows_launch("dense_row_stats", rows, SMALL), arguments, [max_r[-ROWS:], sum_r[-ROWS:]]


def dense_column_stats(down: int, right: int, _: int) -> Job:
    rows, cols = down + ROWS, right + COLS
    parts = zeros(blocks_over(rows, BAND), cols, 2)
    arguments = In(filled(numbers(ROWS, COLS), down, right)), tile(rows, cols), Out(parts)
    launch = columns_launch("dense_column_stats", cols, blocks_over(rows, BAND), SMALL)
    return launch, arguments, [parts[-1, -COLS:]]


def dense_softmax_gradient(down: int, right: int, _: int) -> Job:
    rows, cols = down + ROWS, right + COLS
    grad_rc = zeros(rows, cols)
    dots_rc, sides = filled(numbers(ROWS, COLS), down, right), (weights(down, ROWS), weights(right, COLS))
    launch = pairs_launch("dense_softmax_gradient", rows, cols, SMALL)
    return launch, (In(dots_rc), tile(rows, cols), *sides, Out(grad_rc)), [grad_rc[-1:, -COLS:]]


def dense_sigmoid(down: int, right: int, _: int) -> Job:
    rows, cols = down + ROWS, right + COLS
    grad_rc, row_weight = zeros(rows, cols), filled(numbers(ROWS), down)
    arguments = In(filled(numbers(ROWS, COLS), down, right)), tile(rows, cols), In(row_weight), Out(grad_rc)
    launch = rows_launch("dense_sigmoid", rows, SMALL)
    return launch, (*arguments, Out(None), Out(None), Out(None)), [grad_rc[-ROWS:, -COLS:]]


def merge(down: int, right: int, _: int) -> Job:
    count, length = down + 1, right + COLS
    parts = filled(numbers(1, COLS, 2).abs() + 40, down, right, 0)
    max_n, sum_n = filled(torch.full((COLS,), 30.0), right), filled(torch.ones(COLS), right)
    arguments = In(parts), count, length, Out(max_n), Out(sum_n)
    return columns_launch("merge", length, 1, SMALL), arguments, [max_n[-COLS:], sum_n[-COLS:]]


def distill_gradient(down: int, right: int, _: int) -> Job:
    rows, cols = down + ROWS, right + COLS
    grad_rc = zeros(rows, cols, dtype=BF16)
    dots_rc, teacher_rc = (filled(numbers(ROWS, COLS) * factor, down, right) for factor in (1, 2))
    sides = weights(down, ROWS), weights(right, COLS)
    teacher = In(teacher_rc), In(torch.tensor([0.5, 0.0])), *(part for side in sides for part in side[:2])
    arguments = (In(dots_rc), 1), tile(rows, cols), *sides, teacher, (Out(grad_rc), cols)
    return sweep_launch("distill_gradient", (), rows, cols, 1, SMALL), arguments, [grad_rc[-ROWS:, -COLS:]]


def merge_expectations(down: int, right: int, _: int) -> Job:
    count, length = down + 1, right + COLS
    parts = filled(numbers(1, COLS, 3).abs() + 40, down, right, 0)
    running = [filled(torch.full((COLS,), value), right) for value in (30.0, 1.0, 0.5)]
    arguments = In(parts), count, length, *map(Out, running)
    return columns_launch("merge_expectations", length, 1, SMALL), arguments, [part[-COLS:] for part in running]


@dataclass(frozen=True)
class OffsetCase:
    """A kernel, how many rows and columns come before the ones that count, and the product that has to be wide."""

    job: Callable[[int, int, int], Job]
    down: int
    right: int
    file: str
    wide: str
    depth: int = 8


def cached_stats(down: int, right: int, depth: int) -> Job:
    return stats(down, right, depth, cache=True)


M = 2**20
CASES = {
    "rows of x": OffsetCase(stats, M, 0, "block_product.h", "static_cast<i64>(first + r) * depth", 2048),
    "rows of y": OffsetCase(stats, 0, M, "block_product.h", "static_cast<i64>(first + r) * depth", 2048),
    "parts of rows": OffsetCase(stats, M, 2**18, "block_parts.h", "static_cast<i64>(block) * count"),
    "cached dots": OffsetCase(cached_stats, M, 2048, "stats.cu", "static_cast<i64>(i) * tile.columns"),
    "gradient": OffsetCase(softmax_gradient, M, 2**14, "block_gradient.h", "static_cast<i64>(row) * stride"),
    "dots in memory": OffsetCase(swept_gradient, M, 2**14, "library_dots.h", "static_cast<i64>(i) * tile.columns"),
    "dense rows": OffsetCase(dense_row_stats, M, 2048, "dense_row_stats.cu", "static_cast<i64>(i) * tile.columns"),
    "dense columns": OffsetCase(
        dense_column_stats, M, 2048, "dense_column_stats.cu", "static_cast<i64>(i) * tile.columns"
    ),
    "parts of columns": OffsetCase(
        dense_column_stats, M, 2**18, "dense_column_stats.cu", "static_cast<i64>(block_y()) * tile.columns"
    ),
    "dense gradient": OffsetCase(
        dense_softmax_gradient, 65530, 2**15 + 8, "dense_softmax_gradient.cu", "static_cast<i64>(i) * tile.columns"
    ),
    "dense sigmoid": OffsetCase(dense_sigmoid, M, 2048, "dense_sigmoid.cu", "static_cast<i64>(i) * tile.columns"),
    "merged parts": OffsetCase(merge, 4096, 2**19, "merge.cu", "static_cast<i64>(p) * length"),
    "gradient of distillation": OffsetCase(
        distill_gradient, M, 2**14, "direct_gradient.h", "static_cast<i64>(i) * to.stride"
    ),
    "merged expectations": OffsetCase(
        merge_expectations, 4096, 2**19, "merge_expectations.cu", "static_cast<i64>(p) * length"
    ),
}


def answer(case: OffsetCase, emulator: Emulator, down: int, right: int) -> list[Tensor]:
    launch, arguments, results = case.job(down, right, case.depth)
    emulator.run(launch, arguments)
    return results


@pytest.mark.parametrize("name", CASES)
def test_offsets_are_64_bit(name: str, builds: Path) -> None:
    case = CASES[name]
    near = answer(case, Emulator(builds, last_block_only=True), 0, 0)
    assert all(part.isfinite().all() and part.any() for part in near)

    def check(emulator: Emulator) -> None:
        for a, b in zip(answer(case, emulator, case.down, case.right), near, strict=True):
            assert torch.equal(a, b)

    check(Emulator(builds, last_block_only=True))
    narrow = case.wide.replace("static_cast<i64>(", "static_cast<int>(static_cast<u32>(") + ")"
    with pytest.raises(AssertionError):
        check(Emulator(builds, last_block_only=True, mutation=Mutation(case.file, case.wide, narrow)))


def test_every_64_bit_product_is_tested() -> None:
    """A new product needs an entry in CASES."""
    sources = [path for path in SOURCES.iterdir() if path.suffix in (".h", ".cu")]
    found = {
        (path.name, wide)
        for path in sources
        for wide in re.findall(r"static_cast<i64>\(.*?\) \* [\w.]+", path.read_text())
    }
    assert found == {(case.file, case.wide) for case in CASES.values()}
