"""Distillation over a global batch: a student's similarities against those of frozen teachers."""

from collections.abc import Sequence

from torch import Tensor

from threetowers.kernels.operator.pair_losses import pair_losses
from threetowers.kernels.pair import DistillationPair, LossKind, PairResult, Teacher
from threetowers.kernels.validation import argument_fault


def distillation_losses(
    pairs: Sequence[DistillationPair],
    *,
    kind: LossKind = "softmax",
    group_ids: Tensor | None = None,
    logit_cache_bytes: int = 0,
    ring: bool = False,
    check: bool = True,
) -> list[PairResult]:
    """Return the losses of several students' pairs over one global batch, with one set of collectives for all of them.

    Equations, conventions and errors are those of `distillation_loss`; accuracies are the student's.

    Args:
        pairs: 1 to 32 pairs, each with teachers of its own. Local batches may differ from pair to pair (where some
            samples lack a side), as long as no group_ids are given.
        kind: "softmax" or "sigmoid", for all pairs.
        group_ids: int64 (b,), for all pairs.
        logit_cache_bytes: the budget of all pairs together.
        ring: whether column features travel from rank to rank instead of being gathered.
        check: whether to raise where values do not fit, for which a GPU is waited for once. False: nothing is waited
            for, and what is wrong with a pair's values is told by `PairResult.fault`.

    Returns:
        The loss, the accuracies and the sample losses of each pair, and what is wrong with its values.

    Raises:
        ValueError: an argument does not fit; the message names the pair and the teacher.

    Examples:
        >>> import torch
        >>> x_bD, scale = torch.eye(2), torch.zeros(1)
        >>> sure = Teacher(x_bD, x_bD, log_scale=torch.full([1], 4.0))
        >>> unsure = Teacher(torch.zeros(2, 1), torch.zeros(2, 1), scale)
        >>> pairs = [DistillationPair(x_bD, x_bD, scale, [teacher]) for teacher in (sure, unsure)]
        >>> results = distillation_losses(pairs)
        >>> [round(float(result.loss), 4) for result in results]
        [0.3133, 0.8133]
    """
    fault = argument_fault(pairs, group_ids, kind, logit_cache_bytes)
    return pair_losses(pairs, fault, kind, group_ids, logit_cache_bytes, ring, check)


def distillation_loss(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    teachers: Sequence[Teacher],
    *,
    bias: Tensor | None = None,
    hard_weight: float = 0.0,
    kind: LossKind = "softmax",
    group_ids: Tensor | None = None,
    logit_cache_bytes: int = 0,
    ring: bool = False,
    check: bool = True,
) -> Tensor:
    """Return the cross entropy of the student's similarities against its teachers', in memory linear in the batch.

    The student's logits are ``z_ij = exp(log_scale) <x_i, y_j> + bias``, teacher k's are
    ``t_k,ij = exp(log_scale_k) <u_k,i, v_k,j> + bias_k``, of the features as given (normalise them before). With
    teachers' weights w_k (normalised to sum to 1) and λ the hard_weight, the loss is the mean over i of

    - softmax: ``-½ Σ_j τ_ij log P(y_j | x_i) - ½ Σ_j τ'_ij log P(x_j | y_i)``, where the target of a row is
      ``τ_ij = λ [i = j] + (1 - λ) Σ_k w_k softmax_j(t_k,i)``, and τ' is the same over columns (CLIP-KD, Yang et al.
      2024; MobileCLIP, Vasu et al. 2024; TinyCLIP, Wu et al. 2023). It has the gradient of the KL divergence, which is
      less by the target's entropy;
    - sigmoid: ``Σ_j softplus(z_ij) - τ_ij z_ij`` with ``τ_ij = λ [i = j] + (1 - λ) Σ_k w_k σ(t_k,ij)``.

    The global batch joins the rows of all ranks of the default process group, where torch.distributed is initialised.

    Args:
        x: the student's local features (b, D), float32, bfloat16, float16 or float64. Ranks may hold different b, also
            none. A side that needs no gradient costs no gradient product.
        y: local features (b, D) of the same dtype.
        log_scale: shape [1]; the scale is its exponential.
        teachers: one or more, of any widths E. None of them gets a gradient, log_scale and bias included: lowering the
            loss by them would only sharpen the target.
        bias: shape [1], for the sigmoid loss only; None: 0.
        hard_weight: λ, the share of the samples' own pairs in the target: 1 is the contrastive loss.
        kind: "softmax" or "sigmoid".
        group_ids: int64 (b,). Samples of equal ids meet neither in the student's nor in the teachers' softmax or sum,
            but for a sample's own pair. None: all meet, as a teacher knows by itself which samples are alike.
        logit_cache_bytes: memory in which similarity tiles, the student's and the teachers', may be kept from forward
            to backward. At 0 the softmax costs ``4 + 2 Σ_k E_k / D`` passes, products of 2 B B D operations each; with
            room for all tiles ``3 + Σ_k E_k / D``, as the sigmoid always does.
        ring: on several ranks, pass the column side from rank to rank instead of gathering it.
        check: whether to raise where values do not fit, for which a GPU is waited for once. False: nothing is waited
            for, and such values give a loss and gradients that mean nothing; `distillation_losses` tells of them.

    Returns:
        The global batch's loss, the same on all ranks, float32 (float64 for float64 features); scaling of gradients,
        determinism and conditions are those of `contrastive_loss`.

    Raises:
        ValueError: shapes, types, devices, values (NaN, infinite, beyond floating point) or ranks that do not fit, the
            teachers' too; before any tile is computed, and on all ranks, whichever of them was at fault.
        RuntimeError: the loss is differentiated twice.

    Examples:
        A teacher that holds all pairs for equally likely, at scale 1: ``log(1 + e) - 1/2``.

        >>> import torch
        >>> x_bD = torch.eye(2, requires_grad=True)
        >>> unsure = Teacher(torch.zeros(2, 1), torch.zeros(2, 1), log_scale=torch.zeros(1))
        >>> round(float(distillation_loss(x_bD, torch.eye(2), torch.zeros(1), [unsure]).detach()), 4)
        0.8133
    """
    pairs = [DistillationPair(x, y, log_scale, teachers, bias, hard_weight)]
    (result,) = distillation_losses(
        pairs, kind=kind, group_ids=group_ids, logit_cache_bytes=logit_cache_bytes, ring=ring, check=check
    )
    return result.loss
