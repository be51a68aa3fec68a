"""Contrastive losses over a global batch: bidirectional softmax (InfoNCE) and sigmoid (SigLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from threetowers.kernels.dense import dense_accuracies, dense_losses_per_sample

Family = Literal["softmax", "sigmoid"]
Reduction = Literal["mean", "sum", "none"]


class Pair(NamedTuple):
    """One pair term: local features x and y (b, D), log_scale [1], and for the sigmoid family a bias [1]."""

    x: Tensor
    y: Tensor
    log_scale: Tensor
    bias: Tensor | None = None


class PairResult(NamedTuple):
    """Loss of one pair term, and the share of the global batch's rows (x→y) and columns (y→x) whose positive is
    strictly above every admissible negative (detached scalars)."""

    loss: Tensor
    accuracy_xy: Tensor
    accuracy_yx: Tensor


def contrastive_losses(
    pairs: Sequence[Pair],
    *,
    family: Family = "softmax",
    sample_ids: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    workspace_bytes: int = 0,
    reduction: Reduction = "mean",
) -> list[PairResult]:
    """Losses of several pair terms over one global batch. See `contrastive_loss`."""
    return [_dense(pair, family, sample_ids, process_group, reduction) for pair in pairs]


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    *,
    bias: Tensor | None = None,
    family: Family = "softmax",
    sample_ids: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    workspace_bytes: int = 0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Contrastive loss of matched rows x_bD and y_bD over the batch joined from all ranks.

    The value is the global batch's mean loss, the same on all ranks. Gradients are scaled for mean-averaging (DDP,
    DeepSpeed): after averaging parameter gradients over ranks, features, scale and bias get exactly the gradient of the
    one-process loss on the joined batch.
    """
    return contrastive_losses(
        [Pair(x, y, log_scale, bias)],
        family=family,
        sample_ids=sample_ids,
        process_group=process_group,
        workspace_bytes=workspace_bytes,
        reduction=reduction,
    )[0].loss


def _dense(
    pair: Pair, family: Family, ids: Tensor | None, group: dist.ProcessGroup | None, reduction: Reduction
) -> PairResult:
    x_BD, y_BD, start = pair.x, pair.y, 0
    if dist.is_available() and dist.is_initialized():
        sizes: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(sizes, len(pair.x), group)
        start = sum(sizes[: dist.get_rank(group)])
        x_BD, y_BD = (_join(part, sizes, group) for part in (pair.x, pair.y))
        ids = None if ids is None else _join(ids, sizes, group)
    losses_B = dense_losses_per_sample(
        x_BD, y_BD, pair.log_scale, bias=pair.bias, family=family, sample_ids=ids, dtype=torch.float32
    )
    if reduction == "none":
        losses = losses_B[start : start + len(pair.x)]
    else:
        losses = losses_B.mean() if reduction == "mean" else losses_B.sum()
    with torch.no_grad():
        return PairResult(losses, *dense_accuracies(x_BD, y_BD, sample_ids=ids, dtype=torch.float32))


def _join(part_bD: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows in rank order; the own rows stay in the graph, with their gradient times the number of ranks."""
    padded = part_bD.new_zeros(max(sizes), *part_bD.shape[1:])
    padded[: len(part_bD)] = part_bD.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group)
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    if part_bD.is_floating_point():
        parts[dist.get_rank(group)] = cast(Tensor, _TimesRanks.apply(part_bD, len(sizes)))
    return torch.cat(parts)


class _TimesRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_bD: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return part_bD.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.ranks, None
