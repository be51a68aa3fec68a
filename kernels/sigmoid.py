"""The sigmoid loss (SigLIP) over tiles: three units, since its gradient needs nothing that forward has not at hand.

``loss_i = softplus(-z_ii) + Σ_j softplus(z_ij)`` over admissible negatives. With per-sample losses the weights are not
known until backward, which then computes the tiles again (four units).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.kernels.chunked import sigmoid_pass
from threetowers.kernels.distributed import Columns, Ranks
from threetowers.kernels.term import (
    Term,
    finish,
    reduce_totals,
    reduced_loss,
    sample_weights,
    softplus,
    totals_of,
    uniform_gain,
)
from threetowers.kernels.tiles import LOG2E, SigmoidSums


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


def sigmoid_forward(terms: Sequence[Term], columns: Columns, ranks: Ranks, reduction: str) -> list[SigmoidState]:
    """Losses and, but for reduction "none", gradients of all terms."""
    sums, pending = [], []
    for term in terms:
        sums_B = _empty_sums(term)
        wanted = reduction != "none" and term.needs_gradient
        dx_bD, dy_WmD = term.gradient_buffers() if wanted else (None, None)
        ones_b = term.vector(term.batch, 1.0) if wanted else None
        _sweep(term, columns, sums_B, ones_b, dx_bD, dy_WmD)
        sums.append(sums_B)
        pending.append((dx_bD, None if dy_WmD is None else ranks.scatter_sum_async(dy_WmD)))
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
    for k, total_3 in enumerate(reduce_totals(terms, totals, ranks)):
        term, (loss_b, pull_b), prob_b = terms[k], finished[k], sums[k].prob_r
        gain = uniform_gain(term, term.vector(1, 1.0)[0], reduction)
        nothing = term.x_bD.new_empty(0)
        grads = (nothing, nothing.clone(), nothing.clone())
        d_bias = (prob_b - pull_b).sum(dtype=torch.float64) * gain
        if reduction != "none" and term.needs_gradient:
            grads = finish(term, *pending[k], pull_b, gain)
        loss, accuracy_2 = reduced_loss(term, loss_b, total_3, reduction)
        states.append(SigmoidState(loss, accuracy_2, *grads, d_bias, pull_b, prob_b))
    return states


def sigmoid_backward(
    terms: Sequence[Term], states: Sequence[SigmoidState], grads: Sequence[Tensor], columns: Columns, ranks: Ranks,
    reduction: str,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """(dx, dy, d log_scale, d bias) of every term."""
    if reduction != "none":
        results = []
        for term, state, grad in zip(terms, states, grads, strict=True):
            nothing, wanted = state.dx_bD.new_empty, (term.need_x, term.need_y, term.need_scale)
            parts = zip(wanted, (state.dx_bD, state.dy_bD, state.d_scale), strict=True)
            dx, dy, d_scale = (part * grad if want else nothing(0) for want, part in parts)
            results.append((dx, dy, d_scale, state.d_bias * grad))
        return results
    pending, d_biases = [], []
    for term, state, grad_b in zip(terms, states, grads, strict=True):
        weights_B, gain = sample_weights(term, grad_b, ranks)
        weights_b = weights_B[term.shards.own]
        dx_bD, dy_WmD = term.gradient_buffers()
        if term.needs_gradient:
            _sweep(term, columns, None, weights_b, dx_bD, dy_WmD)
        dy = None if dy_WmD is None else ranks.scatter_sum_async(dy_WmD)
        pending.append((term, dx_bD, dy, state.pull_b * weights_b, gain))
        d_biases.append((weights_b * (state.prob_b - state.pull_b)).sum(dtype=torch.float64) * gain)
    return [(*finish(*parts), d_bias) for parts, d_bias in zip(pending, d_biases, strict=True)]


def _sweep(
    term: Term, columns: Columns, sums: SigmoidSums | None, weights_b: Tensor | None, dx_bD: Tensor | None,
    dy_WmD: Tensor | None,
) -> None:  # fmt: skip
    for rank in term.shards.order:
        block = term.block(columns, rank)
        dy_sD = None if dy_WmD is None else dy_WmD[rank, : len(block.y_sD)]
        sigmoid_pass(term.backend, block, sums, weights_b, dx_bD, dy_sD)


def _empty_sums(term: Term) -> SigmoidSums:
    batch, total = term.batch, term.shards.total
    return SigmoidSums(
        term.vector(batch), term.vector(batch), term.vector(batch, -torch.inf), term.vector(total, -torch.inf)
    )


def _reduce_column_max(sums: Sequence[SigmoidSums], ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    max_N = torch.cat([part.col_max_c for part in sums])
    ranks.max_(max_N)
    for part, new_B in zip(sums, torch.split(max_N, [len(part.col_max_c) for part in sums]), strict=True):
        part.col_max_c.copy_(new_B)
