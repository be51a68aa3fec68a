"""The bidirectional softmax loss over tiles, against the own pairs (InfoNCE) or against teachers.

With p the student's softmax along a row, or a column, of logits z, and a target that is ``λ`` at the sample's own pair
plus ``Σ_k w_k q_k``, q_k the softmax of teacher k's logits (λ + Σ_k w_k = 1), a sample's loss is the mean of the cross
entropies along its row and its column. Along a row:

``loss_i = softplus(r_i - z_ii) - Σ_k w_k Σ_j≠i q_k,ij (z_ij - z_ii)``, r the log-sum-exp of the row's *negatives*.

The own pair enters no tile, so a loss of 1e-20 and its gradient keep their relative accuracy, where ``lse - z_ii``
would be zero. Log-sum-exps stay in two parts (maximum, sum), and what is O(B) is done in float64: large offsets common
to all logits then cancel, and a row's probabilities sum to 1.

Where columns have owners, a row has any number of positives, and the mean over them of its cross entropies is, with q
their log-sum-exp, ``loss_i = softplus(r_i - q_i) + q_i - mean z_ij`` (L_out of supervised contrastive learning, Khosla
et al. 2020); the last two cancel exactly where there is one. The loss is then half the mean over rows that own a
column, and half the mean over columns that have an owner.

Passes, K teachers: 1 + K forward and 3 + K backward, less those of tiles in the logit cache.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.kernels.buffer_pool import buffer_pool
from threetowers.kernels.distributed.columns import ColumnBlock, ColumnExchange
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.operator.pair_state import PairState, mean_losses, sample_totals
from threetowers.kernels.tiles.softplus import softplus
from threetowers.kernels.tiles.statistics import (
    OnlineExpectation,
    OnlineLogSumExp,
    PairWeights,
    SoftmaxStatistics,
    SoftmaxWeights,
)
from threetowers.kernels.tiles.tile_backend import LOG2E
from threetowers.kernels.tiles.tiling import CachedTiles, softmax_gradients, softmax_statistics


class SoftmaxOutputs(NamedTuple):
    """Forward's results for one pair; from row_shift_b on, what backward reads."""

    loss: Tensor
    accuracy_2: Tensor
    losses_b: Tensor
    row_shift_b: Tensor
    row_factor_b: Tensor  # ½ / Σ_j 2^(t_ij - shift_i), positive included
    col_shift_B: Tensor
    col_factor_B: Tensor
    attraction_m: Tensor  # minus the derivative of the sum of the losses by a column's logit with its owner
    cache_n: Tensor


class TeacherOutputs(NamedTuple):
    """What backward reads of one teacher; its factors are ½ w / Σ_j 2^(t_ij - shift_i)."""

    row_shift_b: Tensor
    row_factor_b: Tensor
    col_shift_B: Tensor
    col_factor_B: Tensor


