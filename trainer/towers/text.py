"""The text tower: a bidirectional transformer of timm blocks, pooled at the end token or by the mean."""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from threetowers.trainer.config import TextTower
from threetowers.trainer.tokenizer import END, PAD


class TextTransformer(nn.Module):
    """Tokens (b, L) int64 -> features (b, width)."""

    def __init__(self, config: TextTower, vocab_size: int, context: int) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"text tower: width {config.width} is not divisible by heads {config.heads}")
        self.pool = config.pool
        self.width = config.width
        self.embed = nn.Embedding(vocab_size, config.width)
        self.position = nn.Parameter(torch.empty(1, context, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio, qkv_bias=True, proj_drop=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self._initialize()

    def _initialize(self) -> None:
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens_bL: Tensor) -> Tensor:
        x_bLw = self.embed(tokens_bL) + self.position[:, : tokens_bL.shape[1]]
        real_bL = tokens_bL != PAD
        attend_b11L = real_bL[:, None, None, :]  # nobody looks at padding
        for block in self.blocks:
            x_bLw = block(x_bLw, attn_mask=attend_b11L)
        x_bLw = self.norm(x_bLw)
        if self.pool == "mean":
            weight_bL1 = real_bL[..., None].to(x_bLw.dtype)
            mean_bw: Tensor = (x_bLw * weight_bL1).sum(1) / weight_bL1.sum(1)
            return mean_bw
        end_b = (tokens_bL == END).int().argmax(1)
        end_bw: Tensor = x_bLw[torch.arange(len(x_bLw), device=x_bLw.device), end_b]
        return end_bw
