"""Contrastive losses over a global batch: bidirectional softmax (InfoNCE) and sigmoid (SigLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from threetowers.kernels.distributed import RankGroup, group_name
from threetowers.kernels.operators import PER_PAIR, contrastive_forward
from threetowers.kernels.validation import settle, shape_fault

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
    above every admissible negative by more than rounding (detached scalars, the same on all ranks)."""

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
    ring: bool = False,
) -> list[PairResult]:
    """Losses of several pair terms over one global batch, with one set of collectives for all of them.

    Arguments, conventions and errors are those of `contrastive_loss`. Local batches may differ from pair to pair (a
    term that some samples lack) as long as no sample_ids are given. At most 32 pairs. workspace_bytes is the budget of
    all pairs together.
    """
    x, y = [pair.x for pair in pairs], [pair.y for pair in pairs]
    log_scale, bias = [pair.log_scale for pair in pairs], [pair.bias for pair in pairs]
    group = group_name(process_group)
    fault = shape_fault(x, y, log_scale, bias, sample_ids, family, reduction, workspace_bytes)
    if fault:
        settle(RankGroup(group), fault, "", [])
    needs = [_wants(part) for pair in pairs for part in (pair.x, pair.y, pair.log_scale)]
    swapped = [_column_side_is_better_x(pair, family, reduction) for pair in pairs]
    for k, swap in enumerate(swapped):
        if swap:
            x[k], y[k] = y[k], x[k]
            needs[3 * k], needs[3 * k + 1] = needs[3 * k + 1], needs[3 * k]
    biases = []
    if family == "sigmoid":
        biases = [pair.log_scale.new_zeros(1) if pair.bias is None else pair.bias for pair in pairs]
    flat = contrastive_forward(
        x, y, log_scale, biases, sample_ids, family, reduction, group, workspace_bytes, ring, needs
    )
    results = []
    for k, swap in enumerate(swapped):
        loss, accuracy_2 = flat[PER_PAIR * k], flat[PER_PAIR * k + 1].detach()
        results.append(PairResult(loss, accuracy_2[int(swap)], accuracy_2[1 - int(swap)]))
    return results


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
    ring: bool = False,
) -> Tensor:
    """Contrastive loss of matched rows of x and y over the batch joined from all ranks, in memory linear in the batch.

    Logits are ``s_ij = exp(log_scale) <x_i, y_j> + bias`` of the features as given (normalise them before).
    softmax: InfoNCE in both directions, the mean of ``½ (-log P(y_i | x_i) - log P(x_i | y_i))`` (van den Oord et al.
    2018; CLIP, Radford et al. 2021). sigmoid: the mean over i of ``softplus(-s_ii) + Σ_j≠i softplus(s_ij)`` (SigLIP,
    Zhai et al. 2023).

    Args:
        x, y: local features (b, D), float32, bfloat16, float16 or float64, the same for both. Ranks may hold different
            b, also none. A side that needs no gradient costs no gradient product. Logits and sums are float32 or better
            whatever the features are, also under autocast; products of float32 features are as exact as
            torch.get_float32_matmul_precision() says.
        log_scale: shape [1]; the scale is its exponential.
        bias: shape [1], sigmoid only; 0 if not given.
        sample_ids: int64 (b,). Pairs of equal ids, other than a sample with itself, are no negatives of each other:
            they leave the softmax's denominators or the sigmoid's sum.
        process_group: ranks that share the batch. None: the default group where torch.distributed is initialised, else
            this process alone.
        workspace_bytes: memory in which similarity tiles may be kept from forward to backward. At 0 the softmax costs
            4 products of 2 B B D operations (forward 1, backward 3); with room for all tiles 3. The sigmoid always
            costs 3, with reduction "none" 4. On the CPU 32 MiB or more wait for the next step once backward is through,
            and the system may have them back when it is short of memory.
        reduction: "mean" or "sum" over the global batch, or "none" for the losses (b,) of the local samples.
        ring: on several ranks, pass the column side from rank to rank instead of gathering it: features then take
            O(b D) memory a rank instead of O(B D), as gradients always do, and are sent again in backward.

    Returns:
        The loss, float32 (float64 for float64 features). "mean" and "sum" give the global batch's value, the same on
        all ranks. Gradients are scaled for the averaging of DDP and DeepSpeed: once parameter gradients are averaged
        over ranks, those of features, scale and bias are exactly those of one process with the joined batch. The
        gradient that arrives at a "mean" or "sum" must be the same on all ranks, while "none" takes any weights per
        sample and leads to the gradient of the mean over ranks of each one's weighted sum. Deterministic to the bit on
        one device.

    Raises:
        ValueError: shapes, types, devices, values (NaN, infinite, beyond floating point) or ranks that do not fit;
            before any work, and on all ranks, whichever of them was at fault.
        RuntimeError: when differentiated twice.
    """
    return contrastive_losses(
        [Pair(x, y, log_scale, bias)],
        family=family,
        sample_ids=sample_ids,
        process_group=process_group,
        workspace_bytes=workspace_bytes,
        reduction=reduction,
        ring=ring,
    )[0].loss


def _wants(part: Tensor) -> bool:
    return torch.is_grad_enabled() and part.requires_grad


def _column_side_is_better_x(pair: Pair, family: str, reduction: str) -> bool:
    """Whether swapping the sides saves the reduction of dy over ranks: only the column side's gradient travels."""
    symmetric = family == "softmax" or reduction != "none"
    return symmetric and _wants(pair.y) and not _wants(pair.x)
