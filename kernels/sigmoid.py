"""The sigmoid loss (SigLIP) over tiles: three units, since its gradient needs nothing that forward has not at hand.

``loss_i = softplus(-z_ii) + Σ_j softplus(z_ij)`` over admissible negatives. With per-sample losses the weights are not
known until backward, which then computes the tiles again (four units).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.kernels.distributed import Columns, RankGroup
from threetowers.kernels.pair_term import (
    Term,
    column_gradients,
    reduce_totals,
    reduced_loss,
    sample_weights,
    softplus,
    totals_of,
    uniform_gain,
    visit_shards,
)
from threetowers.kernels.tiles import LOG2E, SigmoidSums
from threetowers.kernels.tiling import TileBlock, sigmoid_pass


class SigmoidState(NamedTuple):
    """Forward's results of one term; the gradients are those of an incoming gradient of 1 (empty for "none")."""

    loss: Tensor
    accuracy_2: Tensor
    dx_bD: Tensor
    dy_bD: Tensor
    d_scale: Tensor
    d_bias: Tensor
    pull_b: Tensor  # σ(-z_ii)
    prob_b: Tensor  # Σ_j σ(z_ij)


def sigmoid_forward(
    terms: Sequence[Term], columns: Columns, ranks: RankGroup, reduction: str, ring: bool
) -> list[SigmoidState]:
    """Losses and, but for reduction "none", gradients of all terms."""
    sums = [_empty_sums(term) for term in terms]
    wanted = [reduction != "none" and term.needs_gradient for term in terms]
    dx = [term.row_gradient() if want else None for term, want in zip(terms, wanted, strict=True)]
    dy = column_gradients(terms, ranks, wanted=reduction != "none", ring=ring)
    ones = [term.vector(term.batch, 1.0) if want else None for term, want in zip(terms, wanted, strict=True)]

    def work(k: int, block: TileBlock, dy_sD: Tensor | None) -> None:
        sigmoid_pass(terms[k].backend, block, sums[k], ones[k], dx[k], dy_sD)

    visit_shards(terms, columns, dy, work)
    _reduce_column_max(sums, ranks)
    finished, totals = [], []
    for term, part in zip(terms, sums, strict=True):
        dot_b, margin_b = term.positives()
        z_b, own_max_b = dot_b * term.scale + term.bias, part.col_max_c[term.shards.own]
        t_b = z_b * LOG2E
        loss_b = part.loss_r + softplus(-z_b)
        finished.append((loss_b, torch.sigmoid(-z_b)))
        totals.append(totals_of(loss_b, t_b - part.row_max_r > margin_b, t_b - own_max_b > margin_b))
    states = []
    for k, total_3 in enumerate(reduce_totals(totals, ranks)):
        term, (loss_b, pull_b), prob_b = terms[k], finished[k], sums[k].prob_r
        gain = uniform_gain(term, term.vector(1, 1.0)[0], reduction)
        nothing = term.x_bD.new_empty(0)
        grads = (nothing, nothing.clone(), nothing.clone())
        d_bias = (prob_b - pull_b).sum(dtype=torch.float64) * gain
        if wanted[k]:
            grads = term.gradients(dx[k], dy.own(k), pull_b, gain)
        loss, accuracy_2 = reduced_loss(term, loss_b, total_3, reduction)
        states.append(SigmoidState(loss, accuracy_2, *grads, d_bias, pull_b, prob_b))
    return states


def sigmoid_backward(
    terms: Sequence[Term], states: Sequence[SigmoidState], grads: Sequence[Tensor], columns: Columns, ranks: RankGroup,
    reduction: str, ring: bool,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """(dx, dy, d log_scale, d bias) of every term."""
    results = []
    if reduction != "none":
        for term, state, grad in zip(terms, states, grads, strict=True):
            nothing, wanted = state.dx_bD.new_empty, (term.need_x, term.need_y, term.need_scale)
            parts = zip(wanted, (state.dx_bD, state.dy_bD, state.d_scale), strict=True)
            dx, dy, d_scale = (part * grad if want else nothing(0) for want, part in parts)
            results.append((dx, dy, d_scale, state.d_bias * grad))
        return results
    weighted = [sample_weights(term, grad_b, ranks) for term, grad_b in zip(terms, grads, strict=True)]
    own = [weights_B[term.shards.own] for term, (weights_B, _) in zip(terms, weighted, strict=True)]
    dx_parts = [term.row_gradient() for term in terms]
    dy_parts = column_gradients(terms, ranks, wanted=True, ring=ring)

    def work(k: int, block: TileBlock, dy_sD: Tensor | None) -> None:
        if terms[k].needs_gradient:
            sigmoid_pass(terms[k].backend, block, None, own[k], dx_parts[k], dy_sD)

    visit_shards(terms, columns, dy_parts, work)
    for k, (term, state) in enumerate(zip(terms, states, strict=True)):
        gain = weighted[k][1]
        parts_k = term.gradients(dx_parts[k], dy_parts.own(k), state.pull_b * own[k], gain)
        results.append((*parts_k, (own[k] * (state.prob_b - state.pull_b)).sum(dtype=torch.float64) * gain))
    return results


def sigmoid_backward_in_place(states: Sequence[SigmoidState], grads: Sequence[Tensor]) -> list[Tensor]:
    """dx, dy, d log_scale and d bias of each term in turn, in the memory in which forward left them.

    For "mean" and "sum" where nobody reads the states again: gradients then are never there twice.
    """
    parts = [(state.dx_bD, state.dy_bD, state.d_scale, state.d_bias) for state in states]
    return [part.mul_(grad) for term, grad in zip(parts, grads, strict=True) for part in term]


def _empty_sums(term: Term) -> SigmoidSums:
    batch, total = term.batch, term.shards.total
    return SigmoidSums(
        term.vector(batch), term.vector(batch), term.vector(batch, -torch.inf), term.vector(total, -torch.inf)
    )


def _reduce_column_max(sums: Sequence[SigmoidSums], ranks: RankGroup) -> None:
    if ranks.size == 1:
        return
    max_N = torch.cat([part.col_max_c for part in sums])
    ranks.max_(max_N)
    for part, new_B in zip(sums, torch.split(max_N, [len(part.col_max_c) for part in sums]), strict=True):
        part.col_max_c.copy_(new_B)
