"""The CUDA back ends: C++ kernels for tiles of the similarity matrix, compiled at first use."""

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from threetowers.kernels.cuda.block_shape import tiles_from_environment

if TYPE_CHECKING:
    from threetowers.kernels.tiles.tile_backend import TileBackend

logger = logging.getLogger(__name__)


def cuda_backend(x_bD: Tensor) -> "TileBackend | None":
    """Return the CUDA back end that serves these features' device and dtype.

    For bf16 and fp16 from compute capability 8.0 on, the kernels on tensor cores, with the tiles that
    ``$THREETOWERS_CUDA_TILES`` asks for, or else those that should suit the device; for others library GEMMs in
    float32. None where neither works: float64, no driver, no cuda-bindings, a compiler that fails. Each failure is
    logged once a device, dtype and kind of tiles.

    Raises:
        ValueError: the environment asks for tiles that do not exist.
    """
    index = torch.cuda.current_device() if x_bD.device.index is None else x_bD.device.index
    make = _factory(index, x_bD.dtype, tiles_from_environment())
    return None if make is None else make()


@functools.cache
def _factory(index: int, element: torch.dtype, tiles: str | None) -> "Callable[[], TileBackend] | None":
    if element == torch.float64:
        return None
    try:
        from threetowers.kernels.cuda.cuda_tiles import DenseTiles, tensor_core_tiles
        from threetowers.kernels.cuda.driver import DriverLauncher

        launcher = DriverLauncher(index)
    except (ImportError, RuntimeError) as error:
        logger.warning("contrastive loss: no CUDA kernels on cuda:%d, plain torch instead: %s", index, error)
        return None
    makers: dict[str, Callable[[], Any]] = {"DenseTiles": functools.partial(DenseTiles, launcher)}
    if element != torch.float32:
        makers = {"TensorCoreTiles": functools.partial(tensor_core_tiles, launcher, element, tiles), **makers}
    for name, make in makers.items():
        try:
            launcher.prepare(make().kernels())
            return make
        except (RuntimeError, ValueError) as error:
            logger.warning("contrastive loss: cannot use %s on cuda:%d: %s", name, index, error)
    return None
