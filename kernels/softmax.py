"""The bidirectional softmax loss (InfoNCE) over tiles: one pass forward, three backward, less the logit cache.

``loss_i = ½ (softplus(r_i - s_ii) + softplus(c_i - s_ii))`` with r and c the log-sum-exp of a row's and a column's
*negatives*. The positive enters no tile, so a loss of 1e-20 and its gradient keep their relative accuracy, where
``lse - s_ii`` would be zero. Log-sum-exps stay in two parts (maximum, sum), and what is O(B) is done in float64: large
offsets common to all logits then cancel, and a row's probabilities sum to 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.kernels.buffer_pool import buffer_pool
from threetowers.kernels.distributed.columns import ColumnBlock, ColumnExchange
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.pair_state import PairState, mean_losses, sample_totals
from threetowers.kernels.tiles import LOG2E, OnlineLogSumExp, SoftmaxWeights, softplus
from threetowers.kernels.tiling import CachedTiles, softmax_gradients, softmax_statistics


class SoftmaxOutputs(NamedTuple):
    """Forward's results for one pair; from row_shift_b on, what backward reads."""

    loss: Tensor
    accuracy_2: Tensor
    row_shift_b: Tensor
    row_half_b: Tensor  # ½ / Σ_j 2^(t_ij - shift_i), positive included
    col_shift_B: Tensor
    col_half_B: Tensor
    attraction_b: Tensor  # ½ (1 - P_ii of the row) + ½ (1 - P_ii of the column)
    cache_n: Tensor


def softmax_forward(
    pairs: Sequence[PairState], exchange: ColumnExchange, ranks: RankGroup, logit_cache_bytes: int
) -> list[SoftmaxOutputs]:
    """Return the results of all pairs.

    Collectives: the exchange of columns, two for the columns' statistics, one for totals.
    """
    # All tiles: log-sum-exps of the negatives, by row and by column.
    rows_b = [OnlineLogSumExp.empty(len(pair.x_bD), pair.x_bD, pair.backend.dtype) for pair in pairs]
    cols_B = [OnlineLogSumExp.empty(pair.layout.total, pair.x_bD, pair.backend.dtype) for pair in pairs]
    cache_n = _allocate_caches(pairs, exchange, logit_cache_bytes)
    caches = [CachedTiles(flat_n) for flat_n in cache_n]
    for block in exchange.blocks():
        k = block.pair
        softmax_statistics(pairs[k], block, rows_b[k], cols_B[k], caches[k])

    # The positives' logits in base 2, and every column's statistics over all ranks.
    positives_b, margins_b = [], []
    for pair in pairs:
        dot_b, margin_b = pair.positives()
        positives_b.append(dot_b.double() * pair.logit_map.base2_2[0].double())  # the factor as the tiles round it
        margins_b.append(margin_b)
    positives_B = _reduce_columns(pairs, cols_B, positives_b, ranks)

    # Losses of the own samples, in O(b).
    attractions_b, totals = [], []
    for pair, rows, cols, t_b, margin_b in zip(pairs, rows_b, cols_B, positives_b, margins_b, strict=True):
        own_cols = cols.part(pair.layout.own)
        z_rows_b = (rows.max_n.double() - t_b + rows.sum_n.double().log2()) / LOG2E
        z_cols_b = (own_cols.max_n.double() - t_b + own_cols.sum_n.double().log2()) / LOG2E
        loss_b = (softplus(z_rows_b) + softplus(z_cols_b)) / 2
        attractions_b.append((torch.sigmoid(z_rows_b) + torch.sigmoid(z_cols_b)) / 2)
        totals.append(sample_totals(loss_b, t_b - rows.max_n > margin_b, t_b - own_cols.max_n > margin_b))

    outputs = []
    for k, (loss, accuracy_2) in enumerate(mean_losses(pairs, totals, ranks)):
        row_weights = _half_weights(rows_b[k], positives_b[k])
        col_weights = _half_weights(cols_B[k], positives_B[k])
        output = SoftmaxOutputs(
            loss=loss,
            accuracy_2=accuracy_2,
            row_shift_b=row_weights.shift_n,
            row_half_b=row_weights.factor_n,
            col_shift_B=col_weights.shift_n,
            col_half_B=col_weights.factor_n,
            attraction_b=attractions_b[k].to(pairs[k].backend.dtype),
            cache_n=cache_n[k],
        )
        outputs.append(output)
    return outputs


