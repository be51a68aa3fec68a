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
    owner: Tensor | None = None,
    column_group_ids: Tensor | None = None,
    margin: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the loss of `threetowers.kernels.contrastive_losses` on one process, from a full matrix of logits.

    With logits ``s_ij = exp(log_scale) <x_i, y_j> + bias``, the mean over i of

    - softmax: ``½(softplus(lse_j≠i s_ij - s_ii) + softplus(lse_j≠i s_ji - s_ii))``, which is cross entropy written
      without the cancellation of confident pairs (InfoNCE, van den Oord et al. 2018; CLIP, Radford et al. 2021);
    - sigmoid: ``softplus(-s_ii) + Σ_j≠i softplus(s_ij)`` (SigLIP, Zhai et al. 2023).

    With owners of M columns, P_i the columns that row i owns and N_i its negatives:

    - softmax: half the mean over rows that own a column of ``mean_j∈P_i lse_k∈P_i∪N_i s_ik - s_ij``, and half the mean
      over columns j with an owner i of ``softplus(lse_k s_kj - s_ij)``, k the rows that j is a negative of;
    - sigmoid: ``(Σ_i Σ_j∈P_i softplus(-s_ij) + Σ_i Σ_j∈N_i softplus(s_ij)) / B``.

    Memory and time grow with B · M: for tests and small batches.

    Args:
        x_BD: features (B, D).
        y_BD: features (B, D), matched with x_BD row by row; with owners (M, D).
        log_scale: shape [1]; the scale is its exponential.
        bias: shape [1], added to every logit; None: 0.
        kind: "softmax" or "sigmoid".
        group_ids: int64 (B,); samples of equal ids are no negatives of each other. None: every sample is its own group.
        owner: int64 (M,), see `Pair`; None: column i is row i's.
        column_group_ids: int64 (M,), see `Pair`.
        margin: see `contrastive_losses`.
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
    positive_BB, negative_BB = _positives_and_negatives(x_BD, y_BD, group_ids, owner, column_group_ids, margin, dtype)
    if owner is not None:
        return _loss_with_owners(logits_BB, positive_BB, negative_BB, kind)
    positives_B = logits_BB.diagonal()
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


def _loss_with_owners(logits_BM: Tensor, positive_BM: Tensor, negative_BM: Tensor, kind: str) -> Tensor:
    if kind == "sigmoid":
        own_BM = torch.where(positive_BM, _softplus(-logits_BM), 0)
        return (own_BM + torch.where(negative_BM, _softplus(logits_BM), 0)).sum() / len(logits_BM)
    anchors = positive_BM.any(1)
    log_p_BM = logits_BM.masked_fill(~(positive_BM | negative_BM), torch.finfo(logits_BM.dtype).min / 2).log_softmax(1)
    own_BM = torch.where(positive_BM, -log_p_BM, 0)
    rows_n = own_BM[anchors].sum(1) / positive_BM[anchors].sum(1)
    owned = positive_BM.any(0)
    off_BM = logits_BM.masked_fill(~negative_BM, torch.finfo(logits_BM.dtype).min / 2)
    columns_n = _softplus(off_BM[:, owned].logsumexp(0) - logits_BM.T[positive_BM.T])
    return (rows_n.mean() + columns_n.mean()) / 2


def reference_accuracies(
    x_BD: Tensor,
    y_BD: Tensor,
    *,
    group_ids: Tensor | None = None,
    owner: Tensor | None = None,
    column_group_ids: Tensor | None = None,
    margin: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return the share of rows, and of columns, whose positive is strictly above every admissible negative.

    Of several positives of a row the best one counts, and what has none is left out.

    Args:
        x_BD: features (B, D).
        y_BD: features (B, D), matched with x_BD row by row; with owners (M, D).
        group_ids: int64 (B,); samples of equal ids are no negatives of each other.
        owner: int64 (M,), see `Pair`; None: column i is row i's.
        column_group_ids: int64 (M,), see `Pair`.
        margin: see `contrastive_losses`.
        dtype: of all arithmetic.

    Returns:
        Two scalars.

    Examples:
        >>> x_BD = torch.eye(2)
        >>> [float(share) for share in reference_accuracies(x_BD, x_BD.flip(0))]
        [0.0, 0.0]
    """
    sim_BB = x_BD.to(dtype) @ y_BD.to(dtype).T
    positive_BB, negative_BB = _positives_and_negatives(x_BD, y_BD, group_ids, owner, column_group_ids, margin, dtype)
    shares = []
    for dim in (1, 0):
        best_n = sim_BB.masked_fill(~positive_BB, -torch.inf).amax(dim)
        won_n = best_n > sim_BB.masked_fill(~negative_BB, -torch.inf).amax(dim)
        shares.append(won_n[positive_BB.any(dim)].to(dtype).mean())
    return shares[0], shares[1]


def _positives_and_negatives(
    x_BD: Tensor,
    y_MD: Tensor,
    group_ids: Tensor | None,
    owner: Tensor | None,
    column_group_ids: Tensor | None,
    margin: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return (B, M) bool twice: True where column j is a positive, and where it is an admissible negative, of row i."""
    rows_B = torch.arange(len(x_BD), device=x_BD.device)
    owner_M = rows_B if owner is None else owner
    positive_BM = rows_B[:, None] == owner_M
    negative_BM = ~positive_BM
    if group_ids is not None:
        own_BM = (group_ids[:, None] == group_ids[owner_M.clamp(min=0)]) & (owner_M >= 0)
        negative_BM = negative_BM & ~own_BM
    if group_ids is not None and column_group_ids is not None:
        negative_BM = negative_BM & ~((group_ids[:, None] == column_group_ids) & (owner_M < 0))
    if margin is not None:
        sim_BM = (x_BD.to(dtype) @ y_MD.to(dtype).T).detach()
        smallest_BM = sim_BM.masked_fill(~positive_BM, torch.inf)
        above_row_BM = sim_BM > smallest_BM.amin(1, keepdim=True) + margin
        above_column_BM = sim_BM > smallest_BM.amin(0) + margin
        negative_BM = negative_BM & ~above_row_BM & ~above_column_BM
    return positive_BM, negative_BM


def _negatives(batch: int, group_ids: Tensor | None, device: torch.device) -> Tensor:
    """Return (B, B) bool: True where column j is an admissible negative of row i."""
    if group_ids is None:
        return ~torch.eye(batch, dtype=torch.bool, device=device)
    return group_ids[:, None] != group_ids[None, :]


def _softplus(z: Tensor) -> Tensor:
    """Return log(1 + exp(z)) with full relative accuracy (torch's is the identity from 20 on, an error of 2e-9)."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