def softmax_forward(
    pairs: Sequence[PairState], exchange: ColumnExchange, ranks: RankGroup, logit_cache_bytes: int
) -> tuple[list[SoftmaxOutputs], list[TeacherOutputs]]:
    """Return the results of all pairs, and of all their teachers in the order of the pairs.

    Collectives: the exchange of columns, two for the columns' statistics, one for totals.
    """
    # All tiles: log-sum-exps of the negatives, by row and by column.
    rows_b = [_empty_statistics(pair, len(pair.x_bD)) for pair in pairs]
    cols_B = [_empty_statistics(pair, pair.column_layout.total) for pair in pairs]
    cache_n = _allocate_caches(pairs, exchange, logit_cache_bytes)
    caches = [CachedTiles(flat_n, 1 + len(pair.teachers)) for flat_n, pair in zip(cache_n, pairs, strict=True)]
    for block in exchange.blocks():
        k = block.pair
        softmax_statistics(pairs[k], block, rows_b[k], cols_B[k], caches[k])

    # The own pairs' logits in base 2, the student's and the teachers', and every column's statistics over all ranks.
    slacks_m, positives_m = [], []
    for pair in pairs:
        dot_m, slack_m = pair.positives()
        # the factors as the tiles round them
        factor = pair.logit_map.base2_2[0].double()
        slacks_m.append(slack_m * factor)
        base2_m = [pair.owners.mark(dot_m.double() * factor, -torch.inf)]
        for teacher in pair.teachers:
            base2_m.append(teacher.positives(pair.backend.dtype).double() * teacher.logit_map.base2_2[0].double())
        positives_m.append(base2_m)
    positives_B = _reduce_columns(pairs, cols_B, positives_m, ranks)

    # Losses of the own samples, in O(b).
    losses_b, attractions_m, rows_positives_b, totals = [], [], [], []
    for k, pair in enumerate(pairs):
        own_cols = cols_B[k].part(pair.column_layout.own)
        rows_positives_b.append([_joint(pair, positives_m[k][0]), *positives_m[k][1:]])
        row_losses_b, row_attractions_m = _row_losses(pair, rows_b[k], rows_positives_b[k], positives_m[k])
        col_losses_m, col_attractions_m = _sample_losses(pair, own_cols, positives_m[k])
        col_share = pair.num_anchors / pair.num_owned  # a column's part in the sum that is divided by the anchors
        col_losses_m = pair.owners.mark(col_losses_m * col_share, 0)
        col_attractions_m = pair.owners.mark(col_attractions_m * col_share, 0)
        losses_b.append((row_losses_b + pair.owners.by_row(col_losses_m, "sum")) / 2)
        attractions_m.append((row_attractions_m + col_attractions_m) / 2)
        t_m, slack_m = positives_m[k][0], slacks_m[k]
        best_b, row_slack_b = (pair.owners.by_row(part_m, "max") for part_m in (t_m, slack_m))
        won_xy_b = best_b - rows_b[k].student.max_n > row_slack_b
        totals.append(sample_totals(losses_b[k], won_xy_b, t_m - own_cols.student.max_n > slack_m))

    outputs, teachers = [], []
    counts = [pair.num_anchors for pair in pairs]
    for k, (loss, accuracy_2) in enumerate(mean_losses(pairs, totals, counts, ranks)):
        dtype = pairs[k].backend.dtype
        row_weights = _weights(pairs[k], rows_b[k], rows_positives_b[k], 1.0)
        col_weights = _weights(pairs[k], cols_B[k], positives_B[k], pairs[k].num_anchors / pairs[k].num_owned)
        output = SoftmaxOutputs(
            loss=loss,
            accuracy_2=accuracy_2,
            losses_b=losses_b[k].to(dtype),
            row_shift_b=row_weights.student.shift_n,
            row_factor_b=row_weights.student.factor_n,
            col_shift_B=col_weights.student.shift_n,
            col_factor_B=col_weights.student.factor_n,
            attraction_m=attractions_m[k].to(dtype),
            cache_n=cache_n[k],
        )
        outputs.append(output)
        for of_rows, of_cols in zip(row_weights.teachers, col_weights.teachers, strict=True):
            teachers.append(TeacherOutputs(of_rows.shift_n, of_rows.factor_n, of_cols.shift_n, of_cols.factor_n))
    return outputs, teachers


def _empty_statistics(pair: PairState, n: int) -> SoftmaxStatistics:
    """Return those of n rows or columns of a pair that have met nothing yet."""
    return SoftmaxStatistics.empty(n, len(pair.teachers), pair.x_bD, pair.backend.dtype)


def _allocate_caches(pairs: Sequence[PairState], exchange: ColumnExchange, budget_bytes: int) -> list[Tensor]:
    """Return the memory of each pair's logit cache: pairs take from the budget in turn."""
    caches = []
    for k, pair in enumerate(pairs):
        size = 0
        if pair.needs_gradient:
            layers = 1 + len(pair.teachers)
            size = CachedTiles.size_within(budget_bytes, pair.backend, len(pair.x_bD), exchange.block_sizes(k), layers)
        budget_bytes -= size * pair.backend.cache_dtype.itemsize
        caches.append(buffer_pool().take(size, pair.backend.cache_dtype, pair.x_bD.device))
    return caches


