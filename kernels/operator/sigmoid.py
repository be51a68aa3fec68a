"""The sigmoid loss over tiles, against the own pairs (SigLIP) or against teachers.

With teachers' logits t_k and a target ``τ_ij = λ [i = j] + Σ_k w_k σ(t_k,ij)`` (λ + Σ_k w_k = 1) a sample's loss is
``Σ_j softplus(z_ij) - τ_ij z_ij`` over its own pair and admissible negatives; without teachers
``softplus(-z_ii) + Σ_j≠i softplus(z_ij)``. Three passes and one of each teacher, all forward, since the gradient needs
no statistics first. Where columns have owners, a sample has any number of own pairs, and its loss is the sum over them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.kernels.distributed.columns import ColumnBlock, ColumnExchange
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.operator.pair_state import PairState, mean_losses, sample_totals
from threetowers.kernels.tiles.softplus import soft_cross_entropy
from threetowers.kernels.tiles.statistics import SigmoidSums
from threetowers.kernels.tiles.tile_backend import LOG2E
from threetowers.kernels.tiles.tiling import sigmoid_sums_and_gradients


class SigmoidOutputs(NamedTuple):
    """Forward's results for one pair; the gradients are those of an incoming gradient of 1."""

    loss: Tensor
    accuracy_2: Tensor
    losses_b: Tensor
    dx_bD: Tensor
    dy_bD: Tensor
    d_scale: Tensor
    d_bias: Tensor


def sigmoid_forward(pairs: Sequence[PairState], exchange: ColumnExchange, ranks: RankGroup) -> list[SigmoidOutputs]:
    """Return losses and gradients of all pairs."""
    # All tiles: sums over the negatives, and the tiles' part of the gradients.
    sums = [_empty_sums(pair) for pair in pairs]
    dx_bD = [pair.zero_row_gradient() for pair in pairs]
    ones_b = [pair.vector(len(pair.x_bD), 1.0) if pair.needs_gradient else None for pair in pairs]

    def add(block: ColumnBlock, dy_sD: Tensor | None) -> None:
        k = block.pair
        sigmoid_sums_and_gradients(pairs[k], block, sums[k], ones_b[k], dx_bD[k], dy_sD)

    exchange.accumulate_gradients(add)
    _reduce_column_max(sums, ranks)

    # The positives, and the losses of the own samples, in O(b).
    losses_b, attractions_m, totals = [], [], []
    for pair, part in zip(pairs, sums, strict=True):
        owners = pair.owners
        dot_m, slack_m = pair.positives()
        z_m = dot_m * pair.scale + pair.bias
        t_m = owners.mark(z_m * LOG2E, -torch.inf)
        slack_m = slack_m * (pair.scale * LOG2E)
        missed_m = _missed_by_teachers(pair)
        own_loss_m = owners.mark(soft_cross_entropy(-z_m, missed_m), 0)  # of -z and 1 - τ it is the same
        loss_b = part.loss_r + owners.by_row(own_loss_m, "sum")
        losses_b.append(loss_b)
        attractions_m.append(owners.mark(torch.sigmoid(-z_m) - missed_m, 0))
        won_xy_b = owners.by_row(t_m, "max") - part.row_max_r > owners.by_row(slack_m, "max")
        won_yx_m = t_m - part.col_max_c[pair.column_layout.own] > slack_m
        totals.append(sample_totals(loss_b, won_xy_b, won_yx_m))

    outputs = []
    counts = [pair.row_layout.total for pair in pairs]
    for k, (loss, accuracy_2) in enumerate(mean_losses(pairs, totals, counts, ranks)):
        pair = pairs[k]
        factor = pair.gradient_factor(pair.vector(1, 1.0)[0], counts[k])
        grads = pair.finish_gradients(dx_bD[k], exchange.own_gradient(k), attractions_m[k], factor)
        attraction_b = pair.owners.by_row(attractions_m[k], "sum")
        d_bias = (sums[k].prob_r - attraction_b).sum(dtype=torch.float64) * factor
        outputs.append(SigmoidOutputs(loss, accuracy_2, losses_b[k], *grads, d_bias))
    return outputs


def _missed_by_teachers(pair: PairState) -> Tensor:
    """Return ``1 - τ`` of the samples' own pairs, (m,): what the teachers' targets lack there."""
    missed_m = pair.vector(len(pair.y_bD))
    for teacher in pair.teachers:
        t_m = teacher.positives(pair.backend.dtype) * teacher.scale + teacher.bias
        missed_m += teacher.weight * torch.sigmoid(-t_m)
    return missed_m


def _empty_sums(pair: PairState) -> SigmoidSums:
    batch = len(pair.x_bD)
    return SigmoidSums(
        loss_r=pair.vector(batch),
        prob_r=pair.vector(batch),
        row_max_r=pair.vector(batch, -torch.inf),
        col_max_c=pair.vector(pair.column_layout.total, -torch.inf),
    )


def _reduce_column_max(sums: Sequence[SigmoidSums], ranks: RankGroup) -> None:
    if ranks.size == 1:
        return
    max_N = torch.cat([part.col_max_c for part in sums])
    ranks.max_(max_N)
    for part, max_B in zip(sums, torch.split(max_N, [len(part.col_max_c) for part in sums]), strict=True):
        part.col_max_c.copy_(max_B)
