"""The ways in which the tensor-core kernels cut a tile, which are checked and timed side by side."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = "THREETOWERS_CUDA_TILES"  # read whenever a back end is chosen
TILE_SHAPES = {"128x128": "TensorCoreTiles", "128x256": "TensorCoreTiles", "library": "LibraryDotsTiles"}  # back ends


@contextmanager
def tile_shape(name: str) -> Iterator[None]:
    """Choose one of them within the block."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = name
    try:
        yield
    finally:
        del os.environ[SWITCH]
        if before is not None:
            os.environ[SWITCH] = before
