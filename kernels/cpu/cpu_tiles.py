"""Tiles on the CPU: a library product into a reused buffer, then one C++ sweep over it."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from threetowers.kernels.tiles.statistics import (
    OnlineLogSumExp,
    PairWeights,
    SigmoidSums,
    SoftmaxStatistics,
    SoftmaxWeights,
)
from threetowers.kernels.tiles.tile_backend import StudentTile, Tile
from threetowers.kernels.tiles.torch_tiles import LibraryTiles

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
            *self._head(dot_rc, tile.logit_map.base2_2.tolist()[0]),
            *_excluded(tile),
            *_limits(tile),
            *map(_address, outputs),
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
            *self._head(dot_rc, tile.logit_map.base2_2.tolist()[0]),
            *_excluded(tile),
            *_limits(tile),
            *map(_address, vectors),
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
            *self._head(dot_rc, scale), bias, *_excluded(tile), *_limits(tile), *map(_address, vectors)
        )
        return grad_rc

    @override
    def distill_stats(
        self, student: StudentTile, rows: SoftmaxStatistics, cols: SoftmaxStatistics, cache_Krc: Tensor | None
    ) -> None:
        dots_Krc = self.all_dots(student, cache_Krc)
        self._library.threetowers_sweep_distill_stats(
            *self._heads(dots_Krc, [each.logit_map.base2_2.tolist()[0] for each in _all(student)]),
            *_excluded(student.tile),
            _statistics(rows),
            _statistics(cols),
            _address(self._partial(dots_Krc[0], len(student.teachers))),
        )

    @override
    def distill_grad(
        self, student: StudentTile, rows: PairWeights, cols: PairWeights, cache_Krc: Tensor | None
    ) -> Tensor:
        dots_Krc = self.all_dots(student) if cache_Krc is None else cache_Krc
        # the cache is read only
        grad_rc = dots_Krc[0] if cache_Krc is None else self.scratch(student.x_rD, student.y_cD)
        weights = [
            vector
            for row, col in zip([rows.student, *rows.teachers], [cols.student, *cols.teachers], strict=True)
            for vector in (row.shift_n, row.factor_n, col.shift_n, col.factor_n)
        ]
        self._library.threetowers_sweep_distill_grad(
            *self._heads(dots_Krc, [each.logit_map.base2_2.tolist()[0] for each in _all(student)]),
            *_excluded(student.tile),
            _addresses(weights),
            _address(grad_rc),
        )
        return grad_rc

    @override
    def distill_sigmoid(self, student: StudentTile, sums: SigmoidSums, weights_r: Tensor | None) -> Tensor | None:
        dots_Krc = self.all_dots(student)
        results = (sums.loss_r, sums.prob_r, sums.row_max_r, sums.col_max_c)
        grad_rc = None if weights_r is None else dots_Krc[0]
        vectors = (*results, weights_r, grad_rc, self._partial(dots_Krc[0], len(student.teachers)))
        scales, biases = zip(*(each.logit_map.natural_2.tolist() for each in _all(student)), strict=True)
        self._library.threetowers_sweep_distill_sigmoid(
            *self._heads(dots_Krc, scales),
            _floats(biases),
            *_excluded(student.tile),
            _floats([teacher.weight for teacher in student.teachers]),
            *map(_address, vectors),
        )
        return grad_rc

    def _head(self, dot_rc: Tensor, factor: float) -> tuple[int, int, int, int, int, float]:
        rows, cols = dot_rc.shape
        return self._isa, torch.get_num_threads(), dot_rc.data_ptr(), rows, cols, factor

    def _heads(
        self, dots_Krc: Tensor, factors: Sequence[float]
    ) -> tuple[int, int, int, int, int, int, "ctypes.Array[ctypes.c_float]"]:
        count, rows, cols = dots_Krc.shape
        return self._isa, torch.get_num_threads(), dots_Krc.data_ptr(), count - 1, rows, cols, _floats(factors)

    def _partial(self, dot_rc: Tensor, teachers: int = 0) -> Tensor:
        """Return memory for the columns' partial results."""
        size = self._library.threetowers_sweep_scratch(*dot_rc.shape, teachers)
        if len(self._partial_n) < size:
            self._partial_n = torch.empty(size)
        return self._partial_n


def best_isa(library: ctypes.CDLL) -> int:
    """Return the processor's best instruction set, as numbered in `CpuTiles`, or torch's if that is held back."""
    best: int = library.threetowers_sweep_isa()
    return min(best, ISA_OF_TORCH.get(torch.backends.cpu.get_cpu_capability(), best))


def _excluded(tile: Tile) -> tuple[int, int | None, int | None]:
    return tile.diagonal, _address(tile.row_labels_r), _address(tile.col_labels_c)


def _limits(tile: Tile) -> tuple[int | None, int | None]:
    return _address(tile.row_limits_r), _address(tile.col_limits_c)


def _all(student: StudentTile) -> list[Tile]:
    return [student.tile, *(teacher.tile for teacher in student.teachers)]


def _statistics(side: SoftmaxStatistics) -> "ctypes.Array[ctypes.c_void_p]":
    """Return sweep.cpp's array of ``Statistics``: the student has no cross sums."""
    vectors = [side.student.max_n, side.student.sum_n, None]
    for teacher in side.teachers:
        vectors += [teacher.max_n, teacher.sum_n, teacher.cross_n]
    return _addresses(vectors)


def _floats(values: Sequence[float]) -> "ctypes.Array[ctypes.c_float]":
    return (ctypes.c_float * len(values))(*values)


def _addresses(vectors: Sequence[Tensor | None]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(vectors))(*map(_address, vectors))


def _address(vector: Tensor | None) -> int | None:
    """Return where a contiguous tensor lies in memory; None, a null pointer, for None."""
    if vector is None:
        return None
    if not vector.is_contiguous():
        raise ValueError(f"a vector of a tile has strides {vector.stride()}; expected a contiguous one")
    return vector.data_ptr()