def _reduce_columns(
    pairs: Sequence[PairState],
    cols_B: Sequence[SoftmaxStatistics],
    positives_m: Sequence[Sequence[Tensor]],
    ranks: RankGroup,
) -> list[list[Tensor]]:
    """Merge column statistics over ranks in place; return all columns' own logits, (B,), by pair: student, teachers."""
    if ranks.size == 1:
        return [list(of_pair) for of_pair in positives_m]

    # First the maxima, to which every rank then brings its sums.
    stats: list[OnlineLogSumExp | OnlineExpectation] = []
    for cols in cols_B:
        stats += [cols.student, *cols.teachers]
    lengths = [len(part.max_n) for part in stats]
    max_N = torch.cat([part.max_n for part in stats])
    ranks.max_(max_N)
    for part, max_B in zip(stats, torch.split(max_N, lengths), strict=True):
        factor_B = torch.exp2(part.max_n - torch.where(max_B == -torch.inf, 0, max_B))
        for sum_B in _sums(part):
            sum_B.mul_(factor_B)
        part.max_n.copy_(max_B)

    # The sums, and with them the own logits of all ranks.
    positives_B = []
    for pair, of_pair in zip(pairs, positives_m, strict=True):
        padded_B = [t_m.new_zeros(pair.column_layout.total) for t_m in of_pair]
        for t_B, t_m in zip(padded_B, of_pair, strict=True):
            t_B[pair.column_layout.own] = t_m
        positives_B.append(padded_B)
    sums_B = [sum_B for part in stats for sum_B in _sums(part)]
    reduced = sums_B + [t_B for of_pair in positives_B for t_B in of_pair]
    sums_N = torch.cat([part.double() for part in reduced])
    ranks.sum_(sums_N)
    for part_B, total_B in zip(reduced, torch.split(sums_N, [len(part) for part in reduced]), strict=True):
        part_B.copy_(total_B)
    return positives_B


def _sums(stats: OnlineLogSumExp | OnlineExpectation) -> list[Tensor]:
    """Return what is relative to the maxima."""
    return [stats.sum_n] if isinstance(stats, OnlineLogSumExp) else [stats.sum_n, stats.cross_n]


def _joint(pair: PairState, t_m: Tensor) -> Tensor:
    """Return the log-sum-exp of each row's positives t in base 2, (b,): of a single one itself, of none -inf."""
    if pair.owners.owner_m is None:
        return t_m
    most_b = pair.owners.by_row(t_m, "max")
    power_m = pair.owners.mark(torch.exp2(t_m - pair.owners.of_columns(most_b)), 0)
    return most_b + pair.owners.by_row(power_m, "sum").log2()


