"""The back ends under test."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from threetowers.kernels.cpu import CpuTiles, sweep_library
from threetowers.kernels.operator import operators
from threetowers.kernels.tiles.tile_backend import TileBackend
from threetowers.kernels.tiles.torch_tiles import TorchTiles

BackendFor = Callable[[torch.Tensor], TileBackend]


def _small(backend: Any) -> Any:
    backend.rows, backend.cols = 48, 80  # several tiles, ragged at both ends, already at a batch of 100
    return backend


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "avx2", "avx512"])
def sweep(request: pytest.FixtureRequest) -> CpuTiles:
    """Run the test with each instruction set's sweep."""
    loaded = sweep_library()
    if loaded is None or request.param > loaded.threetowers_sweep_isa():
        pytest.skip("not built here, or not in this processor")
    return CpuTiles(loaded, request.param)


@pytest.fixture(params=["torch", "cpu"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on each back end, with tiles so small that every batch has several."""
    library = sweep_library()
    if request.param == "cpu" and library is None:
        pytest.skip("this installation has no compiled sweep")

    def backend_for(x_bD: torch.Tensor) -> TileBackend:
        if request.param == "torch" or x_bD.dtype == torch.float64 or library is None:
            return _small(TorchTiles(torch.promote_types(x_bD.dtype, torch.float32)))
        return _small(CpuTiles(library))

    monkeypatch.setattr(operators, "backend_for", backend_for)
    return str(request.param)
