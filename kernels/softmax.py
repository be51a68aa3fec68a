"""The bidirectional softmax loss (InfoNCE) over tiles: one unit forward, three backward, less the kept tiles.

``loss_i = ½ (softplus(r_i - s_ii) + softplus(c_i - s_ii))`` with r and c the log-sum-exp of a row's and a column's
*negatives*. The positive enters no tile, so a loss of 1e-20 and its gradient keep their relative accuracy, where
``lse - s_ii`` would be zero. Log-sum-exps stay in two parts (maximum, sum), and what is O(B) is done in float64: large
offsets common to all logits then cancel, and a row's probabilities sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.kernels.buffer_pool import reserve
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
from threetowers.kernels.tiles import LOG2E, Running, Weights
from threetowers.kernels.tiling import KeptTiles, TileBlock, softmax_grads, softmax_stats


class SoftmaxState(NamedTuple):
    """Forward's results of one term; from row_shift_b on, what backward reads."""

    loss: Tensor
    accuracy_2: Tensor
    row_shift_b: Tensor
    row_half_b: Tensor  # ½ / Σ_j 2^(t_ij - shift_i), positive included
    col_shift_B: Tensor
    col_half_B: Tensor
    pull_b: Tensor  # ½ (1 - P_ii of the row) + ½ (1 - P_ii of the column)
    kept_n: Tensor


def softmax_forward(
    terms: Sequence[Term], columns: Columns, ranks: RankGroup, reduction: str, workspace_bytes: int
) -> list[SoftmaxState]:
    """Losses of all terms: collectives are the columns' gather, two of column statistics, one of totals."""
    rows = [Running.empty(term.batch, term.x_bD, term.backend.dtype) for term in terms]
    cols = [Running.empty(term.shards.total, term.x_bD, term.backend.dtype) for term in terms]
    rooms = _rooms(terms, columns.order, workspace_bytes)
    kept = [KeptTiles(room_n) for room_n in rooms]
    for rank in columns.order:
        for k, term in enumerate(terms):
            block = term.block(columns, rank)
            softmax_stats(term.backend, block, rows[k], cols[k], kept[k])
    positives = []
    for term in terms:
        dot_b, margin_b = term.positives()
        factor = torch.tensor(term.scale * LOG2E, dtype=dot_b.dtype).item()  # rounded as the tiles round it
        positives.append((dot_b.double() * factor, margin_b))
    positives_B = _reduce_columns(terms, cols, [t_b for t_b, _ in positives], ranks)

    finished, totals = [], []
    for term, (t_b, margin_b), row, col in zip(terms, positives, rows, cols, strict=True):
        own = col.part(term.shards.own.start, term.shards.own.stop)
        z_rows_b, z_cols_b = ((side.max_n.double() - t_b + side.sum_n.double().log2()) / LOG2E for side in (row, own))
        loss_b = (softplus(z_rows_b) + softplus(z_cols_b)) / 2
        finished.append((loss_b, (torch.sigmoid(z_rows_b) + torch.sigmoid(z_cols_b)) / 2))
        totals.append(totals_of(loss_b, t_b - row.max_n > margin_b, t_b - own.max_n > margin_b))
    states = []
    for k, total_3 in enumerate(reduce_totals(totals, ranks)):
        dtype, (loss_b, pull_b) = terms[k].backend.dtype, finished[k]
        loss, accuracy_2 = reduced_loss(terms[k], loss_b.to(dtype), total_3, reduction)
        sides = (*_half_weights(rows[k], positives[k][0]), *_half_weights(cols[k], positives_B[k]))
        states.append(SoftmaxState(loss, accuracy_2, *sides, pull_b.to(dtype), rooms[k]))
    return states


