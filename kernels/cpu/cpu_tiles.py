"""Tiles on the CPU: a library product into a reused buffer, then one C++ sweep over it."""

import ctypes

import torch
from torch import Tensor
from typing_extensions import override

from threetowers.kernels.tiles import LibraryTiles, OnlineLogSumExp, SigmoidSums, SoftmaxWeights, Tile

# What ATEN_CPU_CAPABILITY can hold torch back to; the sweep keeps to it, so that both compute as on such a processor.
ISA_OF_TORCH = {"DEFAULT": 0, "AVX2": 1}


class CpuTiles(LibraryTiles):
    """Tiles of float32, bfloat16 and float16 features on the CPU, computed in float32."""

    def __init__(self, library: ctypes.CDLL, isa: int | None = None) -> None:
        """Use instruction set 0 (baseline), 1 (AVX2) or 2 (AVX-512); None: the best that torch uses here."""
        super().__init__(torch.float32)
        self._library = library
        self._isa = best_isa(library) if isa is None else isa
        self._partial_n = torch.empty(0)

    @override
    def stats(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: OnlineLogSumExp,
        cols: OnlineLogSumExp,
        cache_rc: Tensor | None,
    ) -> None:
        dot_rc = self.dots(x_rD, y_cD, cache_rc)
        outputs = (rows.max_n, rows.sum_n, cols.max_n, cols.sum_n, self._partial(dot_rc))
        self._library.threetowers_sweep_stats(
            *self._head(dot_rc, tile.logit_map.base2_2.tolist()[0]), *_excluded(tile), *map(_address, outputs)
        )

    @override
    def softmax_grad(
        self,
        x_rD: Tensor,
        y_cD: Tensor,
        tile: Tile,
        rows: SoftmaxWeights,
        cols: SoftmaxWeights,
        cache_rc: Tensor | None,
    ) -> Tensor:
        dot_rc = self.dots(x_rD, y_cD) if cache_rc is None else cache_rc
        grad_rc = dot_rc if cache_rc is None else self.scratch(x_rD, y_cD)  # the cache is read only
        vectors = (rows.shift_n, rows.factor_n, cols.shift_n, cols.factor_n, grad_rc)
        self._library.threetowers_sweep_softmax_grad(
            *self._head(dot_rc, tile.logit_map.base2_2.tolist()[0]), *_excluded(tile), *map(_address, vectors)
        )
        return grad_rc

    @override
    def sigmoid(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, sums: SigmoidSums, weights_r: Tensor | None
    ) -> Tensor | None:
        dot_rc = self.dots(x_rD, y_cD)
        results = (sums.loss_r, sums.prob_r, sums.row_max_r, sums.col_max_c)
        grad_rc = None if weights_r is None else dot_rc
        vectors = (*results, weights_r, grad_rc, self._partial(dot_rc))
        scale, bias = tile.logit_map.natural_2.tolist()
        self._library.threetowers_sweep_sigmoid(
            *self._head(dot_rc, scale), bias, *_excluded(tile), *map(_address, vectors)
        )
        return grad_rc

    def _head(self, dot_rc: Tensor, factor: float) -> tuple[int, int, int, int, int, float]:
        rows, cols = dot_rc.shape
        return self._isa, torch.get_num_threads(), dot_rc.data_ptr(), rows, cols, factor

    def _partial(self, dot_rc: Tensor) -> Tensor:
        """Return memory for the columns' partial results."""
        size = self._library.threetowers_sweep_scratch(*dot_rc.shape)
        if len(self._partial_n) < size:
            self._partial_n = torch.empty(size)
        return self._partial_n


def best_isa(library: ctypes.CDLL) -> int:
    """Return the processor's best instruction set, as numbered in `CpuTiles`, or torch's if that is held back."""
    best: int = library.threetowers_sweep_isa()
    return min(best, ISA_OF_TORCH.get(torch.backends.cpu.get_cpu_capability(), best))


def _excluded(tile: Tile) -> tuple[int, int | None, int | None]:
    return tile.diagonal, _address(tile.row_labels_r), _address(tile.col_labels_c)


def _address(vector: Tensor | None) -> int | None:
    """Return where a contiguous tensor lies in memory; None, a null pointer, for None."""
    if vector is None:
        return None
    if not vector.is_contiguous():
        raise ValueError(f"a vector of a tile has strides {vector.stride()}; expected a contiguous one")
    return vector.data_ptr()
