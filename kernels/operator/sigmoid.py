"""The sigmoid loss over tiles, against the own pairs (SigLIP) or against teachers.

With teachers' logits t_k and a target ``τ_ij = λ [i = j] + Σ_k w_k σ(t_k,ij)`` (λ + Σ_k w_k = 1) a sample's loss is
``Σ_j softplus(z_ij) - τ_ij z_ij`` over its own pair and admissible negatives; without teachers
``softplus(-z_ii) + Σ_j≠i softplus(z_ij)``. Three passes and one of each teacher, all forward, since the gradient needs
no statistics first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.kernels.distributed.columns import ColumnBlock, ColumnExchange
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.operator.pair_state import PairState, mean_losses, sample_totals
from threetowers.kernels.tiles import LOG2E, SigmoidSums, soft_cross_entropy
from threetowers.kernels.tiling import sigmoid_sums_and_gradients


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
    losses_b, attractions_b, totals = [], [], []
    for pair, part in zip(pairs, sums, strict=True):
        dot_b, margin_b = pair.positives()
        z_b = dot_b * pair.scale + pair.bias
        t_b = z_b * LOG2E
        own_max_b = part.col_max_c[pair.column_layout.own]
        missed_b = _missed_by_teachers(pair)
        loss_b = part.loss_r + soft_cross_entropy(-z_b, missed_b)  # of -z and 1 - τ it is the same
        losses_b.append(loss_b)
        attractions_b.append(torch.sigmoid(-z_b) - missed_b)
        totals.append(sample_totals(loss_b, t_b - part.row_max_r > margin_b, t_b - own_max_b > margin_b))

    outputs = []
    for k, (loss, accuracy_2) in enumerate(mean_losses(pairs, totals, ranks)):
        pair = pairs[k]
        factor = pair.gradient_factor(pair.vector(1, 1.0)[0])
        grads = pair.finish_gradients(dx_bD[k], exchange.own_gradient(k), attractions_b[k], factor)
        d_bias = (sums[k].prob_r - attractions_b[k]).sum(dtype=torch.float64) * factor
        outputs.append(SigmoidOutputs(loss, accuracy_2, losses_b[k], *grads, d_bias))
    return outputs


def _missed_by_teachers(pair: PairState) -> Tensor:
    """Return ``1 - τ`` of the samples' own pairs, (b,): what the teachers' targets lack there."""
    missed_b = pair.vector(len(pair.x_bD))
    for teacher in pair.teachers:
        t_b = teacher.positives(pair.backend.dtype) * teacher.scale + teacher.bias
        missed_b += teacher.weight * torch.sigmoid(-t_b)
    return missed_b


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
