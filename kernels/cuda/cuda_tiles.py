"""Tiles on CUDA devices: tensor cores for bf16 and fp16 features, library GEMMs for the rest."""

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from threetowers.kernels.cuda.arguments import Argument, In, Out
from threetowers.kernels.cuda.block_shape import (
    LIBRARY,
    SWEEP,
    WIDE,
    WIDE_BLOCK,
    BlockShape,
    block_launch,
    default_tiles,
    narrow_block,
)
from threetowers.kernels.cuda.distillation import DistillationKernels, DistillingTiles
from threetowers.kernels.cuda.launch import (
    BAND,
    CHUNK,
    Launch,
    Launcher,
    blocks_over,
    check_operands,
    check_torch,
    columns_launch,
    pairs_launch,
    rows_launch,
)
from threetowers.kernels.cuda.merging import add_sigmoid_parts, merge_parts
from threetowers.kernels.cuda.structs import dots_struct, gradient_struct, tile_struct, weights_struct
from threetowers.kernels.tiles.statistics import OnlineLogSumExp, SigmoidSums, SoftmaxWeights
from threetowers.kernels.tiles.tile_backend import StudentTile, Tile
from threetowers.kernels.tiles.torch_tiles import LibraryTiles

GAIN = {torch.bfloat16: 1.0, torch.float16: 2.0**14}  # gradient tiles hold this multiple: kGain in tensor_core.h


Dots = tuple[BlockShape, Argument]
"""Where the kernels find a tile's dots: the blocks that they are compiled for, and their first argument, `Operands`."""


