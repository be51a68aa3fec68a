"""The chunk loop: own rows against one shard of columns, tile by tile, in memory linear in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from threetowers.kernels.tiles import Running, SigmoidSums, Tile, TileBackend, Weights


@dataclass(frozen=True, slots=True)
class TileBlock:
    """All own rows x_bD against the columns y_sD of one rank's shard, both at their place in the global batch."""

    x_bD: Tensor
    y_sD: Tensor
    row_start: int
    col_start: int
    scale: float
    bias: float
    labels_B: Tensor | None  # int32, of the global batch

    def tile(self, i: slice, j: slice) -> Tile:
        """The tile between these rows and columns of the block."""
        i0, j0 = self.row_start + i.start, self.col_start + j.start
        if self.labels_B is None:
            return Tile(self.scale, self.bias, i0 - j0)
        row_labels = self.labels_B[i0 : i0 + i.stop - i.start]
        return Tile(self.scale, self.bias, i0 - j0, row_labels, self.labels_B[j0 : j0 + j.stop - j.start])

    def columns(self, vector_B: Tensor) -> Tensor:
        """This shard's part of a vector over the global batch's columns."""
        return vector_B[self.col_start : self.col_start + len(self.y_sD)]


class KeptTiles:
    """Dots kept from the forward pass for the backward pass: the first tiles of a pair, as many as fit."""

    def __init__(self, flat_n: Tensor) -> None:
        self._flat_n = flat_n
        self._next = 0

    def take(self, rows: int, cols: int) -> Tensor | None:
        """Room for the next tile in order; None once the room is used up."""
        start, stop = self._next, self._next + rows * cols
        self._next = stop
        return self._flat_n[start:stop].view(rows, cols) if stop <= len(self._flat_n) else None

    @staticmethod
    def room(backend: TileBackend, rows: int, shards: list[int], budget_bytes: int) -> int:
        """Elements to allocate for the tiles of these shards in order, whole tiles only, within the budget."""
        limit, used = budget_bytes // backend.kept_dtype.itemsize, 0
        for cols in shards:
            for i in spans(rows, backend.rows):
                for j in spans(cols, backend.cols):
                    size = (i.stop - i.start) * (j.stop - j.start)
                    if used + size > limit:
                        return used
                    used += size
        return used


