"""The thread blocks of the tensor-core kernels: how much of a tile one takes, and where its dots come from.

Which shape is fastest on a device is not measured. By arithmetic, blocks of 128 x 128 ask shared memory for about all
that it can deliver where a processor multiplies at an A100's rate, and two of them hide each other's ends; at an H100's
rate they would ask for more than there is. Blocks of 128 x 256 ask for two thirds as much for each product, and L2 for
three quarters. Hence `default_tiles`.
"""

import functools
import os
from dataclasses import dataclass

import torch

from threetowers.kernels.cuda.launch import (
    KEPT_LAUNCHES,
    SHARED_RESERVED,
    Launch,
    Limits,
    UnsupportedError,
    blocks_over,
    checked,
)

TILES_VARIABLE = "THREETOWERS_CUDA_TILES"
NARROW, WIDE, LIBRARY = "128x128", "128x256", "library"
TILES = (NARROW, WIDE, LIBRARY)

# As in the headers of the same names.
ELEMENT_DEFINES: dict[torch.dtype, tuple[str, ...]] = {torch.bfloat16: (), torch.float16: ("FP16",)}
BLOCK_ROWS = 128
SLICE_ROW_BYTES = 64  # 32 elements of 16 bits
SWEEP_BYTES = 40 * 1024  # a gradient of 128 x 128 elements, and the warps' parts


@dataclass(frozen=True, slots=True)
class BlockShape:
    """A block's piece of a tile: 128 rows, and these columns.

    Its dots are computed with this many slices of the inner dimension in flight; with none, they are read from memory,
    where a library GEMM left them.
    """

    columns: int
    stages: int = 0

    @property
    def defines(self) -> tuple[str, ...]:
        """Return the macros that compile a kernel for this shape."""
        return (f"COLUMNS={self.columns}", f"STAGES={self.stages}" if self.stages else "LIBRARY_DOTS")

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory that a block needs."""
        return self.stages * (BLOCK_ROWS + self.columns) * SLICE_ROW_BYTES or SWEEP_BYTES

    def across(self, columns: int) -> int:
        """Return how many blocks cover a tile's columns: so many parts has each of its rows."""
        return blocks_over(columns, self.columns)

    def down(self, rows: int) -> int:
        """Return how many blocks cover a tile's rows: so many parts has each of its columns."""
        return blocks_over(rows, BLOCK_ROWS)


SWEEP = BlockShape(columns=128)
WIDE_BLOCK = BlockShape(columns=256, stages=4)


def narrow_block(limits: Limits) -> BlockShape:
    """Return 128 x 128 with 4 slices in flight where two blocks fit on a processor (sm_80, 90, 100), else with 3."""
    four = BlockShape(columns=128, stages=4)
    fits = limits.shared_per_processor >= 2 * (four.shared_bytes + SHARED_RESERVED)
    return four if fits else BlockShape(columns=128, stages=3)


def default_tiles(limits: Limits) -> str:
    """Return 128x256 on data-centre devices from Hopper on (sm_90, 100), told by their shared memory; else 128x128.

    Those with 99 KiB a block (sm_86, 89, 120) multiply at a quarter of the rate, which a small block can feed.
    """
    data_centre = limits.shared_per_block >= 160 * 1024
    return WIDE if data_centre and limits.capability >= (9, 0) else NARROW


def tiles_from_environment() -> str | None:
    """Return the tiles that ``$THREETOWERS_CUDA_TILES`` asks for: 128x128, 128x256, or library; None where it is unset.

    Raises:
        ValueError: it is set to something else.
    """
    name = os.environ.get(TILES_VARIABLE)
    if name and name not in TILES:
        raise ValueError(f"{TILES_VARIABLE} is {name!r}; expected {', '.join(TILES[:-1])} or {TILES[-1]}")
    return name or None


@functools.lru_cache(KEPT_LAUNCHES)
def block_launch(
    kernel: str,
    element: torch.dtype,
    rows: int,
    columns: int,
    shape: BlockShape,
    limits: Limits,
    dot_limits: bool = False,
) -> Launch:
    """Return the launch of a tensor-core kernel over a tile: one block a piece.

    dot_limits: whether the tile has limits on dots, for which the kernel is compiled apart.
    """
    if limits.capability < (8, 0):
        raise UnsupportedError(f"{kernel} needs compute capability 8.0 or later; got {limits.capability}")
    if element not in ELEMENT_DEFINES:
        raise UnsupportedError(f"{kernel} multiplies bfloat16 or float16 features; got {element}")
    defines = (*ELEMENT_DEFINES[element], *shape.defines, *(["DOT_LIMITS"] if dot_limits else []))
    return checked(Launch(kernel, defines, (shape.across(columns), shape.down(rows)), shape.shared_bytes), limits)
