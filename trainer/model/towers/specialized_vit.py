"""A specialised vision transformer: MS-CLIP-S's early specialisation and parallel branch (arXiv 2207.12661).

The transformer between them stays timm's, so that a text tower can share its blocks.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from threetowers.trainer.config import Specialize

NUM_STAGES = 5  # of the stem and of the branch, each twice as wide as the one before, the last as wide as the tokens


class SpecializedViT(nn.Module):
    """Images (b, 3, H, W) -> features (b, width) of a timm vision transformer with a convolutional stem or branch."""

    def __init__(self, vit: Any, config: Specialize) -> None:
        """Add the parts that `config` names to a timm model.

        Raises:
            ValueError: For a model that is no plain vision transformer of a width divisible by 16.
        """
        super().__init__()
        _check(vit)
        patch = vit.patch_embed.patch_size[0]
        grid = vit.patch_embed.grid_size[0]
        depth = len(vit.blocks)
        halvings = int(math.log2(patch))
        strides = [2] * halvings + [1] * (NUM_STAGES - halvings)
        widths = [vit.embed_dim // 2**k for k in reversed(range(NUM_STAGES))]

        # The stem replaces the patch embedding and the first block.
        self.vit = vit
        removed_blocks = 0
        if config.stem:
            self.vit.patch_embed = ConvStem(widths, strides)
            self.vit.blocks = self.vit.blocks[1:]
            removed_blocks = 1

        # The branch: a stage and an adapter for each of five blocks; of 12 blocks, numbers 2, 4, 6, 8 and 10 from 0.
        self.stages = nn.ModuleList()
        self.adapters = nn.ModuleDict()  # by number of the block that they precede
        if not config.branch:
            return
        size = patch * grid
        width_in = 3
        for stage, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            if stage == 0:
                self.stages.append(conv_norm(width_in, width, 3, stride, relu=True))
            else:
                self.stages.append(Bottleneck(width_in, width, stride))
            size //= stride
            block = (stage + 1) * depth // (NUM_STAGES + 1) - removed_blocks
            self.adapters[str(block)] = Adapter(width, vit.embed_dim, size // grid)
            width_in = width

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the transformer's blocks for backward, and recompute the rest."""
        self.vit.set_grad_checkpointing(enable)

    def forward(self, images_b3HW: Tensor) -> Tensor:
        """Return features (b, width)."""
        x_bLw = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images_b3HW)))
        branch_bchw = images_b3HW
        stages = iter(self.stages)
        for number, block in enumerate(self.vit.blocks):
            if str(number) in self.adapters:
                branch_bchw = next(stages)(branch_bchw)
                x_bLw = self.adapters[str(number)](x_bLw, branch_bchw)
            if self.vit.grad_checkpointing and self.training:
                x_bLw = checkpoint(block, x_bLw, use_reentrant=False)
            else:
                x_bLw = block(x_bLw)
        features_bw: Tensor = self.vit.forward_head(self.vit.norm(x_bLw), pre_logits=True)
        return features_bw


def _check(vit: Any) -> None:
    """Raise ValueError for a model that cannot be specialised."""
    parts = ("patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "forward_head")
    plain = all(hasattr(vit, part) for part in parts)
    if not plain or vit.embed_dim % 2 ** (NUM_STAGES - 1) or len(vit.blocks) <= NUM_STAGES:
        raise ValueError(
            "specialize needs one of timm's vision transformers, with a width divisible by 16 and 6 blocks or more; "
            "choose another model, or leave specialize out"
        )
    patch = vit.patch_embed.patch_size[0]
    if patch & (patch - 1) or not 2 <= patch <= 2**NUM_STAGES:
        raise ValueError(f"specialize needs a patch of 2, 4, 8, 16 or 32 pixels, found {patch}; choose another model")


class ConvStem(nn.Module):
    """Images (b, 3, H, W) -> tokens (b, L, width): the modality-specific first layer."""

    def __init__(self, widths: list[int], strides: list[int]) -> None:
        """Build one stage for each width and stride."""
        super().__init__()
        self.first = conv_norm(3, widths[0], 3, strides[0], relu=True)
        self.stages = nn.Sequential()
        for width_in, width, stride in zip(widths[:-1], widths[1:], strides[1:], strict=True):
            self.stages.append(Residual(conv_norm(width_in, width, 3, stride), width_in, width, stride))
        self.last = nn.Conv2d(widths[-1], widths[-1], 1, bias=False)

    def forward(self, images_b3HW: Tensor) -> Tensor:
        """Return tokens (b, L, width)."""
        tokens_bLw: Tensor = self.last(self.stages(self.first(images_b3HW))).flatten(2).transpose(1, 2)
        return tokens_bLw


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)); the shortcut is a strided 1x1 convolution and batch norm."""

    def __init__(self, body: nn.Module, width_in: int, width: int, stride: int, eps: float = 1e-5) -> None:
        """Add the shortcut to `body`, which must have the same widths and stride."""
        super().__init__()
        self.body = body
        self.shortcut = conv_norm(width_in, width, 1, stride, eps=eps)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return features of `width` channels."""
        return torch.relu(self.body(x_bchw) + self.shortcut(x_bchw))


class Bottleneck(Residual):
    """A residual of 1x1, 3x3 and 1x1 convolutions, half as wide in the middle."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        """Build the residual; the stride is that of its 3x3 convolution."""
        middle = width // 2
        eps = 1e-6
        body = nn.Sequential(
            conv_norm(width_in, middle, 1, 1, relu=True, eps=eps),
            conv_norm(middle, middle, 3, stride, relu=True, eps=eps),
            conv_norm(middle, width, 1, 1, eps=eps),
        )
        super().__init__(body, width_in, width, stride, eps)


class Adapter(nn.Module):
    """Adds a stage of the branch to the tokens: LayerNorm(class token, local mix of patch tokens + pooled stage)."""

    def __init__(self, branch: int, width: int, pool: int) -> None:
        """Build an adapter of `branch` channels to tokens of `width`; `pool` pixels of the stage become a patch."""
        super().__init__()
        self.pool = nn.Sequential(
            nn.Conv2d(branch, branch, pool, pool, groups=branch, bias=False),
            nn.BatchNorm2d(branch),
            nn.Conv2d(branch, width, 1, bias=False),
        )
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_bLw: Tensor, branch_bchw: Tensor) -> Tensor:
        """Return the new tokens (b, L, width)."""
        pooled_bwgg = self.pool(branch_bchw)
        patches = pooled_bwgg.shape[2] * pooled_bwgg.shape[3]
        prefix_bPw = x_bLw[:, :-patches]  # the class token
        patches_bNw = x_bLw[:, -patches:]
        grid_bwgg = patches_bNw.transpose(1, 2).reshape(pooled_bwgg.shape)
        mixed_bNw = (self.mix(grid_bwgg) + pooled_bwgg).flatten(2).transpose(1, 2)
        normed_bLw: Tensor = self.norm(torch.cat([prefix_bPw, mixed_bNw], 1))
        return normed_bLw


def conv_norm(
    width_in: int, width: int, kernel: int, stride: int, *, relu: bool = False, eps: float = 1e-5
) -> nn.Sequential:
    """Return a convolution without bias, batch norm, and a ReLU if asked for."""
    layers: list[nn.Module] = [nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False)]
    layers.append(nn.BatchNorm2d(width, eps=eps))
    if relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)
