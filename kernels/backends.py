"""The choice of the back end that computes the tiles of given features."""

import torch
from torch import Tensor

from threetowers.kernels.cpu import CpuTiles, sweep_library
from threetowers.kernels.cuda import cuda_backend
from threetowers.kernels.tiles.tile_backend import TileBackend
from threetowers.kernels.tiles.torch_tiles import TorchTiles


def backend_for(x_bD: Tensor) -> TileBackend:
    """Return the fastest back end that serves this tensor's device and dtype; plain torch where no other does."""
    if x_bD.device.type == "cuda":
        backend = cuda_backend(x_bD)  # None: no kernel serves this dtype or architecture
        if backend is not None:
            return backend
    if x_bD.device.type == "cpu" and x_bD.dtype != torch.float64:
        library = sweep_library()
        if library is not None:
            return CpuTiles(library)
    return TorchTiles(torch.float64 if x_bD.dtype == torch.float64 else torch.float32)
