"""timm's folder format, for the image tower alone."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from threetowers.trainer.config import HfTower, ImageTower, OpenClipTower, TrainConfig
from threetowers.trainer.export.trained_model import TrainedModel
from threetowers.trainer.model.towers.timm_tower import TimmTower


def write_timm(model: TrainedModel, folder: Path) -> None:
    """Write the deployed image tower, without its head.

    Raises:
        ValueError: If the tower is not one of timm's.
    """
    reasons = timm_reasons(model.config)
    if reasons:
        raise ValueError(
            f"timm cannot express this image tower: {'; '.join(reasons)}. Use --format onnx, or threetowers"
        )
    config = model.config.towers[model.image_tower]
    assert isinstance(config, ImageTower)
    tower = model.model.towers[model.image_tower]
    assert isinstance(tower, TimmTower)
    size = model.config.data.side
    data = {"input_size": (3, size, size), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    arguments = {**config.args, "num_classes": 0}
    save_for_hf(tower.model, str(folder), model_args=arguments, data_config=data, safe_serialization=True)


def timm_reasons(config: TrainConfig) -> list[str]:
    """Return why timm cannot express the deployed image tower of a config; none: it can."""
    image = config.towers[config.root_of(config.deploy.image)]
    if isinstance(image, HfTower):
        return ["it is a model of transformers"]
    if isinstance(image, OpenClipTower):
        return ["it is a tower of open_clip, with its projection"]
    if not isinstance(image, ImageTower):
        return ["it is a cached teacher, whose weights are not in the run"]
    return ["it is specialised (MS-CLIP-S)"] if image.specialize is not None else []


def load_timm(folder: Path, model: TrainedModel) -> Callable[[Tensor], Tensor]:
    """Return a function that maps images (b, 3, S, S) uint8 to features, with timm's own code."""
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    tower = model.model.towers[model.image_tower]
    assert isinstance(tower, TimmTower)

    def encode(images: Tensor) -> Tensor:
        x_b3HW = (images.float() / 255 - tower.mean) / tower.std
        features_bw: Tensor = reloaded(x_b3HW.contiguous(memory_format=torch.channels_last))
        return features_bw

    return encode