def _rooms(terms: Sequence[Term], order: Sequence[int], workspace_bytes: int) -> list[Tensor]:
    """Memory for kept tiles: terms take from the budget in turn."""
    rooms = []
    for term in terms:
        sizes = [term.shards.sizes[rank] for rank in order]
        budget = workspace_bytes if term.needs_gradient else 0
        room = KeptTiles.room(term.backend, term.batch, sizes, budget)
        workspace_bytes -= room * term.backend.kept_dtype.itemsize
        rooms.append(reserve().take(room, term.backend.kept_dtype, term.x_bD.device))
    return rooms


def _reduce_columns(
    terms: Sequence[Term], cols: Sequence[Running], positives: Sequence[Tensor], ranks: RankGroup
) -> list[Tensor]:
    """Merge column statistics over ranks in place; returns every column's positive logit, (B,) each."""
    if ranks.size == 1:
        return list(positives)
    max_N = torch.cat([col.max_n for col in cols])
    ranks.max_(max_N)
    sums, lengths = [], [len(col.max_n) for col in cols]
    for term, col, new_B, t_b in zip(terms, cols, torch.split(max_N, lengths), positives, strict=True):
        base_B = torch.where(new_B == -torch.inf, 0, new_B)
        t_B = torch.zeros_like(col.sum_n, dtype=torch.float64)
        t_B[term.shards.own] = t_b
        sums += [col.sum_n * torch.exp2(col.max_n - base_B), t_B]
        col.max_n.copy_(new_B)
    sums_N = torch.cat(sums)
    ranks.sum_(sums_N)
    parts = torch.split(sums_N, [length for length in lengths for _ in range(2)])
    for col, sum_B in zip(cols, parts[::2], strict=True):
        col.sum_n.copy_(sum_B)
    return list(parts[1::2])


def _half_weights(running: Running, t_n: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and ½ / sum of the softmax over negatives and the positive t, float64."""
    shift_n = torch.maximum(running.max_n, t_n.to(running.max_n.dtype))
    total_n = running.sum_n * torch.exp2(running.max_n.double() - shift_n) + torch.exp2(t_n - shift_n)
    return shift_n, (0.5 / total_n).to(shift_n.dtype)


def softmax_backward(
    terms: Sequence[Term], states: Sequence[SoftmaxState], grads: Sequence[Tensor], columns: Columns, ranks: RankGroup,
    reduction: str, ring: bool,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """(dx, dy, d log_scale) of every term."""
    weighted = [_weighted(*parts, ranks, reduction) for parts in zip(terms, states, grads, strict=True)]
    kept = [KeptTiles(state.kept_n) for state in states]
    dx = [term.row_gradient() for term in terms]
    dy = column_gradients(terms, ranks, wanted=True, ring=ring)

    def work(k: int, block: TileBlock, dy_sD: Tensor | None) -> None:
        if dx[k] is not None or dy_sD is not None:
            rows, cols, _, _ = weighted[k]
            softmax_grads(terms[k].backend, block, rows, cols, kept[k], dx[k], dy_sD)

    visit_shards(terms, columns, dy, work)
    return [
        term.gradients(dx[k], dy.own(k), pull_b, gain)
        for k, (term, (_, _, pull_b, gain)) in enumerate(zip(terms, weighted, strict=True))
    ]


def _weighted(
    term: Term, state: SoftmaxState, grad: Tensor, ranks: RankGroup, reduction: str
) -> tuple[Weights, Weights, Tensor, Tensor]:
    """Row and column weights and the positives' pull, with the samples' weights in them, and a common factor."""
    rows, cols = Weights(state.row_shift_b, state.row_half_b), Weights(state.col_shift_B, state.col_half_B)
    if reduction != "none":
        return rows, cols, state.pull_b, uniform_gain(term, grad, reduction)
    weights_B, gain = sample_weights(term, grad, ranks)
    weights_b = weights_B[term.shards.own]
    rows = Weights(rows.shift_n, rows.factor_n * weights_b)
    return rows, Weights(cols.shift_n, cols.factor_n * weights_B), state.pull_b * weights_b, gain
