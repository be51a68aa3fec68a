"""The CPU back end: library products, and one vectorised C++ sweep over each tile."""

from threetowers.kernels.cpu.cpu_tiles import CpuTiles
from threetowers.kernels.cpu.library import sweep_library

__all__ = ["CpuTiles", "sweep_library"]
