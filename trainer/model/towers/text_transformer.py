"""The text tower: a transformer of timm blocks."""

from functools import partial

import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END
from threetowers.trainer.config import TextTower
from threetowers.trainer.model.layers import WITH_PREVIOUS, Layers, number_layers

LAYERS = {"stem": r"embed|position", "blocks": [(r"blocks\.(\d+)", None), (r"norm", WITH_PREVIOUS)]}


class TextTransformer(nn.Module):
    """Tokens (b, L) int64 -> features (b, width)."""

    def __init__(self, config: TextTower, vocab_size: int, context_length: int, end_id: int = END) -> None:
        """Build the transformer with random weights.

        Args:
            config: The tower.
            vocab_size: Rows of the token embedding.
            context_length: Tokens that a caption has at most.
            end_id: The token that ends a caption; what is behind the first one is padding, whatever its id.

        Raises:
            ValueError: The heads do not divide the width.
        """
        super().__init__()
        if config.width % config.heads:
            raise ValueError(
                f"text tower: width {config.width} is not divisible by heads {config.heads}; change one of them"
            )
        self.pool = config.pool
        self.end_id = end_id
        self.causal = config.causal
        self.mask_padding = config.mask_padding
        self.grad_checkpointing = False
        self.width = config.width
        self.embed = nn.Embedding(vocab_size, config.width)
        self.position = nn.Parameter(torch.empty(1, context_length, config.width))
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.mlp_ratio,
                qkv_bias=True,
                proj_drop=config.dropout,
                act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
                norm_layer=partial(nn.LayerNorm, eps=config.norm_eps or 1e-6),
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps or 1e-5)
        self._initialize()

    def _initialize(self) -> None:
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def layers(self) -> Layers:
        """Return the tower's layers: embeddings, the blocks, and nothing behind the final norm."""
        return number_layers(self, LAYERS)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for backward, and recompute the rest."""
        self.grad_checkpointing = enable

    def forward(self, tokens_bL: Tensor) -> Tensor:
        """Return features (b, width)."""
        x_bLw = self.embed(tokens_bL) + self.position[:, : tokens_bL.shape[1]]
        mask = self._mask(tokens_bL)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x_bLw = checkpoint(block, x_bLw, attn_mask=mask, use_reentrant=False)
            else:
                x_bLw = block(x_bLw, attn_mask=mask)
        return self._pool(self.norm(x_bLw), tokens_bL)

    def _mask(self, tokens_bL: Tensor) -> Tensor | None:
        """Return the attention mask: true where a query (third dimension) attends to a key (last)."""
        mask = self._within_caption(tokens_bL)[:, None, None, :] if self.mask_padding else None
        if self.causal:
            length = tokens_bL.shape[1]
            causal_LL = torch.ones(length, length, dtype=torch.bool, device=tokens_bL.device).tril()
            mask = causal_LL if mask is None else mask & causal_LL
        return mask

    def _pool(self, x_bLw: Tensor, tokens_bL: Tensor) -> Tensor:
        if self.pool == "mean":
            weight_bL1 = self._within_caption(tokens_bL)[..., None].to(x_bLw.dtype)
            return (x_bLw * weight_bL1).sum(1) / weight_bL1.sum(1)
        if self.pool == "last":
            return x_bLw[:, -1]
        return x_bLw[torch.arange(x_bLw.shape[0], device=x_bLw.device), self._end(tokens_bL)]

    def _end(self, tokens_bL: Tensor) -> Tensor:
        """Return the position (b,) of the end token of each caption, the first one."""
        return (tokens_bL == self.end_id).int().argmax(1)

    def _within_caption(self, tokens_bL: Tensor) -> Tensor:
        """Return where there is no padding, (b, L) bool.

        Known by the end token, as the id of the padding may be that of a word (CLIP) or of the end itself (SigLIP).
        """
        position_L = torch.arange(tokens_bL.shape[1], device=tokens_bL.device)
        return position_L <= self._end(tokens_bL)[:, None]
