"""The launches that a tile of given size takes, and whether a device can run them. Tested without a GPU."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from threetowers.kernels.cuda.arguments import Argument

# As in device.h and the dense kernels.
CHUNK = 8  # elements that are copied together: the inner dimension is a multiple of it
BAND = 128  # rows that one thread of dense_column_stats walks
BLOCK_THREADS = 256  # of every kernel
WARPS = BLOCK_THREADS // 32

GRID_LIMITS = 2**31 - 1, 65535  # blocks along x and y, on every architecture
KEPT_LAUNCHES = 1024  # of each kind: a run has as many as its tiles have shapes
SHARED_RESERVED = 1024  # bytes that the system takes of every block's shared memory


class UnsupportedError(ValueError):
    """The kernels cannot serve a device or a tensor."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A device's compute capability and shared memory."""

    capability: tuple[int, int]
    shared_per_block: int  # bytes, after opting in
    shared_per_processor: int  # bytes


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, the macros it is compiled with, and its grid."""

    kernel: str
    defines: tuple[str, ...]
    grid: tuple[int, int]
    shared_bytes: int = 0


class StreamLauncher(Protocol):
    """What launches kernels on one stream, from one thread."""

    limits: Limits

    def run(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        """Start a kernel. Every launch of a kernel has arguments of the same kinds."""
        ...


class Launcher(Protocol):
    """A device that kernels run on: a GPU through its driver, or an emulator."""

    limits: Limits

    def prepare(self, launches: Sequence[Launch]) -> None:
        """Compile and load these kernels now, so that any failure is raised here. Grids do not matter."""
        ...

    def bind(self) -> StreamLauncher:
        """Return what launches on the device's current stream, as long as the device is the current one."""
        ...


@functools.lru_cache(KEPT_LAUNCHES)
def rows_launch(kernel: str, rows: int, limits: Limits) -> Launch:
    """Return the launch of a kernel with one warp a row."""
    return checked(Launch(kernel, (), (blocks_over(rows, WARPS), 1)), limits)


@functools.lru_cache(KEPT_LAUNCHES)
def columns_launch(kernel: str, columns: int, bands: int, limits: Limits) -> Launch:
    """Return the launch of a kernel with one thread a column, for each of several bands of rows."""
    return checked(Launch(kernel, (), (blocks_over(columns, BLOCK_THREADS), bands)), limits)


@functools.lru_cache(KEPT_LAUNCHES)
def pairs_launch(kernel: str, rows: int, columns: int, limits: Limits) -> Launch:
    """Return the launch of a kernel with one thread an entry of the tile."""
    return checked(Launch(kernel, (), (blocks_over(columns, BLOCK_THREADS), rows)), limits)


def blocks_over(n: int, size: int) -> int:
    """Return how many blocks of this size cover n."""
    return -(-n // size)


def checked(launch: Launch, limits: Limits) -> Launch:
    """Return the launch.

    Raises:
        UnsupportedError: this device cannot run it.
    """
    for axis, got, most in zip("xy", launch.grid, GRID_LIMITS, strict=True):
        if not 1 <= got <= most:
            raise UnsupportedError(
                f"{launch.kernel}: {got} blocks along {axis}; expected 1 to {most}: use smaller tiles"
            )
    if launch.shared_bytes > limits.shared_per_block:
        raise UnsupportedError(
            f"{launch.kernel} needs {launch.shared_bytes} bytes of shared memory a block; "
            f"the device has {limits.shared_per_block}"
        )
    return launch


def check_operands(x_rD: Tensor, y_cD: Tensor) -> None:
    """Raise UnsupportedError unless the tensor-core kernels can copy both in chunks of 16 bytes."""
    for name, z_nD in (("x", x_rD), ("y", y_cD)):
        if z_nD.dtype not in (torch.bfloat16, torch.float16) or z_nD.dtype != x_rD.dtype:
            raise UnsupportedError(f"{name} is {z_nD.dtype}; expected bfloat16 or float16 on both sides")
        if not z_nD.is_contiguous() or z_nD.data_ptr() % 16 or z_nD.shape[1] % CHUNK or z_nD.shape[1] != x_rD.shape[1]:
            raise UnsupportedError(
                f"{name} has shape {tuple(z_nD.shape)}, strides {z_nD.stride()}, address {z_nD.data_ptr()}; expected "
                f"contiguous rows of one width, a multiple of {CHUNK}, from a multiple of 16 bytes on"
            )


def check_torch(version: torch.torch_version.TorchVersion) -> None:
    """Raise UnsupportedError where torch.addmm cannot add a product of 16-bit matrices to a float32 matrix."""
    if version < "2.10":  # compared as versions
        raise UnsupportedError(f"summing gradients of 16-bit tiles in float32 needs torch 2.10 or later; got {version}")


def clipped_diagonal(diagonal: int, rows: int, columns: int) -> int:
    """Return the diagonal as a small integer: one that misses the tile is moved just outside it."""
    return max(-rows, min(columns, diagonal))
