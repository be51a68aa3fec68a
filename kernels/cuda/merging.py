"""Folding what the blocks of a tile found into running statistics."""

import torch
from torch import Tensor

from threetowers.kernels.cuda.arguments import In, Out
from threetowers.kernels.cuda.launch import StreamLauncher, columns_launch
from threetowers.kernels.tiles.statistics import OnlineExpectation, OnlineLogSumExp, SigmoidSums


def merge_parts(launcher: StreamLauncher, parts_pn2: Tensor, running: OnlineLogSumExp) -> None:
    """Merge p parts (max, sum) of every position into the running one, in order, in place."""
    count, length, _ = parts_pn2.shape
    launch = columns_launch("merge", length, 1, launcher.limits)
    launcher.run(launch, (In(parts_pn2), count, length, Out(running.max_n), Out(running.sum_n)))


def merge_expectations(launcher: StreamLauncher, parts_pn3: Tensor, running: OnlineExpectation) -> None:
    """Merge p parts (max, sum, cross) of every position into the running one, in order, in place."""
    count, length, _ = parts_pn3.shape
    launch = columns_launch("merge_expectations", length, 1, launcher.limits)
    outputs = Out(running.max_n), Out(running.sum_n), Out(running.cross_n)
    launcher.run(launch, (In(parts_pn3), count, length, *outputs))


def add_sigmoid_parts(sums: SigmoidSums, row_parts_pr3: Tensor, col_max_pc: Tensor) -> None:
    """Merge what p blocks found of every row (loss, probability, largest logit) and of every column (the latter)."""
    sums.loss_r.add_(row_parts_pr3[..., 0].sum(0))
    sums.prob_r.add_(row_parts_pr3[..., 1].sum(0))
    torch.maximum(sums.row_max_r, row_parts_pr3[..., 2].amax(0), out=sums.row_max_r)
    torch.maximum(sums.col_max_c, col_max_pc.amax(0), out=sums.col_max_c)
