"""Tiles in plain torch, and what all back ends share that multiply with library GEMMs."""

import torch
from torch import Tensor
from typing_extensions import override

from threetowers.kernels.tiles.softplus import soft_cross_entropy, softplus
from threetowers.kernels.tiles.statistics import (
    OnlineLogSumExp,
    PairWeights,
    SigmoidSums,
    SoftmaxStatistics,
    SoftmaxWeights,
)
from threetowers.kernels.tiles.tile_backend import LOG2E, StudentTile, Tile, TileBackend


class LibraryTiles(TileBackend):
    """Base of back ends that multiply with library GEMMs: dots into a scratch buffer, gradients accumulated."""

    def __init__(self, dtype: torch.dtype, rows: int = 2048, cols: int = 2048) -> None:
        self.rows = rows
        self.cols = cols
        self.dtype = self.cache_dtype = dtype
        self._scratch_n = torch.empty(0, dtype=dtype)

    @override
    def features(self, z_nD: Tensor) -> Tensor:
        return z_nD.to(self.dtype)

    def scratch(self, x_rD: Tensor, y_cD: Tensor) -> Tensor:
        """Return an (r, c) buffer, the same memory at every call."""
        return self.scratch_tiles(1, x_rD, y_cD)[0]

    def scratch_tiles(self, count: int, x_rD: Tensor, y_cD: Tensor) -> Tensor:
        """Return a (count, r, c) buffer, the same memory at every call."""
        size = count * len(x_rD) * len(y_cD)
        if self._scratch_n.numel() < size:
            self._scratch_n = x_rD.new_empty(size)
        return self._scratch_n[:size].view(count, len(x_rD), len(y_cD))

    def dots(self, x_rD: Tensor, y_cD: Tensor, out_rc: Tensor | None = None) -> Tensor:
        """Return ``x @ y.T`` in out_rc, or else in the scratch buffer."""
        return torch.mm(x_rD, y_cD.T, out=self.scratch(x_rD, y_cD) if out_rc is None else out_rc)

    def all_dots(self, student: StudentTile, out_Krc: Tensor | None = None) -> Tensor:
        """Return the student's dots and each teacher's, (1 + K, r, c), in out_Krc, or else in the scratch buffer."""
        x_rD, y_cD, teachers = student.x_rD, student.y_cD, student.teachers
        dots_Krc = self.scratch_tiles(1 + len(teachers), x_rD, y_cD) if out_Krc is None else out_Krc
        torch.mm(x_rD, y_cD.T, out=dots_Krc[0])
        for teacher, dots_rc in zip(teachers, dots_Krc[1:], strict=True):
            torch.mm(teacher.u_rE, teacher.v_cE.T, out=dots_rc)
        return dots_Krc

    @override
    def add_rows(self, dx_rD: Tensor, grad_rc: Tensor, y_cD: Tensor) -> None:
        dx_rD.addmm_(grad_rc, y_cD)

    @override
    def add_cols(self, dy_cD: Tensor, grad_rc: Tensor, x_rD: Tensor) -> None:
        dy_cD.addmm_(grad_rc.T, x_rD)

    @override
    def distill_stats(
        self, student: StudentTile, rows: SoftmaxStatistics, cols: SoftmaxStatistics, cache_Krc: Tensor | None
    ) -> None:
        dots_Krc = self.all_dots(student, cache_Krc)
        _merge_log_sums(dots_Krc[0], student.tile, rows.student, cols.student)
        for k, teacher in enumerate(student.teachers):
            t_rc = _logits(dots_Krc[1 + k], teacher.tile, teacher.tile.logit_map.base2_2[0])
            for expectation, dim in ((rows.teachers[k], 1), (cols.teachers[k], 0)):
                power_rc, max_n = _powers(t_rc, dim)
                expectation.merge(max_n, power_rc.sum(dim), (power_rc * dots_Krc[0]).sum(dim))

    @override
    def distill_grad(
        self, student: StudentTile, rows: PairWeights, cols: PairWeights, cache_Krc: Tensor | None
    ) -> Tensor:
        dots_Krc = self.all_dots(student) if cache_Krc is None else cache_Krc
        grad_rc = _probabilities(dots_Krc[0], student.tile, rows.student, cols.student)
        for k, teacher in enumerate(student.teachers):
            grad_rc -= _probabilities(dots_Krc[1 + k], teacher.tile, rows.teachers[k], cols.teachers[k])
        return grad_rc

    @override
    def distill_sigmoid(self, student: StudentTile, sums: SigmoidSums, weights_r: Tensor | None) -> Tensor | None:
        dots_Krc = self.all_dots(student)
        z_rc = _logits(dots_Krc[0], student.tile, *student.tile.logit_map.natural_2)
        target_rc = torch.zeros_like(z_rc)
        for teacher, dots_rc in zip(student.teachers, dots_Krc[1:], strict=True):
            logits_rc = _logits(dots_rc, teacher.tile, *teacher.tile.logit_map.natural_2)
            target_rc.add_(torch.sigmoid(logits_rc), alpha=teacher.weight)
        difference_rc = torch.sigmoid(z_rc) - target_rc
        sums.loss_r.add_(soft_cross_entropy(z_rc, target_rc).sum(1))
        sums.prob_r.add_(difference_rc.sum(1))
        torch.maximum(sums.row_max_r, z_rc.amax(1) * LOG2E, out=sums.row_max_r)
        torch.maximum(sums.col_max_c, z_rc.amax(0) * LOG2E, out=sums.col_max_c)
        return None if weights_r is None else difference_rc.mul_(weights_r[:, None])


