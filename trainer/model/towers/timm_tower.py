"""The image tower: any timm model; it takes bytes and returns its features before the classifier."""

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from threetowers.cache.encoders.timm_models import create_timm_model
from threetowers.trainer.config import ImageTower
from threetowers.trainer.model.layers import Layers, number_layers
from threetowers.trainer.model.towers.feature_width import feature_width
from threetowers.trainer.model.towers.pointwise import subsample_before_pointwise
from threetowers.trainer.model.towers.specialized_vit import SpecializedViT


class TimmTower(nn.Module):
    """Images (b, 3, H, W) uint8 -> features (b, width)."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageTower, image_size: int) -> None:
        """Build the model with random weights.

        Raises:
            ValueError: timm cannot build it, it takes no images of this size, or it does not give one vector an image.
        """
        super().__init__()
        try:
            self.model: Any = create_timm_model(config.model, num_classes=0, **config.args)
        except ValueError as error:
            raise ValueError(f"image tower: {error}") from error
        for name in ("mean", "std"):
            # Not persistent: they belong to the architecture's config, not to the weights.
            value = torch.tensor(self.model.pretrained_cfg[name]).view(1, 3, 1, 1)  # type: ignore[index]
            self.register_buffer(name, value, persistent=False)
        if config.specialize is not None:
            self.model = SpecializedViT(self.model, config.specialize)
        subsample_before_pointwise(self.model)
        self._matrix = next(name for name, p in self.model.named_parameters() if p.ndim > 1)  # norms may stay float32
        remedy = "choose a model with a global pool, or one that takes img_size in args"
        self.width = feature_width(self.model, config.model, config.args, image_size, remedy)

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The transformer blocks; None in a model without blocks of timm's vision transformer."""
        vit = self.model.vit if isinstance(self.model, SpecializedViT) else self.model
        blocks = getattr(vit, "blocks", None)
        return blocks if blocks and isinstance(blocks[0], Block) else None

    def layers(self) -> Layers:
        """Return the tower's layers, as timm numbers them. Raises ValueError for a model of which it knows none."""
        matcher = getattr(self.model, "group_matcher", None)
        if matcher is None:
            raise ValueError(f"{type(self.model).__name__} has no blocks that timm has numbered")
        return number_layers(self, matcher(coarse=False), "model.")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in backward. Raises ValueError for a model that cannot."""
        try:
            self.model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"engine.activation_checkpointing: this timm model has none ({error}); set it to false, or choose "
                "another model"
            ) from error

    def forward_normalized(self, x_b3HW: Tensor) -> Tensor:
        """Return features (b, width) of images less `mean`, divided by `std`."""
        features_bw: Tensor = self.model(x_b3HW)
        return features_bw

    def forward(self, images_b3hw: Tensor) -> Tensor:
        """Return features (b, width), of the weights' type or, under autocast, of the last layer's."""
        dtype = self.model.get_parameter(self._matrix).dtype
        x_b3hw = (images_b3hw.to(torch.float32) / 255 - self.mean) / self.std
        return self.forward_normalized(x_b3hw.to(dtype).contiguous(memory_format=torch.channels_last))
