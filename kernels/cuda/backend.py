"""The two CUDA back ends of kernels/tiles.py: tensor cores for bf16 and fp16 features, library GEMMs for the rest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from threetowers.kernels.cuda.arguments import Argument, In, Out
from threetowers.kernels.cuda.launch import (
    BAND,
    CHUNK,
    Launch,
    Launcher,
    block_launch,
    blocks,
    check_operands,
    clipped_diagonal,
    columns_launch,
    pairs_launch,
    rows_launch,
)
from threetowers.kernels.tiles import LOG2E, LibraryTiles, Running, SigmoidSums, Tile, Weights

GAIN = {torch.bfloat16: 1.0, torch.float16: 2.0**14}  # gradient tiles hold this multiple: kGain in tensor_core.h


class TensorCoreTiles:
    """bf16 or fp16 features on sm_80 and later: dots never leave the chip unless they are to be kept.

    Statistics and weights are float32; gradient tiles have the features' dtype and go to library GEMMs that accumulate
    in float32. The features' width is padded to a multiple of 8.
    """

    rows = cols = 4096  # a gradient tile of 32 MiB: fits the cache of an A100 or H100
    dtype = torch.float32
    kept_dtype = torch.float32

    def __init__(self, launcher: Launcher, element: torch.dtype) -> None:
        self._launcher, self._element = launcher, element
        self._scratch_n = torch.empty(0, dtype=element)

    def kernels(self) -> list[Launch]:
        """One launch of every kernel in use, to be prepared."""
        limits = self._launcher.limits
        block_kernels = ("stats", "softmax_gradient", "sigmoid")
        return [
            *(block_launch(kernel, self._element, 1, 1, limits) for kernel in block_kernels),
            pairs_launch("dense_softmax_gradient", self._element, 1, 1, limits),
            columns_launch("merge", 1, 1, limits),
        ]

    def features(self, z_nD: Tensor) -> Tensor:
        """Rows as the kernels read them: padded to whole chunks, contiguous, aligned to 16 bytes."""
        z_nD, missing = z_nD.to(self._element), -z_nD.shape[1] % CHUNK
        if missing or z_nD.data_ptr() % 16:
            return pad(z_nD, (0, missing))  # a copy in any case
        return z_nD.contiguous()

    def stats(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, rows: Running, cols: Running, keep_rc: Tensor | None
    ) -> None:
        launch = self._launch("stats", x_rD, y_cD)
        row_parts, col_parts = _parts(launch, x_rD, y_cD, 2)
        operands = _operands(x_rD, y_cD)
        self._launcher.run(launch, (*operands, _tile(tile, x_rD, y_cD), Out(row_parts), Out(col_parts), Out(keep_rc)))
        merge_parts(self._launcher, row_parts, rows)
        merge_parts(self._launcher, col_parts, cols)

    def softmax_grad(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, rows: Weights, cols: Weights, kept_rc: Tensor | None
    ) -> Tensor:
        gradient = self._gradient(x_rD, y_cD)
        weights = _weights(rows), _weights(cols)
        if kept_rc is None:
            launch, dots = self._launch("softmax_gradient", x_rD, y_cD), _operands(x_rD, y_cD)
            self._launcher.run(launch, (*dots, _tile(tile, x_rD, y_cD), *weights, (Out(gradient), gradient.stride(0))))
        else:
            launch = pairs_launch("dense_softmax_gradient", self._element, len(x_rD), len(y_cD), self._launcher.limits)
            _run_softmax_gradient(self._launcher, launch, kept_rc, _tile(tile, x_rD, y_cD), weights, gradient)
        return gradient[:, : len(y_cD)]

    def sigmoid(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, sums: SigmoidSums | None, weights_r: Tensor | None
    ) -> Tensor | None:
        launch = self._launch("sigmoid", x_rD, y_cD)
        row_parts, _ = _parts(launch, x_rD, y_cD, 3)
        _, col_max = _parts(launch, x_rD, y_cD, 1)
        gradient = None if weights_r is None else self._gradient(x_rD, y_cD)
        target = (Out(gradient), 0 if gradient is None else gradient.stride(0))
        arguments = (
            *_operands(x_rD, y_cD),
            _tile(tile, x_rD, y_cD),
            In(weights_r),
            target,
            Out(row_parts),
            Out(col_max),
        )
        self._launcher.run(launch, arguments)
        if sums is not None:
            sums.loss_r.add_(row_parts[..., 0].sum(0))
            sums.prob_r.add_(row_parts[..., 1].sum(0))
            torch.maximum(sums.row_max_r, row_parts[..., 2].amax(0), out=sums.row_max_r)
            torch.maximum(sums.col_max_c, col_max[..., 0].amax(0), out=sums.col_max_c)
        return None if gradient is None else gradient[:, : len(y_cD)]

    def add_rows(self, dx_rD: Tensor, grad_rc: Tensor, y_cD: Tensor) -> None:
        self._add_product(dx_rD, grad_rc, y_cD[:, : dx_rD.shape[1]])

    def add_cols(self, dy_cD: Tensor, grad_rc: Tensor, x_rD: Tensor) -> None:
        self._add_product(dy_cD, grad_rc.T, x_rD[:, : dy_cD.shape[1]])

    def _add_product(self, sum_nD: Tensor, grad_nk: Tensor, z_kD: Tensor) -> None:
        alpha = 1 / GAIN[self._element]
        torch.addmm(sum_nD, grad_nk, z_kD, alpha=alpha, out_dtype=torch.float32, out=sum_nD)

    def _launch(self, kernel: str, x_rD: Tensor, y_cD: Tensor) -> Launch:
        check_operands(x_rD, y_cD)
        return block_launch(kernel, self._element, len(x_rD), len(y_cD), self._launcher.limits)

    def _gradient(self, x_rD: Tensor, y_cD: Tensor) -> Tensor:
        """(r, c rounded up to whole chunks), the same memory at every call."""
        rows, stride = len(x_rD), blocks(len(y_cD), CHUNK) * CHUNK
        if self._scratch_n.numel() < rows * stride:
            self._scratch_n = x_rD.new_empty(rows * stride)
        return self._scratch_n[: rows * stride].view(rows, stride)


class DenseTiles(LibraryTiles):
    """Any CUDA device, float32: a library GEMM leaves a tile's dots in memory, simple kernels read them.

    The stand-in where `TensorCoreTiles` cannot serve, and what it is compared with.
    """

    def __init__(self, launcher: Launcher) -> None:
        super().__init__(torch.float32, rows=4096, cols=4096)
        self._launcher = launcher

    def kernels(self) -> list[Launch]:
        """One launch of every kernel in use, to be prepared."""
        limits = self._launcher.limits
        return [
            rows_launch("dense_row_stats", 1, limits),
            rows_launch("dense_sigmoid", 1, limits),
            columns_launch("dense_column_stats", 1, 1, limits),
            columns_launch("merge", 1, 1, limits),
            pairs_launch("dense_softmax_gradient", self.dtype, 1, 1, limits),
        ]

    def stats(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, rows: Running, cols: Running, keep_rc: Tensor | None
    ) -> None:
        dots_rc, place = self.dots(x_rD, y_cD, keep_rc), _tile(tile, x_rD, y_cD)
        launch = rows_launch("dense_row_stats", len(x_rD), self._launcher.limits)
        self._launcher.run(launch, (In(dots_rc), place, Out(rows.max_n), Out(rows.sum_n)))
        merge_parts(self._launcher, self._column_parts(dots_rc, place), cols)

    def softmax_grad(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, rows: Weights, cols: Weights, kept_rc: Tensor | None
    ) -> Tensor:
        dots_rc = self.dots(x_rD, y_cD) if kept_rc is None else kept_rc
        grad_rc = torch.empty_like(dots_rc)
        launch = pairs_launch("dense_softmax_gradient", self.dtype, len(x_rD), len(y_cD), self._launcher.limits)
        weights = _weights(rows), _weights(cols)
        _run_softmax_gradient(self._launcher, launch, dots_rc, _tile(tile, x_rD, y_cD), weights, grad_rc)
        return grad_rc

    def sigmoid(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, sums: SigmoidSums | None, weights_r: Tensor | None
    ) -> Tensor | None:
        dots_rc, place = self.dots(x_rD, y_cD), _tile(tile, x_rD, y_cD)
        grad_rc = None if weights_r is None else torch.empty_like(dots_rc)
        row_sums = (None,) * 3 if sums is None else (sums.loss_r, sums.prob_r, sums.row_max_r)
        launch = rows_launch("dense_sigmoid", len(x_rD), self._launcher.limits)
        self._launcher.run(launch, (In(dots_rc), place, In(weights_r), Out(grad_rc), *map(Out, row_sums)))
        if sums is not None:
            torch.maximum(sums.col_max_c, self._column_parts(dots_rc, place)[..., 0].amax(0), out=sums.col_max_c)
        return grad_rc

    def _column_parts(self, dots_rc: Tensor, place: Argument) -> Tensor:
        rows, cols = dots_rc.shape
        launch = columns_launch("dense_column_stats", cols, blocks(rows, BAND), self._launcher.limits)
        parts = dots_rc.new_empty(launch.grid[1], cols, 2)
        self._launcher.run(launch, (In(dots_rc), place, Out(parts)))
        return parts


def merge_parts(launcher: Launcher, parts_pn2: Tensor, running: Running) -> None:
    """Fold p parts (max, sum) of every position into the running pair, in order, in place."""
    count, length, _ = parts_pn2.shape
    launch = columns_launch("merge", length, 1, launcher.limits)
    launcher.run(launch, (In(parts_pn2), count, length, Out(running.max_n), Out(running.sum_n)))


def _run_softmax_gradient(
    launcher: Launcher, launch: Launch, dots_rc: Tensor, place: Argument, weights: tuple[Argument, Argument], to: Tensor
) -> None:
    launcher.run(launch, (In(dots_rc), place, *weights, Out(to), to.stride(0)))


def _parts(launch: Launch, x_rD: Tensor, y_cD: Tensor, numbers: int) -> tuple[Tensor, Tensor]:
    """Room for what every block says of its rows (blocks across, r, numbers) and columns (blocks down, c, numbers)."""
    across, down = launch.grid
    row_parts = x_rD.new_empty(across, len(x_rD), numbers, dtype=torch.float32)
    return row_parts, x_rD.new_empty(down, len(y_cD), numbers, dtype=torch.float32)


# The C++ structs of the same names.


def _operands(x_rD: Tensor, y_cD: Tensor) -> tuple[Argument]:
    return ((In(x_rD), In(y_cD), x_rD.shape[1]),)


def _tile(tile: Tile, x_rD: Tensor, y_cD: Tensor) -> Argument:
    rows, cols = len(x_rD), len(y_cD)
    diagonal = clipped_diagonal(tile.diagonal, rows, cols)
    labels = In(tile.row_labels_r), In(tile.col_labels_c)
    return (*labels, rows, cols, diagonal, tile.scale * LOG2E, tile.bias * LOG2E)


def _weights(weights: Weights) -> Argument:
    return (In(weights.shift_n), In(weights.factor_n), len(weights.shift_n))
