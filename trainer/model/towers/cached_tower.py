"""The third tower: rows of an embedding cache, standardised. It has no parameters."""

import torch
from torch import Tensor, nn

from threetowers.trainer.config import Standardization
from threetowers.trainer.model.precision import full_precision


class CachedTower(nn.Module):
    """Cached embeddings (b, width) of any float type -> features (b, width): R (rows - mean) / std.

    `mean` and `std` are the features' moments over the cache, and `rotation` is PHI-S's R; without PHI-S there is none.
    They belong to the model, so that a model on top of a third tower (LiT) standardises new images like the training
    images.
    """

    mean: Tensor
    std: Tensor
    rotation: Tensor | None

    def __init__(self, width: int, standardize: Standardization = "moments") -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("rotation", torch.eye(width) if standardize == "phi-s" else None)

    def set_statistics(self, mean_w: Tensor, std_w: Tensor, rotation_ww: Tensor | None = None) -> None:
        """Set the features' moments, and PHI-S's rotation; a constant feature keeps its scale."""
        self.mean.copy_(mean_w)
        self.std.copy_(torch.where(std_w > 0, std_w, torch.ones_like(std_w)))
        if self.rotation is not None and rotation_ww is not None:
            self.rotation.copy_(rotation_ww)

    def forward(self, rows_bw: Tensor) -> Tensor:
        """Return standardised features (b, width), float32."""
        features_bw = (rows_bw.to(torch.float32) - self.mean) / self.std
        if self.rotation is None:
            return features_bw
        with full_precision(rows_bw.device):
            return features_bw @ self.rotation.T
