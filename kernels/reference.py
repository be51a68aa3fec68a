"""The dense reference: every logit kept, any precision, one process. Slow and obvious: all else is held against it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def dense_logits(x_BD: Tensor, y_BD: Tensor, log_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The (B, B) logits ``exp(log_scale) * x @ y.T + bias`` computed in ``dtype``."""
    logits_BB = log_scale.to(dtype).exp() * (x_BD.to(dtype) @ y_BD.to(dtype).T)
    return logits_BB if bias is None else logits_BB + bias.to(dtype)


def negatives_mask(batch: int, sample_ids: Tensor | None, device: torch.device) -> Tensor:
    """(B, B) bool: True where column j is an admissible negative of row i."""
    if sample_ids is None:
        return ~torch.eye(batch, dtype=torch.bool, device=device)
    return sample_ids[:, None] != sample_ids[None, :]


def dense_losses_per_sample(
    x_BD: Tensor,
    y_BD: Tensor,
    log_scale: Tensor,
    *,
    bias: Tensor | None = None,
    family: str = "softmax",
    sample_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Per-sample losses (B,) in ``dtype``, differentiable by autograd to any order.

    softmax: ``½(softplus(lse_j≠i s_ij - s_ii) + softplus(lse_j≠i s_ji - s_ii))``, which is cross entropy written
    without the cancellation of confident pairs (InfoNCE, van den Oord et al. 2018; CLIP, Radford et al. 2021).
    sigmoid: ``softplus(-s_ii) + Σ_j softplus(s_ij)`` (SigLIP, Zhai et al. 2023).
    """
    logits_BB = dense_logits(x_BD, y_BD, log_scale, bias, dtype)
    positives_B = logits_BB.diagonal()
    negative_BB = negatives_mask(len(logits_BB), sample_ids, logits_BB.device)
    if family == "sigmoid":
        return softplus(-positives_B) + torch.where(negative_BB, softplus(logits_BB), 0).sum(1)
    # finite rather than -inf: a row without any negative would otherwise give NaN gradients
    floor = torch.finfo(dtype).min / 2
    off_BB = logits_BB.masked_fill(~negative_BB, floor)
    rows_B = _softplus(off_BB.logsumexp(1) - positives_B)
    columns_B = _softplus(off_BB.logsumexp(0) - positives_B)
    return (rows_B + columns_B) / 2


def _softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)) with full relative accuracy (torch's switches to the identity at 20, an error of 2e-9)."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def dense_contrastive_loss(
    x_BD: Tensor,
    y_BD: Tensor,
    log_scale: Tensor,
    *,
    bias: Tensor | None = None,
    family: str = "softmax",
    sample_ids: Tensor | None = None,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The loss of `threetowers.kernels.contrastive_loss` on one process, from a full (B, B) matrix in ``dtype``.

    Returns a scalar ("mean", "sum") or (B,) losses ("none"). Memory and time grow with B²: for tests and small batches.
    """
    losses_B = dense_losses_per_sample(
        x_BD, y_BD, log_scale, bias=bias, family=family, sample_ids=sample_ids, dtype=dtype
    )
    if reduction == "none":
        return losses_B
    return losses_B.sum() if reduction == "sum" else losses_B.mean()


def dense_accuracies(
    x_BD: Tensor, y_BD: Tensor, *, sample_ids: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Share of rows, and of columns, whose positive is strictly above every admissible negative: two scalars."""
    sim_BB = x_BD.to(dtype) @ y_BD.to(dtype).T
    off_BB = sim_BB.masked_fill(~negatives_mask(len(sim_BB), sample_ids, sim_BB.device), -torch.inf)
    positives_B = sim_BB.diagonal()
    return (positives_B > off_BB.amax(1)).to(dtype).mean(), (positives_B > off_BB.amax(0)).to(dtype).mean()
