"""The kernels of distillation, which all CUDA back ends share: sweeps over the dots of a student and of its teachers.

Registers do not hold the products of a student and of K teachers at once. Their dots therefore lie in memory, as
library GEMMs leave them, (1 + K, r, c) in float32 with the student first, and each kernel reads each of them once. The
number of teachers is compiled in.
"""

import functools
from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from threetowers.kernels.cuda.arguments import In, Out, Scalar
from threetowers.kernels.cuda.block_shape import ELEMENT_DEFINES
from threetowers.kernels.cuda.launch import (
    CHUNK,
    KEPT_LAUNCHES,
    Launch,
    Limits,
    StreamLauncher,
    blocks_over,
    checked,
    columns_launch,
)
from threetowers.kernels.cuda.merging import add_sigmoid_parts, merge_expectations, merge_parts
from threetowers.kernels.cuda.structs import dots_struct, gradient_struct, tile_struct, weights_struct
from threetowers.kernels.tiles.statistics import PairWeights, SigmoidSums, SoftmaxStatistics
from threetowers.kernels.tiles.tile_backend import StudentTile, TeacherTile, TileBackend

BLOCK = 64  # rows and columns of a block: a thread holds 16 logits of the student, and as many of a teacher
SHARED_BYTES = (4 + 2) * BLOCK * 12  # the warps' parts of rows and of columns, of 12 bytes at most
GRADIENT_DEFINES = {**ELEMENT_DEFINES, torch.float32: ("FP32",)}


class DistillationKernels:
    """What sweeps over the dots in memory. Gradient tiles have the dtype `element`, and stay in the same memory."""

    def __init__(self, launcher: StreamLauncher, element: torch.dtype) -> None:
        self._launcher = launcher
        self._defines = GRADIENT_DEFINES[element]
        self._gradient_n = torch.empty(0, dtype=element)

    def kernels(self) -> list[Launch]:
        """Return one launch of every kernel in use, to be prepared; of those for one teacher."""
        limits = self._launcher.limits
        sweeps = [
            sweep_launch(kernel, self._defines, 1, 1, 1, limits) for kernel in ("distill_gradient", "distill_sigmoid")
        ]
        stats = sweep_launch("distill_stats", (), 1, 1, 1, limits)
        return [stats, *sweeps, columns_launch("merge_expectations", 1, 1, limits)]

    def stats(self, dots_Krc: Tensor, student: StudentTile, rows: SoftmaxStatistics, cols: SoftmaxStatistics) -> None:
        """Do what `TileBackend.distill_stats` does, of these dots."""
        teacher_count, (r, c) = len(student.teachers), dots_Krc.shape[1:]
        across, down = blocks_over(c, BLOCK), blocks_over(r, BLOCK)
        row_parts, col_parts = dots_Krc.new_empty(across, r, 2), dots_Krc.new_empty(down, c, 2)
        teacher_row_parts = dots_Krc.new_empty(teacher_count, across, r, 3)
        teacher_col_parts = dots_Krc.new_empty(teacher_count, down, c, 3)
        structs: list[Scalar] = []
        for k, teacher in enumerate(student.teachers):
            structs += [*_logits(dots_Krc, k, teacher), Out(teacher_row_parts[k]), Out(teacher_col_parts[k])]

        own = dots_struct(dots_Krc[0]), tile_struct(student.tile, r, c)
        launch = sweep_launch("distill_stats", (), r, c, teacher_count, self._launcher.limits)
        self._launcher.run(launch, (*own, Out(row_parts), Out(col_parts), tuple(structs)))
        merge_parts(self._launcher, row_parts, rows.student)
        merge_parts(self._launcher, col_parts, cols.student)
        for k in range(teacher_count):
            merge_expectations(self._launcher, teacher_row_parts[k], rows.teachers[k])
            merge_expectations(self._launcher, teacher_col_parts[k], cols.teachers[k])

    def gradient(self, dots_Krc: Tensor, student: StudentTile, rows: PairWeights, cols: PairWeights) -> Tensor:
        """Do what `TileBackend.distill_grad` does, of these dots."""
        r, c = dots_Krc.shape[1:]
        structs: list[Scalar] = []
        for k, (teacher, *sides) in enumerate(zip(student.teachers, rows.teachers, cols.teachers, strict=True)):
            structs += _logits(dots_Krc, k, teacher)
            structs += [In(part_n) for side in sides for part_n in (side.shift_n, side.factor_n)]

        gradient = self._gradient(dots_Krc)
        weights = weights_struct(rows.student), weights_struct(cols.student)
        own = dots_struct(dots_Krc[0]), tile_struct(student.tile, r, c), *weights
        launch = sweep_launch("distill_gradient", self._defines, r, c, len(student.teachers), self._launcher.limits)
        self._launcher.run(launch, (*own, tuple(structs), gradient_struct(gradient)))
        return gradient[:, :c]

    def sigmoid(
        self, dots_Krc: Tensor, student: StudentTile, sums: SigmoidSums, weights_r: Tensor | None
    ) -> Tensor | None:
        """Do what `TileBackend.distill_sigmoid` does, of these dots."""
        r, c = dots_Krc.shape[1:]
        row_parts = dots_Krc.new_empty(blocks_over(c, BLOCK), r, 3)
        col_max = dots_Krc.new_empty(blocks_over(r, BLOCK), c)
        structs: list[Scalar] = []
        for k, teacher in enumerate(student.teachers):
            structs += [*_logits(dots_Krc, k, teacher), float(teacher.weight)]

        gradient = None if weights_r is None else self._gradient(dots_Krc)
        own = dots_struct(dots_Krc[0]), tile_struct(student.tile, r, c), In(weights_r)
        outputs = gradient_struct(gradient), Out(row_parts), Out(col_max)
        launch = sweep_launch("distill_sigmoid", self._defines, r, c, len(student.teachers), self._launcher.limits)
        self._launcher.run(launch, (*own, tuple(structs), *outputs))
        add_sigmoid_parts(sums, row_parts, col_max)
        return None if gradient is None else gradient[:, :c]

    def _gradient(self, dots_Krc: Tensor) -> Tensor:
        """Return (r, c rounded up to whole chunks), the same memory at every call."""
        rows, cols = dots_Krc.shape[1:]
        stride = blocks_over(cols, CHUNK) * CHUNK
        if self._gradient_n.numel() < rows * stride:
            self._gradient_n = dots_Krc.new_empty(rows * stride, dtype=self._gradient_n.dtype)
        return self._gradient_n[: rows * stride].view(rows, stride)


