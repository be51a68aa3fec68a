"""Small models on random inputs, as most tests of the model and of its steps use them."""

from typing import Any

import torch
from torch import Tensor

from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END
from threetowers.trainer.config import parse
from threetowers.trainer.model.model import TowerModel

WIDTHS = {"third": 20}
VOCAB_SIZE = 48
VIT = {
    "kind": "timm",
    "model": "vit_base_patch32_clip_quickgelu_224",
    "args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
}
SPECIALIZED = VIT | {"args": VIT["args"] | {"depth": 6}, "specialize": {}}


def model_of(tree: dict[str, Any]) -> TowerModel:
    """The model of a config, always with the same random weights."""
    torch.manual_seed(0)
    return TowerModel(parse(tree), vocab_size=VOCAB_SIZE, cache_widths=WIDTHS)


def inputs_of(samples: int) -> dict[str, Tensor]:
    """Random images, tokens and cached rows."""
    generator = torch.Generator().manual_seed(1)
    tokens_bL = torch.randint(3, VOCAB_SIZE, (samples, 8), generator=generator)
    tokens_bL[:, -1] = END
    return {
        "image": torch.randint(0, 256, (samples, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "text": tokens_bL,
        "third": torch.randn(samples, 20, generator=generator),
    }
