"""Contrastive losses over a global batch: bidirectional softmax (InfoNCE) and sigmoid (SigLIP)."""

from collections.abc import Sequence

from torch import Tensor

from threetowers.kernels.operator.pair_losses import pair_losses
from threetowers.kernels.pair import DistillationPair, LossKind, Pair, PairResult
from threetowers.kernels.validation import argument_fault


def contrastive_losses(
    pairs: Sequence[Pair],
    *,
    kind: LossKind = "softmax",
    group_ids: Tensor | None = None,
    margin: float | None = None,
    logit_cache_bytes: int = 0,
    ring: bool = False,
    check: bool = True,
) -> list[PairResult]:
    """Return the losses of several pairs over one global batch, with one set of collectives for all of them.

    Three towers have three pairs. Conventions and errors are those of `contrastive_loss`, and so are the equations
    where rows of x and y are matched. Where columns have owners (`Pair.owner`), P_i the columns that row i owns, the
    loss is

    - softmax: ``½ mean_i 1/|P_i| Σ_j∈P_i -log P(y_j | x_i) + ½ mean_j -log P(x_owner(j) | y_j)``, the first over rows
      that own a column (L_out of supervised contrastive learning, Khosla et al. 2020), the second over columns that
      have an owner. P(y_j | x_i) is over the columns that i owns and those of no equal group id, P(x_i | y_j) over the
      owner and the rows of no equal group id. A row that owns nothing is a negative of columns alone;
    - sigmoid: the sum over all pairs, ``softplus(-s_ij)`` where i owns j and else ``softplus(s_ij)``, over the number
      of rows.

    A pass is then a product of 2 B M D operations, M the columns of all ranks.

    Args:
        pairs: 1 to 32 pairs. Local batches may differ from pair to pair (where some samples lack a side), as long as no
            group_ids are given.
        kind: "softmax" or "sigmoid", for all pairs.
        group_ids: int64 (b,), for all pairs.
        margin: a negative whose dot product is above the smallest of its row's positives, or above its column's
            positive, by more than this is taken for a false negative, and leaves both directions (and the accuracies).
            The bound itself gets no gradient. None: no negative is.
        logit_cache_bytes: the budget of all pairs together.
        ring: whether column features travel from rank to rank instead of being gathered.
        check: whether to raise where values do not fit, for which a GPU is waited for once. False: nothing is waited
            for, and what is wrong with a pair's values is told by `PairResult.fault`.

    Returns:
        The loss, the accuracies and the sample losses of each pair, and what is wrong with its values.

    Raises:
        ValueError: an argument does not fit; the message names the pair.

    Examples:
        >>> import torch
        >>> x_bD = torch.eye(2)
        >>> scale = torch.zeros(1)
        >>> matched, swapped = contrastive_losses([Pair(x_bD, x_bD, scale), Pair(x_bD, x_bD.flip(0), scale)])
        >>> round(float(matched.loss), 4), round(float(swapped.loss), 4)
        (0.3133, 1.3133)
        >>> float(matched.accuracy_xy), float(swapped.accuracy_xy)
        (1.0, 0.0)
    """
    given = [DistillationPair(pair.x, pair.y, pair.log_scale, (), pair.bias, hard_weight=1.0) for pair in pairs]
    fault = argument_fault(pairs, group_ids, kind, logit_cache_bytes, margin)
    of_columns = [pair.owner for pair in pairs], [pair.column_group_ids for pair in pairs]
    return pair_losses(given, fault, kind, group_ids, logit_cache_bytes, ring, check, *of_columns, margin)


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    *,
    bias: Tensor | None = None,
    kind: LossKind = "softmax",
    group_ids: Tensor | None = None,
    logit_cache_bytes: int = 0,
    ring: bool = False,
    check: bool = True,
) -> Tensor:
    """Return the contrastive loss of matched rows of x and y over the global batch, in memory linear in the batch.

    Logits are ``s_ij = exp(log_scale) <x_i, y_j> + bias`` of the features as given (normalise them before). The loss
    is the mean over i of

    - softmax: InfoNCE in both directions, ``½ (-log P(y_i | x_i) - log P(x_i | y_i))`` (van den Oord et al. 2018; CLIP,
      Radford et al. 2021);
    - sigmoid: ``softplus(-s_ii) + Σ_j≠i softplus(s_ij)`` (SigLIP, Zhai et al. 2023).

    The global batch joins the rows of all ranks of the default process group, where torch.distributed is initialised.

    Args:
        x: local features (b, D), float32, bfloat16, float16 or float64. Ranks may hold different b, also none. A side
            that needs no gradient costs no gradient product. Logits and sums are float32 or better whatever the
            features are, also under autocast; products of float32 features are as exact as
            torch.get_float32_matmul_precision() requires.
        y: local features (b, D) of the same dtype.
        log_scale: shape [1]; the scale is its exponential.
        bias: shape [1], for the sigmoid loss only; None: 0.
        kind: "softmax" or "sigmoid".
        group_ids: int64 (b,). Samples of equal ids are no negatives of each other: their pairs leave the softmax's
            denominators or the sigmoid's sum. None: every sample is its own group.
        logit_cache_bytes: memory in which similarity tiles may be kept from forward to backward. At 0 the softmax costs
            4 passes, products of 2 B B D operations each (forward 1, backward 3); with room for all tiles 3. The
            sigmoid always costs 3. On the CPU buffers of 32 MiB or more are reused by the next step once backward has
            ended, and the system may have them back when it is short of memory.
        ring: on several ranks, pass the column side from rank to rank instead of gathering it: features then take
            O(b D) memory a rank instead of O(B D), and so do gradients; features are sent again in backward.
        check: whether to raise where values do not fit, for which a GPU is waited for once. False: nothing is waited
            for, and such values give a loss and gradients that mean nothing; `contrastive_losses` tells of them.

    Returns:
        The global batch's loss, the same on all ranks, float32 (float64 for float64 features). Gradients are scaled for
        the averaging of DDP and DeepSpeed: once parameter gradients are averaged over ranks, those of features, scale
        and bias are exactly those of one process with the joined batch. The gradient that arrives at the loss must be
        the same on all ranks. Deterministic to the bit on one device.

    Raises:
        ValueError: shapes, types, devices, values (NaN, infinite, beyond floating point) or ranks that do not fit;
            before any tile is computed, and on all ranks, whichever of them was at fault.
        RuntimeError: the loss is differentiated twice.

    Examples:
        Two matched rows at right angles, at scale 1: ``log(1 + exp(0 - 1))``.

        >>> import torch
        >>> x_bD = torch.eye(2, requires_grad=True)
        >>> loss = contrastive_loss(x_bD, torch.eye(2), torch.zeros(1))
        >>> round(float(loss.detach()), 4)
        0.3133
        >>> loss.backward()
        >>> x_bD.grad.shape
        torch.Size([2, 2])
    """
    pairs = [Pair(x, y, log_scale, bias)]
    (result,) = contrastive_losses(
        pairs, kind=kind, group_ids=group_ids, logit_cache_bytes=logit_cache_bytes, ring=ring, check=check
    )
    return result.loss