class TensorCoreTiles(DistillingTiles):
    """Tiles of bf16 or fp16 features on sm_80 and later: dots leave the chip only for the logit cache.

    Statistics and weights are float32; gradient tiles have the features' dtype and go to library GEMMs that accumulate
    in float32. The features' width is padded to a multiple of 8.
    """

    rows = cols = 4096  # a gradient tile of 32 MiB: fits the cache of an A100 or H100
    dtype = torch.float32
    cache_dtype = torch.float32

    @property
    @override
    def stats_rows(self) -> int:
        return 32768  # one launch leaves parts of 32 MiB

    @property
    @override
    def stats_cols(self) -> int:
        return 8192  # their features fit the cache: 12 MiB at a width of 768

    def __init__(self, launcher: Launcher, element: torch.dtype, shape: BlockShape) -> None:
        check_torch(torch.__version__)
        self._launcher = launcher.bind()
        self._element = element
        self._shape = shape
        self._scratch_n = torch.empty(0, dtype=element)
        self._products_n = torch.empty(0)
        self._distillation = DistillationKernels(self._launcher, element)

    def kernels(self) -> list[Launch]:
        """Return one launch of every kernel in use, to be prepared."""
        limits = self._launcher.limits
        variants = [(kernel, self._shape) for kernel in ("stats", "softmax_gradient", "sigmoid")]
        variants.append(("softmax_gradient", SWEEP))  # from the logit cache
        blocks = [block_launch(kernel, self._element, 1, 1, shape, limits) for kernel, shape in variants]
        return [*blocks, columns_launch("merge", 1, 1, limits), *self._distillation.kernels()]

    def features(self, z_nD: Tensor) -> Tensor:
        """Return rows as the kernels read them: padded to whole chunks, contiguous, aligned to 16 bytes."""
        z_nD = z_nD.to(self._element)
        missing = -z_nD.shape[1] % CHUNK
        if missing or z_nD.data_ptr() % 16:
            z_nD = pad(z_nD, (0, missing))  # a copy, also where nothing is missing
        return z_nD.contiguous()

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
        self._merge_stats(self._dots(x_rD, y_cD), tile, rows, cols, cache_rc)

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
        sizes = len(x_rD), len(y_cD)
        dots = self._dots(x_rD, y_cD) if cache_rc is None else (SWEEP, dots_struct(cache_rc))
        gradient = self._gradient(x_rD, y_cD)
        self._run(
            "softmax_gradient", dots, sizes, tile, weights_struct(rows), weights_struct(cols), gradient_struct(gradient)
        )
        return gradient[:, : len(y_cD)]

    @override
    def sigmoid(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, sums: SigmoidSums, weights_r: Tensor | None
    ) -> Tensor | None:
        sizes = len(x_rD), len(y_cD)
        row_parts, col_max = self._parts(sizes, (3, 1), x_rD.device)
        gradient = None if weights_r is None else self._gradient(x_rD, y_cD)
        outputs = gradient_struct(gradient), Out(row_parts), Out(col_max)
        self._run("sigmoid", self._dots(x_rD, y_cD), sizes, tile, In(weights_r), *outputs)
        add_sigmoid_parts(sums, row_parts, col_max[..., 0])
        return None if gradient is None else gradient[:, : len(y_cD)]

    @override
    def add_rows(self, dx_rD: Tensor, grad_rc: Tensor, y_cD: Tensor) -> None:
        self._add_product(dx_rD, grad_rc, y_cD[:, : dx_rD.shape[1]])

    @override
    def add_cols(self, dy_cD: Tensor, grad_rc: Tensor, x_rD: Tensor) -> None:
        self._add_product(dy_cD, grad_rc.T, x_rD[:, : dy_cD.shape[1]])

    def _add_product(self, sum_nD: Tensor, grad_nk: Tensor, z_kD: Tensor) -> None:
        alpha = 1 / GAIN[self._element]
        torch.addmm(sum_nD, grad_nk, z_kD, alpha=alpha, out_dtype=torch.float32, out=sum_nD)

    @override
    def all_dots(self, student: StudentTile, out_Krc: Tensor | None = None) -> Tensor:
        x_rD, y_cD, teachers = student.x_rD, student.y_cD, student.teachers
        dots_Krc = self._product_tiles(1 + len(teachers), x_rD, y_cD) if out_Krc is None else out_Krc
        self._multiply(x_rD, y_cD, dots_Krc[0])
        for teacher, dots_rc in zip(teachers, dots_Krc[1:], strict=True):
            self._multiply(teacher.u_rE, teacher.v_cE, dots_rc)
        return dots_Krc

    def _product_tiles(self, count: int, x_rD: Tensor, y_cD: Tensor) -> Tensor:
        """Return (count, r, c) for products in float32, the same memory at every call."""
        size = count * len(x_rD) * len(y_cD)
        if self._products_n.numel() < size:
            self._products_n = x_rD.new_empty(size, dtype=torch.float32)
        return self._products_n[:size].view(count, len(x_rD), len(y_cD))

    @staticmethod
    def _multiply(x_rD: Tensor, y_cD: Tensor, out_rc: Tensor) -> None:
        torch.mm(x_rD, y_cD.T, out_dtype=torch.float32, out=out_rc)

    def _dots(self, x_rD: Tensor, y_cD: Tensor) -> Dots:
        check_operands(x_rD, y_cD)
        return self._shape, (In(x_rD), In(y_cD), x_rD.shape[1])

    def _merge_stats(
        self, dots: Dots, tile: Tile, rows: OnlineLogSumExp, cols: OnlineLogSumExp, cache_rc: Tensor | None
    ) -> None:
        sizes = len(rows.max_n), len(cols.max_n)
        row_parts, col_parts = self._parts(sizes, (2, 2), rows.max_n.device)
        self._run("stats", dots, sizes, tile, Out(row_parts), Out(col_parts), Out(cache_rc))
        merge_parts(self._launcher, row_parts, rows)
        merge_parts(self._launcher, col_parts, cols)

    def _run(self, kernel: str, dots: Dots, sizes: tuple[int, int], tile: Tile, *arguments: Argument) -> None:
        shape, operands = dots
        dot_limits = tile.row_limits_r is not None
        launch = block_launch(kernel, self._element, *sizes, shape, self._launcher.limits, dot_limits)
        self._launcher.run(launch, (operands, tile_struct(tile, *sizes), *arguments))

    def _parts(self, sizes: tuple[int, int], numbers: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return memory for so many numbers for each row and each column, from every block that has it."""
        rows, cols = sizes
        row_parts = torch.empty(self._shape.across(cols), rows, numbers[0], device=device)
        return row_parts, torch.empty(self._shape.down(rows), cols, numbers[1], device=device)

    def _gradient(self, x_rD: Tensor, y_cD: Tensor) -> Tensor:
        """Return (r, c rounded up to whole chunks), the same memory at every call."""
        rows = len(x_rD)
        stride = blocks_over(len(y_cD), CHUNK) * CHUNK
        if self._scratch_n.numel() < rows * stride:
            self._scratch_n = x_rD.new_empty(rows * stride)
        return self._scratch_n[: rows * stride].view(rows, stride)


class LibraryDotsTiles(TensorCoreTiles):
    """As `TensorCoreTiles`, but a library GEMM leaves a tile's dots in memory, in float32, and the kernels read them.

    For devices whose fastest products are out of the kernels' reach: Hopper's warpgroup instructions, and later ones.
    """

    rows, cols = 4096, 2048  # 32 MiB of dots: what the kernels read has not left the cache of an H100

    def __init__(self, launcher: Launcher, element: torch.dtype) -> None:
        super().__init__(launcher, element, SWEEP)

    @property
    @override
    def stats_rows(self) -> int:
        return self.rows

    @property
    @override
    def stats_cols(self) -> int:
        return self.cols

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
        dots = self._dots(x_rD, y_cD) if cache_rc is None else self._products(x_rD, y_cD, cache_rc)
        self._merge_stats(dots, tile, rows, cols, None)

    @override
    def _dots(self, x_rD: Tensor, y_cD: Tensor) -> Dots:
        return self._products(x_rD, y_cD, self._product_tiles(1, x_rD, y_cD)[0])

    def _products(self, x_rD: Tensor, y_cD: Tensor, out_rc: Tensor) -> Dots:
        self._multiply(x_rD, y_cD, out_rc)
        return SWEEP, dots_struct(out_rc)


def tensor_core_tiles(launcher: Launcher, element: torch.dtype, tiles: str | None) -> TensorCoreTiles:
    """Return tiles by their name in `block_shape`, or those that should suit the device."""
    tiles = default_tiles(launcher.limits) if tiles is None else tiles
    if tiles == LIBRARY:
        return LibraryDotsTiles(launcher, element)
    return TensorCoreTiles(launcher, element, WIDE_BLOCK if tiles == WIDE else narrow_block(launcher.limits))


class DenseTiles(DistillingTiles, LibraryTiles):
    """Tiles on any CUDA device, in float32: a library GEMM leaves a tile's dots in memory, simple kernels read them.

    Replaces `TensorCoreTiles` where they cannot serve, and is what they are compared with.
    """

    def __init__(self, launcher: Launcher) -> None:
        super().__init__(torch.float32, rows=4096, cols=4096)
        self._launcher = launcher.bind()
        self._distillation = DistillationKernels(self._launcher, self.dtype)

    all_dots = LibraryTiles.all_dots

    def kernels(self) -> list[Launch]:
        """Return one launch of every kernel in use, to be prepared."""
        limits = self._launcher.limits
        return [
            rows_launch("dense_row_stats", 1, limits),
            rows_launch("dense_sigmoid", 1, limits),
            columns_launch("dense_column_stats", 1, 1, limits),
            columns_launch("merge", 1, 1, limits),
            pairs_launch("dense_softmax_gradient", 1, 1, limits),
            *self._distillation.kernels(),
        ]

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
        dots_rc = self.dots(x_rD, y_cD, cache_rc)
        self._run_rows("dense_row_stats", dots_rc, tile, Out(rows.max_n), Out(rows.sum_n))
        merge_parts(self._launcher, self._column_parts(dots_rc, tile), cols)

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
        dots_rc = self.dots(x_rD, y_cD) if cache_rc is None else cache_rc
        grad_rc = torch.empty_like(dots_rc)
        launch = pairs_launch("dense_softmax_gradient", len(x_rD), len(y_cD), self._launcher.limits)
        place = tile_struct(tile, len(x_rD), len(y_cD))
        self._launcher.run(launch, (In(dots_rc), place, weights_struct(rows), weights_struct(cols), Out(grad_rc)))
        return grad_rc

    @override
    def sigmoid(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, sums: SigmoidSums, weights_r: Tensor | None
    ) -> Tensor | None:
        dots_rc = self.dots(x_rD, y_cD)
        grad_rc = None if weights_r is None else torch.empty_like(dots_rc)
        row_sums = Out(sums.loss_r), Out(sums.prob_r), Out(sums.row_max_r)
        self._run_rows("dense_sigmoid", dots_rc, tile, In(weights_r), Out(grad_rc), *row_sums)
        torch.maximum(sums.col_max_c, self._column_parts(dots_rc, tile)[..., 0].amax(0), out=sums.col_max_c)
        return grad_rc

    def _run_rows(self, kernel: str, dots_rc: Tensor, tile: Tile, *arguments: Argument) -> None:
        launch = rows_launch(kernel, len(dots_rc), self._launcher.limits)
        self._launcher.run(launch, (In(dots_rc), tile_struct(tile, *dots_rc.shape), *arguments))

    def _column_parts(self, dots_rc: Tensor, tile: Tile) -> Tensor:
        """Return (bands of rows, c, 2): every column's maximum and sum over a band."""
        rows, cols = dots_rc.shape
        launch = columns_launch("dense_column_stats", cols, blocks_over(rows, BAND), self._launcher.limits)
        parts = dots_rc.new_empty(launch.grid[1], cols, 2)
        self._launcher.run(launch, (In(dots_rc), tile_struct(tile, rows, cols), Out(parts)))
        return parts
