"""The third tower: rows of an embedding cache, standardised. It has no parameters."""

import torch
from torch import Tensor, nn


class CachedTower(nn.Module):
    """Cached embeddings (b, width) of any float type -> features (b, width).

    `mean` and `std` are the features' moments over the cache. They belong to the model, so that a model on top of a
    third tower (LiT) standardises new images like the training images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def set_moments(self, mean_w: Tensor, std_w: Tensor) -> None:
        """Set the features' moments; a constant feature keeps its scale."""
        self.mean.copy_(mean_w)
        self.std.copy_(torch.where(std_w > 0, std_w, torch.ones_like(std_w)))

    def forward(self, rows_bw: Tensor) -> Tensor:
        """Return standardised features (b, width), float32."""
        return (rows_bw.to(torch.float32) - self.mean) / self.std
