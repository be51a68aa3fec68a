"""Small open_clip models with random weights."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from threetowers.cache.encoders.encoder import state_digest

TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": TEXT,
}
COCA: dict[str, Any] = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": TINY["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
}
TIMM: dict[str, Any] = {  # as MobileCLIP: timm's classifier is the projection
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": None, "image_size": 32},
    "text_cfg": TEXT,
}
PREPROCESS = {"size": [32, 32], "mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}


def save_open_clip(folder: Path, config: dict[str, Any] = TINY, preprocess: dict[str, Any] | None = None) -> str:
    """Save a model as open_clip does, and return the digest of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": PREPROCESS | (preprocess or {})}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    state = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).state_dict()
    save_file({name: value.clone() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return state_digest(state)