def spans(n: int, most: int) -> Iterator[slice]:
    """0..n in near-equal spans of at most ``most``, whole multiples of 64 where there is more than one."""
    if n == 0:
        return
    size = -(-n // -(-n // most))
    size = min(most, -(-size // 64) * 64)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def softmax_stats(backend: TileBackend, block: TileBlock, rows: Running, cols: Running, kept: KeptTiles) -> None:
    """Merge the block's statistics into rows (b,) and cols (B,): one unit."""
    for i in spans(len(block.x_bD), backend.rows):
        x_rD = backend.features(block.x_bD[i])
        for j in spans(len(block.y_sD), backend.cols):
            y_cD, start = backend.features(block.y_sD[j]), block.col_start
            keep_rc = kept.take(len(x_rD), len(y_cD))
            col_part = cols.part(start + j.start, start + j.stop)
            backend.stats(x_rD, y_cD, block.tile(i, j), rows.part(i.start, i.stop), col_part, keep_rc)


def softmax_grads(
    backend: TileBackend,
    block: TileBlock,
    rows: Weights,
    cols: Weights,
    kept: KeptTiles,
    dx_bD: Tensor | None,
    dy_sD: Tensor | None,
) -> None:
    """Add ``G @ y`` to dx and ``G.T @ x`` to dy where wanted, rows over b and cols over B: one unit and one each."""
    for i in spans(len(block.x_bD), backend.rows):
        x_rD = backend.features(block.x_bD[i])
        for j in spans(len(block.y_sD), backend.cols):
            y_cD, start = backend.features(block.y_sD[j]), block.col_start
            kept_rc = kept.take(len(x_rD), len(y_cD))
            col_part = cols.part(start + j.start, start + j.stop)
            grad_rc = backend.softmax_grad(x_rD, y_cD, block.tile(i, j), rows.part(i.start, i.stop), col_part, kept_rc)
            _add_products(backend, grad_rc, x_rD, y_cD, dx_bD, dy_sD, i, j)


def sigmoid_pass(
    backend: TileBackend,
    block: TileBlock,
    sums: SigmoidSums | None,
    weights_b: Tensor | None,
    dx_bD: Tensor | None,
    dy_sD: Tensor | None,
) -> None:
    """Merge into sums (rows b, columns B) where given, add gradient products where wanted: one unit and one each."""
    for i in spans(len(block.x_bD), backend.rows):
        x_rD = backend.features(block.x_bD[i])
        for j in spans(len(block.y_sD), backend.cols):
            y_cD = backend.features(block.y_sD[j])
            part = None
            if sums is not None:
                col_max_c = block.columns(sums.col_max_c)[j]
                part = SigmoidSums(sums.loss_r[i], sums.prob_r[i], sums.row_max_r[i], col_max_c)
            weights_r = None if weights_b is None else weights_b[i]
            grad_rc = backend.sigmoid(x_rD, y_cD, block.tile(i, j), part, weights_r)
            if grad_rc is not None:
                _add_products(backend, grad_rc, x_rD, y_cD, dx_bD, dy_sD, i, j)


def _add_products(
    backend: TileBackend,
    grad_rc: Tensor,
    x_rD: Tensor,
    y_cD: Tensor,
    dx_bD: Tensor | None,
    dy_sD: Tensor | None,
    i: slice,
    j: slice,
) -> None:
    if dx_bD is not None:
        backend.add_rows(dx_bD[i], grad_rc, y_cD)
    if dy_sD is not None:
        backend.add_cols(dy_sD[j], grad_rc, x_rD)


ROWS = 4096  # rows at once in the O(bD) loops below: bounds their temporaries


def positive_dots(x_bD: Tensor, y_bD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``<x_i, y_i>`` and ``|x_i| |y_i|``, both (b,).

    The dots are diagonals of small products, not sums of elementwise products: under a large offset common to all
    logits their rounding is then close to the negatives' rounding, and cancels.
    """
    dot_b, norms_b = (torch.empty(len(x_bD), dtype=dtype, device=x_bD.device) for _ in range(2))
    for i in spans(len(x_bD), ROWS):
        x_rD, y_rD = x_bD[i].to(dtype), y_bD[i].to(dtype)
        norms_b[i] = torch.linalg.vector_norm(x_rD, dim=1) * torch.linalg.vector_norm(y_rD, dim=1)
        whole = len(x_rD) // 64 * 64
        x_n64D, y_n64D = (part[:whole].reshape(-1, 64, part.shape[1]) for part in (x_rD, y_rD))
        blocks_n64 = torch.bmm(x_n64D, y_n64D.mT).diagonal(dim1=1, dim2=2)
        rest_r = (x_rD[whole:] @ y_rD[whole:].T).diagonal()
        dot_b[i] = torch.cat([blocks_n64.flatten(), rest_r])
    return dot_b, norms_b


def finish_gradient(grad_bD: Tensor, other_bD: Tensor, pull_b: Tensor, scale: Tensor) -> None:
    """In place: ``grad = scale * (grad - pull * other)``, which adds the positives' part. scale: 0-d."""
    for i in spans(len(grad_bD), ROWS):
        grad_bD[i].addcmul_(other_bD[i].to(grad_bD.dtype), pull_b[i, None], value=-1).mul_(scale)


def inner_product(x_bD: Tensor, dx_bD: Tensor) -> Tensor:
    """``Σ_i <x_i, dx_i>``, rows summed in float64: the gradient with respect to log_scale."""
    total = torch.zeros((), dtype=torch.float64, device=dx_bD.device)
    for i in spans(len(x_bD), ROWS):
        total += (x_bD[i].to(dx_bD.dtype) * dx_bD[i]).sum(1).sum(dtype=torch.float64)
    return total