def _allocate_caches(pairs: Sequence[PairState], exchange: ColumnExchange, budget_bytes: int) -> list[Tensor]:
    """Return the memory of each pair's logit cache: pairs take from the budget in turn."""
    caches = []
    for k, pair in enumerate(pairs):
        size = 0
        if pair.needs_gradient:
            size = CachedTiles.size_within(budget_bytes, pair.backend, len(pair.x_bD), exchange.block_sizes(k))
        budget_bytes -= size * pair.backend.cache_dtype.itemsize
        caches.append(buffer_pool().take(size, pair.backend.cache_dtype, pair.x_bD.device))
    return caches


def _reduce_columns(
    pairs: Sequence[PairState], cols_B: Sequence[OnlineLogSumExp], positives_b: Sequence[Tensor], ranks: RankGroup
) -> list[Tensor]:
    """Merge column statistics over ranks in place, and return every column's positive logit, (B,) each."""
    if ranks.size == 1:
        return list(positives_b)

    # First the maxima, to which every rank then brings its sums.
    max_N = torch.cat([cols.max_n for cols in cols_B])
    ranks.max_(max_N)
    lengths = [len(cols.max_n) for cols in cols_B]
    parts: list[Tensor] = []
    for pair, cols, max_B, t_b in zip(pairs, cols_B, torch.split(max_N, lengths), positives_b, strict=True):
        base_B = torch.where(max_B == -torch.inf, 0, max_B)
        t_B = torch.zeros_like(cols.sum_n, dtype=torch.float64)
        t_B[pair.layout.own] = t_b
        parts += [cols.sum_n * torch.exp2(cols.max_n - base_B), t_B]
        cols.max_n.copy_(max_B)

    # The sums, and with them the positives of all ranks.
    sums_N = torch.cat(parts)
    ranks.sum_(sums_N)
    summed = torch.split(sums_N, [len(part) for part in parts])
    for cols, sum_B in zip(cols_B, summed[::2], strict=True):
        cols.sum_n.copy_(sum_B)
    return list(summed[1::2])


def _half_weights(negatives: OnlineLogSumExp, t_n: Tensor) -> SoftmaxWeights:
    """Return shift and ½ / sum of the softmax over the negatives and the positive t, which is float64."""
    shift_n = torch.maximum(negatives.max_n, t_n.to(negatives.max_n.dtype))
    total_n = negatives.sum_n * torch.exp2(negatives.max_n.double() - shift_n) + torch.exp2(t_n - shift_n)
    return SoftmaxWeights(shift_n, (0.5 / total_n).to(shift_n.dtype))


def softmax_backward(
    pairs: Sequence[PairState], outputs: Sequence[SoftmaxOutputs], grads: Sequence[Tensor], exchange: ColumnExchange
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (dx, dy, d log_scale) of every pair; empty where not wanted. grads: one 0-d gradient a pair."""
    dx_bD = [pair.zero_row_gradient() for pair in pairs]
    rows_b = [SoftmaxWeights(part.row_shift_b, part.row_half_b) for part in outputs]
    cols_B = [SoftmaxWeights(part.col_shift_B, part.col_half_B) for part in outputs]
    caches = [CachedTiles(part.cache_n) for part in outputs]

    def add(block: ColumnBlock, dy_sD: Tensor | None) -> None:
        k = block.pair
        if dx_bD[k] is not None or dy_sD is not None:
            softmax_gradients(pairs[k], block, rows_b[k], cols_B[k], caches[k], dx_bD[k], dy_sD)

    exchange.accumulate_gradients(add)
    results = []
    for k, pair in enumerate(pairs):
        factor = pair.gradient_factor(grads[k])
        results.append(pair.finish_gradients(dx_bD[k], exchange.own_gradient(k), outputs[k].attraction_b, factor))
    return results
