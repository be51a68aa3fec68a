"""The reference: every logit kept, any precision, one process. Slow and obvious: all else is tested against it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from threetowers.kernels.pair import Teacher


def reference_contrastive_loss(
    x_BD: Tensor,
    y_BD: Tensor,
    log_scale: Tensor,
    *,
    bias: Tensor | None = None,
    kind: str = "softmax",
    group_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the loss of `threetowers.kernels.contrastive_loss` on one process, from a full (B, B) matrix of logits.

    With logits ``s_ij = exp(log_scale) <x_i, y_j> + bias``, the mean over i of

    - softmax: ``½(softplus(lse_j≠i s_ij - s_ii) + softplus(lse_j≠i s_ji - s_ii))``, which is cross entropy written
      without the cancellation of confident pairs (InfoNCE, van den Oord et al. 2018; CLIP, Radford et al. 2021);
    - sigmoid: ``softplus(-s_ii) + Σ_j≠i softplus(s_ij)`` (SigLIP, Zhai et al. 2023).

    Memory and time grow with B²: for tests and small batches.

    Args:
        x_BD: features (B, D).
        y_BD: features (B, D), matched with x_BD row by row.
        log_scale: shape [1]; the scale is its exponential.
        bias: shape [1], added to every logit; None: 0.
        kind: "softmax" or "sigmoid".
        group_ids: int64 (B,); samples of equal ids are no negatives of each other. None: every sample is its own group.
        dtype: of all arithmetic.

    Returns:
        The mean loss, a scalar in ``dtype`` that autograd can differentiate to any order.

    Examples:
        Two matched rows at right angles, at scale 1: ``log(1 + exp(0 - 1))``.

        >>> x_BD = torch.eye(2)
        >>> round(float(reference_contrastive_loss(x_BD, x_BD, torch.zeros(1))), 4)
        0.3133
    """
    logits_BB = _logits(x_BD, y_BD, log_scale, bias, dtype)
    positives_B = logits_BB.diagonal()
    negative_BB = _negatives(len(logits_BB), group_ids, logits_BB.device)
    if kind == "sigmoid":
        losses_B = softplus(-positives_B) + torch.where(negative_BB, softplus(logits_BB), 0).sum(1)
        return losses_B.mean()
    # finite rather than -inf: a row without any negative would otherwise give NaN gradients
    floor = torch.finfo(dtype).min / 2
    off_BB = logits_BB.masked_fill(~negative_BB, floor)
    rows_B = _softplus(off_BB.logsumexp(1) - positives_B)
    columns_B = _softplus(off_BB.logsumexp(0) - positives_B)
    return ((rows_B + columns_B) / 2).mean()


def reference_distillation_loss(
    x_BD: Tensor,
    y_BD: Tensor,
    log_scale: Tensor,
    teachers: Sequence[Teacher],
    *,
    bias: Tensor | None = None,
    hard_weight: float = 0.0,
    kind: str = "softmax",
    group_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the loss of `threetowers.kernels.distillation_loss` on one process, from full (B, B) matrices of logits.

    Args and result are those of `reference_contrastive_loss`, teachers and hard_weight those of `distillation_loss`.

    Examples:
        >>> x_BD = torch.eye(2)
        >>> teacher = Teacher(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(1))
        >>> round(float(reference_distillation_loss(x_BD, x_BD, torch.zeros(1), [teacher])), 4)
        0.8133
    """
    meet_BB = _negatives(len(x_BD), group_ids, x_BD.device) | torch.eye(len(x_BD), dtype=torch.bool, device=x_BD.device)
    total = sum(teacher.weight for teacher in teachers)
    logits_BB = _logits(x_BD, y_BD, log_scale, bias, dtype)
    own_BB = torch.eye(len(x_BD), dtype=dtype, device=x_BD.device)
    if kind == "sigmoid":
        target_BB = hard_weight * own_BB
        for u_BE, v_BE, teacher_scale, teacher_bias, weight in teachers:
            teacher_BB = _logits(u_BE, v_BE, teacher_scale, teacher_bias, dtype).detach()
            target_BB = target_BB + (1 - hard_weight) * weight / total * teacher_BB.sigmoid()
        return torch.where(meet_BB, _softplus(logits_BB) - target_BB * logits_BB, 0).sum(1).mean()

    losses = []
    for dim in (1, 0):
        target_BB = hard_weight * own_BB
        for u_BE, v_BE, teacher_scale, _, weight in teachers:
            teacher_BB = _logits(u_BE, v_BE, teacher_scale, None, dtype).detach().masked_fill(~meet_BB, -torch.inf)
            target_BB = target_BB + (1 - hard_weight) * weight / total * teacher_BB.softmax(dim)
        log_p_BB = logits_BB - logits_BB.masked_fill(~meet_BB, -torch.inf).logsumexp(dim, keepdim=True)
        losses.append(-(target_BB * log_p_BB).sum(dim).mean())
    return (losses[0] + losses[1]) / 2


def _logits(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits_BB = log_scale.to(dtype).exp() * (x_BD.to(dtype) @ y_BD.to(dtype).T)
    return logits_BB if bias is None else logits_BB + bias.to(dtype)


def reference_accuracies(
    x_BD: Tensor, y_BD: Tensor, *, group_ids: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return the share of rows, and of columns, whose positive is strictly above every admissible negative.

    Args:
        x_BD: features (B, D).
        y_BD: features (B, D), matched with x_BD row by row.
        group_ids: int64 (B,); samples of equal ids are no negatives of each other.
        dtype: of all arithmetic.

    Returns:
        Two scalars.

    Examples:
        >>> x_BD = torch.eye(2)
        >>> [float(share) for share in reference_accuracies(x_BD, x_BD.flip(0))]
        [0.0, 0.0]
    """
    sim_BB = x_BD.to(dtype) @ y_BD.to(dtype).T
    off_BB = sim_BB.masked_fill(~_negatives(len(sim_BB), group_ids, sim_BB.device), -torch.inf)
    positives_B = sim_BB.diagonal()
    return (positives_B > off_BB.amax(1)).to(dtype).mean(), (positives_B > off_BB.amax(0)).to(dtype).mean()


def _negatives(batch: int, group_ids: Tensor | None, device: torch.device) -> Tensor:
    """Return (B, B) bool: True where column j is an admissible negative of row i."""
    if group_ids is None:
        return ~torch.eye(batch, dtype=torch.bool, device=device)
    return group_ids[:, None] != group_ids[None, :]


def _softplus(z: Tensor) -> Tensor:
    """Return log(1 + exp(z)) with full relative accuracy (torch's is the identity from 20 on, an error of 2e-9)."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
