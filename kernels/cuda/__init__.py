"""The CUDA back ends: C++ kernels for tiles of the similarity matrix, compiled at first use."""

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from threetowers.kernels.tiles import TileBackend

logger = logging.getLogger(__name__)


def cuda_backend(x_bD: Tensor) -> "TileBackend | None":
    """Return the fastest CUDA back end that serves these features' device and dtype.

    Tensor cores for bf16 and fp16 from compute capability 8.0 on, else library GEMMs in float32. None where neither
    works: float64, no driver, no cuda-bindings, a compiler that fails. Each failure is logged once a device and dtype.
    """
    index = torch.cuda.current_device() if x_bD.device.index is None else x_bD.device.index
    make = _factory(index, x_bD.dtype)
    return None if make is None else make()


@functools.cache
def _factory(index: int, element: torch.dtype) -> "Callable[[], TileBackend] | None":
    if element == torch.float64:
        return None
    try:
        from threetowers.kernels.cuda.cuda_tiles import DenseTiles, TensorCoreTiles
        from threetowers.kernels.cuda.driver import DriverLauncher

        launcher = DriverLauncher(index)
    except (ImportError, RuntimeError) as error:
        logger.warning("contrastive loss: no CUDA kernels on cuda:%d, plain torch instead: %s", index, error)
        return None
    for make in (functools.partial(TensorCoreTiles, launcher, element), functools.partial(DenseTiles, launcher)):
        if element == torch.float32 and make.func is TensorCoreTiles:
            continue
        try:
            launcher.prepare(make().kernels())
            return make
        except (RuntimeError, ValueError) as error:
            logger.warning("contrastive loss: cannot use %s on cuda:%d: %s", make.func.__name__, index, error)
    return None
