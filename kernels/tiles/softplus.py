"""Losses of single logits that keep their relative accuracy where they are tiny."""

import torch
from torch import Tensor


def softplus(z_n: Tensor) -> Tensor:
    """Return log(1 + exp(z)) with full relative accuracy at both ends; 0 at -inf."""
    return z_n.clamp(min=0) + torch.log1p(torch.exp(-z_n.abs()))


def soft_cross_entropy(z_n: Tensor, target_n: Tensor) -> Tensor:
    """Return ``softplus(z) - target z``, without cancellation where a large z meets a target near 1; 0 at -inf."""
    missed_n = torch.where(z_n > 0, (1 - target_n) * z_n, -target_n * z_n.clamp(min=torch.finfo(z_n.dtype).min))
    return missed_n + torch.log1p(torch.exp(-z_n.abs()))