def _row_losses(
    pair: PairState, stats: SoftmaxStatistics, joint_b: Sequence[Tensor], positives_m: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the losses along rows, (b,), and minus their derivatives by the logits of their positives, (m,); float64.

    Args:
        pair: the pair.
        stats: of its rows.
        joint_b: the log-sum-exps in base 2 of the rows' positives, the student's and each teacher's.
        positives_m: these themselves.
    """
    losses_b, attractions_b = _sample_losses(pair, stats, joint_b)  # of all positives as if they were one
    counts_b = pair.owners.counts()
    if counts_b is None:
        return losses_b, attractions_b
    owners, q_b, t_m = pair.owners, joint_b[0], positives_m[0]
    excess_b = q_b - owners.by_row(t_m, "sum") / counts_b
    losses_b = torch.where(counts_b > 0, losses_b + excess_b / LOG2E, 0)
    part_m = torch.exp2(t_m - owners.of_columns(q_b))  # of a positive in all of them
    own_share_m = 1 / owners.of_columns(counts_b.double())
    attractions_m = (own_share_m - part_m) + part_m * owners.of_columns(attractions_b)
    return losses_b, owners.mark(attractions_m, 0)


def _sample_losses(pair: PairState, stats: SoftmaxStatistics, positives_n: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the losses along one side, and minus their derivatives by the own pair's logit; float64 (n,).

    positives_n: the own pairs' logits in base 2: the student's, then each teacher's.
    """
    t_n = positives_n[0]
    z_n = (stats.student.max_n.double() - t_n + stats.student.sum_n.double().log2()) / LOG2E
    losses_n = softplus(z_n)
    attractions_n = torch.sigmoid(z_n)  # 1 - p of the own pair
    factor = pair.logit_map.base2_2[0].double()
    for teacher, expectation, own_n in zip(pair.teachers, stats.teachers, positives_n[1:], strict=True):
        _, scale_n, total_n = _joined(expectation, own_n)
        missed_n = expectation.sum_n * scale_n / total_n  # 1 - q of the own pair
        expected_n = expectation.cross_n * scale_n / total_n * factor  # Σ_j≠i q t_ij
        losses_n = losses_n - teacher.weight / LOG2E * (expected_n - missed_n * t_n)
        attractions_n = attractions_n - teacher.weight * missed_n
    return losses_n, attractions_n


def _joined(negatives: OnlineLogSumExp | OnlineExpectation, t_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join the own pair's logit t, which is float64, to the negatives of its row or column.

    Returns:
        The maximum of both; what turns the negatives' sums to be relative to it, and the sum of all; both float64.
    """
    shift_n = torch.maximum(negatives.max_n, t_n.to(negatives.max_n.dtype))
    scale_n = torch.exp2(negatives.max_n.double() - shift_n)
    return shift_n, scale_n, negatives.sum_n * scale_n + torch.exp2(t_n - shift_n)


def _weights(
    pair: PairState, stats: SoftmaxStatistics, positives_n: Sequence[Tensor], share: float | Tensor
) -> PairWeights:
    """Return the softmaxes over the negatives and the own pair, halved: the student's, and each teacher's share.

    share: what a softmax counts of what one along a row does.
    """
    teachers = [
        _half_weights(part, own_n, teacher.weight)
        for teacher, part, own_n in zip(pair.teachers, stats.teachers, positives_n[1:], strict=True)
    ]
    student = _half_weights(stats.student, positives_n[0], share)
    if pair.owners.owner_m is None:
        return PairWeights(student, teachers)
    # What has no positive has no loss, and perhaps no entry at all.
    shift_n = torch.where(student.shift_n == -torch.inf, 0, student.shift_n)
    factor_n = torch.where(positives_n[0] == -torch.inf, 0, student.factor_n)
    return PairWeights(SoftmaxWeights(shift_n, factor_n), teachers)


def _half_weights(
    negatives: OnlineLogSumExp | OnlineExpectation, t_n: Tensor, weight: float | Tensor
) -> SoftmaxWeights:
    shift_n, _, total_n = _joined(negatives, t_n)
    return SoftmaxWeights(shift_n, (0.5 * weight / total_n).to(shift_n.dtype))


def softmax_backward(
    pairs: Sequence[PairState],
    outputs: Sequence[SoftmaxOutputs],
    teachers: Sequence[TeacherOutputs],
    grads: Sequence[Tensor],
    exchange: ColumnExchange,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (dx, dy, d log_scale) of every pair; empty where not wanted. grads: one 0-d gradient a pair."""
    dx_bD = [pair.zero_row_gradient() for pair in pairs]
    rows_b, cols_B, caches = [], [], []
    rest = iter(teachers)
    for pair, part in zip(pairs, outputs, strict=True):
        own_teachers = list(itertools.islice(rest, len(pair.teachers)))
        of_rows = [SoftmaxWeights(teacher.row_shift_b, teacher.row_factor_b) for teacher in own_teachers]
        of_cols = [SoftmaxWeights(teacher.col_shift_B, teacher.col_factor_B) for teacher in own_teachers]
        rows_b.append(PairWeights(SoftmaxWeights(part.row_shift_b, part.row_factor_b), of_rows))
        cols_B.append(PairWeights(SoftmaxWeights(part.col_shift_B, part.col_factor_B), of_cols))
        caches.append(CachedTiles(part.cache_n, 1 + len(pair.teachers)))

    def add(block: ColumnBlock, dy_sD: Tensor | None) -> None:
        k = block.pair
        if dx_bD[k] is not None or dy_sD is not None:
            softmax_gradients(pairs[k], block, rows_b[k], cols_B[k], caches[k], dx_bD[k], dy_sD)

    exchange.accumulate_gradients(add)
    results = []
    for k, pair in enumerate(pairs):
        factor = pair.gradient_factor(grads[k], pair.num_anchors)
        results.append(pair.finish_gradients(dx_bD[k], exchange.own_gradient(k), outputs[k].attraction_m, factor))
    return results