def _logits(dot_rc: Tensor, tile: Tile, factor: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return ``dot * factor + offset`` as a new tensor, with -inf where excluded."""
    t_rc = dot_rc * factor
    if offset is not None:
        t_rc += offset
    if tile.row_labels_r is not None and tile.col_labels_c is not None:
        t_rc.masked_fill_(tile.row_labels_r[:, None] == tile.col_labels_c, -torch.inf)
    if tile.row_limits_r is not None and tile.col_limits_c is not None:
        t_rc.masked_fill_(dot_rc > torch.minimum(tile.row_limits_r[:, None], tile.col_limits_c), -torch.inf)
    if -len(t_rc) < tile.diagonal < t_rc.shape[1]:
        t_rc.diagonal(tile.diagonal).fill_(-torch.inf)
    return t_rc


def _powers(t_rc: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return ``2^(t - max)`` and the maxima along dim, in which all may be excluded."""
    max_n = t_rc.amax(dim)
    base_n = torch.where(max_n == -torch.inf, 0, max_n)
    return torch.exp2(t_rc - base_n.unsqueeze(dim)), max_n


def _merge_log_sums(dot_rc: Tensor, tile: Tile, rows: OnlineLogSumExp, cols: OnlineLogSumExp) -> None:
    """Merge the log-sum-exps of a tile's rows and columns."""
    t_rc = _logits(dot_rc, tile, tile.logit_map.base2_2[0])
    for side, dim in ((rows, 1), (cols, 0)):
        power_rc, max_n = _powers(t_rc, dim)
        side.merge(max_n, power_rc.sum(dim))


def _probabilities(dot_rc: Tensor, tile: Tile, rows: SoftmaxWeights, cols: SoftmaxWeights) -> Tensor:
    """Return the weighted probabilities of a row's and of a column's softmax, summed; 0 where excluded."""
    t_rc = _logits(dot_rc, tile, tile.logit_map.base2_2[0])
    sum_rc = torch.exp2(t_rc - rows.shift_n[:, None]).mul_(rows.factor_n[:, None])
    return sum_rc.add_(torch.exp2(t_rc - cols.shift_n).mul_(cols.factor_n))


class TorchTiles(LibraryTiles):
    """Tiles on any device, float32 or float64, in plain torch ops: the other back ends' reference and replacement."""

    def __init__(self, dtype: torch.dtype, rows: int = 1024, cols: int = 2048) -> None:
        super().__init__(dtype, rows, cols)

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
        _merge_log_sums(self.dots(x_rD, y_cD, cache_rc), tile, rows, cols)

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
        return _probabilities(dot_rc, tile, rows, cols)

    @override
    def sigmoid(
        self, x_rD: Tensor, y_cD: Tensor, tile: Tile, sums: SigmoidSums, weights_r: Tensor | None
    ) -> Tensor | None:
        z_rc = _logits(self.dots(x_rD, y_cD), tile, *tile.logit_map.natural_2)
        prob_rc = torch.sigmoid(z_rc)
        sums.loss_r.add_(softplus(z_rc).sum(1))
        sums.prob_r.add_(prob_rc.sum(1))
        torch.maximum(sums.row_max_r, z_rc.amax(1) * LOG2E, out=sums.row_max_r)
        torch.maximum(sums.col_max_c, z_rc.amax(0) * LOG2E, out=sums.col_max_c)
        return None if weights_r is None else prob_rc.mul_(weights_r[:, None])
