"""Runs whose towers are those of small open_clip models with random weights."""

from pathlib import Path
from typing import Any

import open_clip
import torch

from tests.cache.tiny_open_clip import save_open_clip

Tree = dict[str, Any]


def open_clip_run(tree: Tree, folder: Path, model: Tree, size: int = 32, **tower: Any) -> Tree:
    """Save a model of open_clip to a folder, and return a run (`tree` of tests/conftest.py) with its two towers."""
    save_open_clip(folder, model)
    towers = {of: {"kind": "open_clip", "of": of, "model": str(folder), **tower} for of in ("image", "text")}
    data = {"tokenizer": f"open_clip:{folder}", "image_size": size, "context_length": 16}
    heads = {"f": {"of": "image", "kind": "none"}, "g": {"of": "text", "kind": "none"}}
    changes = {"embed_dim": model["embed_dim"], "global_batch_size": 4, "duration": {"steps": 1}}
    return tree | changes | {"data": tree["data"] | data, "towers": towers, "heads": heads}


def open_clip_model(folder: Path) -> Any:
    """The model of a folder, as open_clip loads it."""
    return open_clip.create_model(f"local-dir:{folder}").eval()


def their_embeddings(model: Any, images: torch.Tensor, tokens_bL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What open_clip computes of uint8 images and of tokens, not normalised."""
    stated = model.visual.preprocess_cfg
    mean, std = (torch.tensor(stated[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    pixels = (images.float() / 255 - mean) / std
    with torch.inference_mode():
        return model.encode_image(pixels, normalize=False), model.encode_text(tokens_bL, normalize=False)
