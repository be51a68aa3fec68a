"""Arguments that several kernels take: the C++ structs of the same names, by their parts."""

from torch import Tensor

from threetowers.kernels.cuda.arguments import Argument, In, Out
from threetowers.kernels.cuda.launch import clipped_diagonal
from threetowers.kernels.tiles.statistics import SoftmaxWeights
from threetowers.kernels.tiles.tile_backend import Tile


def tile_struct(tile: Tile, rows: int, cols: int) -> Argument:
    """Return `Tile`, of this size."""
    excluded = In(tile.row_labels_r), In(tile.col_labels_c), In(tile.row_limits_r), In(tile.col_limits_c)
    return (*excluded, In(tile.logit_map.base2_2), rows, cols, clipped_diagonal(tile.diagonal, rows, cols))


def weights_struct(weights: SoftmaxWeights) -> Argument:
    """Return `Weights`."""
    return (In(weights.shift_n), In(weights.factor_n), len(weights.shift_n))


def gradient_struct(gradient: Tensor | None) -> Argument:
    """Return `Gradient` or `DirectGradient`: (r, stride), or absent."""
    return (Out(gradient), 0 if gradient is None else gradient.stride(0))


def dots_struct(dots_rc: Tensor) -> Argument:
    """Return `Operands` of dots in memory; `aligned` tells whether the kernels may read 16 bytes at once."""
    return (In(dots_rc), int(dots_rc.data_ptr() % 16 == 0 and dots_rc.shape[1] % 4 == 0))
