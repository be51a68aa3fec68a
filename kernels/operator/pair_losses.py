"""The way of several pairs through the operator: into its flat lists and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from threetowers.kernels.distributed.agreement import agree_on_sizes
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.operator.operators import contrastive_forward, outputs_per_pair
from threetowers.kernels.pair import DistillationPair, LossKind, PairResult, Teacher


def pair_losses(
    pairs: Sequence[DistillationPair],
    fault: str | None,
    kind: LossKind,
    group_ids: Tensor | None,
    logit_cache_bytes: int,
    ring: bool,
    check: bool,
    owner: Sequence[Tensor | None] = (),
    column_group_ids: Sequence[Tensor | None] = (),
    margin: float | None = None,
) -> list[PairResult]:
    """Return the results of pairs with any number of teachers, also none. The options are `contrastive_losses`'.

    Args:
        pairs: the pairs.
        fault: what is wrong with the arguments of this rank, of which all ranks are told.
        kind: of the loss.
        group_ids: int64 (b,).
        logit_cache_bytes: the budget of all pairs together.
        ring: whether columns travel from rank to rank.
        check: whether to raise where values do not fit.
        owner: of the columns of each pair, as in `Pair`; such pairs have no teachers. (): all pairs are matched.
        column_group_ids: of each pair, as in `Pair`.
        margin: see `contrastive_losses`.

    Raises:
        ValueError: a rank has a fault, or ranks do not fit each other, or values do not fit.
    """
    if fault:
        agree_on_sizes(RankGroup(), fault, "", [], [])  # raises, on all ranks

    # Only the column side's gradient crosses ranks: a side without one is the better column side. With owners the sides
    # differ, and stay as they are.
    owner = list(owner) or [None] * len(pairs)
    column_group_ids = list(column_group_ids) or [None] * len(pairs)
    swapped = [
        of_columns is None and _wants_gradient(pair.y) and not _wants_gradient(pair.x)
        for pair, of_columns in zip(pairs, owner, strict=True)
    ]
    x = [pair.y if swap else pair.x for pair, swap in zip(pairs, swapped, strict=True)]
    y = [pair.x if swap else pair.y for pair, swap in zip(pairs, swapped, strict=True)]
    log_scale = [pair.log_scale for pair in pairs]
    bias = _biases(pairs) if kind == "sigmoid" else []

    # The teachers of all pairs in a row, each with its share of the target.
    teachers: list[Teacher] = []
    teacher_counts: list[int] = []
    shares: list[float] = []
    for pair, swap in zip(pairs, swapped, strict=True):
        used = _used_teachers(pair)
        total = sum(teacher.weight for teacher in used)
        teacher_counts.append(len(used))
        shares += [(1 - pair.hard_weight) * teacher.weight / total for teacher in used]
        teachers += [teacher._replace(u=teacher.v, v=teacher.u) if swap else teacher for teacher in used]

    outputs = contrastive_forward(
        x,
        y,
        log_scale,
        bias,
        [teacher.u.detach() for teacher in teachers],
        [teacher.v.detach() for teacher in teachers],
        [teacher.log_scale.detach() for teacher in teachers],
        [part.detach() for part in _biases(teachers)] if kind == "sigmoid" else [],
        teacher_counts,
        shares,
        owner,
        column_group_ids,
        group_ids,
        margin,
        kind,
        logit_cache_bytes,
        ring,
        [_wants_gradient(part) for part in x],
        [_wants_gradient(part) for part in y],
        [_wants_gradient(part) for part in log_scale],
        swapped,
        check,
    )
    faults_K = outputs[-1].detach()

    results = []
    for k, swap in enumerate(swapped):
        first = k * outputs_per_pair(kind)
        loss, accuracy_2, losses_b = outputs[first : first + 3]
        accuracies = accuracy_2.detach().flip(0) if swap else accuracy_2.detach()
        results.append(PairResult(loss, accuracies[0], accuracies[1], faults_K[k], losses_b.detach()))
    return results


def _wants_gradient(part: Tensor) -> bool:
    return torch.is_grad_enabled() and part.requires_grad


def _biases(owners: Sequence[DistillationPair | Teacher]) -> list[Tensor]:
    """Return a bias for each, 0 where none is given."""
    return [owner.log_scale.new_zeros(1) if owner.bias is None else owner.bias for owner in owners]


def _used_teachers(pair: DistillationPair) -> list[Teacher]:
    """Return the teachers that have a share of the target."""
    if pair.hard_weight == 1:
        return []
    return [teacher for teacher in pair.teachers if teacher.weight > 0]