@functools.lru_cache(KEPT_LAUNCHES)
def sweep_launch(
    kernel: str, element_defines: tuple[str, ...], rows: int, columns: int, teachers: int, limits: Limits
) -> Launch:
    """Return the launch of a kernel of distillation over a tile: one block a piece."""
    defines = (*element_defines, f"ROWS={BLOCK}", f"COLUMNS={BLOCK}", "LIBRARY_DOTS", f"TEACHERS={teachers}")
    grid = blocks_over(columns, BLOCK), blocks_over(rows, BLOCK)
    return checked(Launch(kernel, defines, grid, SHARED_BYTES), limits)


def _logits(dots_Krc: Tensor, k: int, teacher: TeacherTile) -> list[Scalar]:
    """Return how the kernels find a teacher's logits: its dots, its logit map."""
    return [In(dots_Krc[1 + k]), In(teacher.tile.logit_map.base2_2)]


class DistillingTiles(TileBackend):
    """What a back end has of distillation: library GEMMs of its features, and the kernels that read them."""

    _distillation: DistillationKernels

    @abstractmethod
    def all_dots(self, student: StudentTile, out_Krc: Tensor | None = None) -> Tensor:
        """Return the student's dots and each teacher's, (1 + K, r, c), in out_Krc, or else in a scratch buffer."""

    @override
    def distill_stats(
        self, student: StudentTile, rows: SoftmaxStatistics, cols: SoftmaxStatistics, cache_Krc: Tensor | None
    ) -> None:
        self._distillation.stats(self.all_dots(student, cache_Krc), student, rows, cols)

    @override
    def distill_grad(
        self, student: StudentTile, rows: PairWeights, cols: PairWeights, cache_Krc: Tensor | None
    ) -> Tensor:
        dots_Krc = self.all_dots(student) if cache_Krc is None else cache_Krc
        return self._distillation.gradient(dots_Krc, student, rows, cols)

    @override
    def distill_sigmoid(self, student: StudentTile, sums: SigmoidSums, weights_r: Tensor | None) -> Tensor | None:
        return self._distillation.sigmoid(self.all_dots(student), student, sums, weights_r)
