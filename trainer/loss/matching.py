"""Losses that pull the embeddings of a sample onto each other, without negatives: l2, cosine and smooth_l1."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from threetowers.trainer.config import Term


def matching_loss(term: Term, x_bD: Tensor, y_bD: Tensor) -> Tensor:
    """Return the mean of a term's distance over the samples of all ranks, a float32 scalar.

    For unit-norm x and y the distance of a sample is |x - y|² (l2), 1 - <x, y> (cosine), or the sum of the Huber
    function of x - y divided by beta (smooth_l1, Girshick 2015): e² / 2 beta for errors e below beta, |e| - beta / 2
    above. The value is the same on all ranks. Gradients are scaled for the averaging of DDP and DeepSpeed: averaged
    over ranks, they are those of one process with the joined batch, also when local batches differ. At least one rank
    must have a sample. Collective.

    Args:
        term: Of one of the three kinds.
        x_bD: Embeddings (b, D), unit norm.
        y_bD: Embeddings (b, D), unit norm.
    """
    distances: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "l2": _squared_distance,
        "cosine": _cosine_distance,
        "smooth_l1": partial(_smooth_l1_distance, beta=term.beta),
    }
    return _mean_over_ranks(distances[term.kind](x_bD.float(), y_bD.float()))


def _squared_distance(x_bD: Tensor, y_bD: Tensor) -> Tensor:
    return (x_bD - y_bD).square().sum(1)


def _cosine_distance(x_bD: Tensor, y_bD: Tensor) -> Tensor:
    # Half the squared distance: relative accuracy near 0, where 1 - <x, y> would have none.
    return _squared_distance(F.normalize(x_bD, dim=1), F.normalize(y_bD, dim=1)) / 2


def _smooth_l1_distance(x_bD: Tensor, y_bD: Tensor, beta: float) -> Tensor:
    return F.smooth_l1_loss(x_bD, y_bD, beta=beta, reduction="none").sum(1)


def _mean_over_ranks(distances_b: Tensor) -> Tensor:
    total = distances_b.sum()
    if not distributed.is_initialized():
        return total / len(distances_b)
    sums = torch.stack([total.detach(), torch.full_like(total.detach(), len(distances_b))])
    distributed.all_reduce(sums)
    local = total * (distributed.get_world_size() / sums[1])
    return (local - local.detach()) + sums[0] / sums[1]
