"""The weights of one tower out of those of a whole model of open_clip: by its name, its folder, or in a file."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.names import EncoderName
from threetowers.cache.encoders.openclip.loading import WEIGHTS, load_open_clip_model
from threetowers.cache.encoders.openclip.model_config import (
    HUB,
    OpenClipConfig,
    is_in_package,
    model_folder,
    needs_quick_gelu,
    other_architecture,
    read_open_clip_config,
    require_open_clip,
)
from threetowers.cache.encoders.weights_file import model_part, read_state, split_part
from threetowers.trainer.config import OpenClipTower

OPEN_CLIP = "open_clip:"
PIXELS = ("mean", "std")  # by which the pixels of images are normalised
# Modules of a text tower. CLIP keeps them at the top of the model, others under `text`.
TEXT_MODULES = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")


def open_clip_weights(tower: Any, config: OpenClipTower, init: str) -> dict[str, Tensor]:
    """Return the weights of a tower under its own names, as far as `init` has them.

    Args:
        tower: An `OpenClipImageTower` or `OpenClipTextTower`.
        config: The tower's.
        init: `pretrained`, `open_clip:NAME[:WEIGHTS]` or FILE[#PREFIX], see `OpenClipTower.init`.

    Raises:
        ValueError: There are no such weights, or several.
    """
    if init == "pretrained":
        return tower_weights(pretrained_model(config.model), config.of)
    if init.startswith(OPEN_CLIP):
        require_same_architecture(config, source_config(init))
        return tower_weights(named_model(init), config.of)
    return _of_file(tower, init)


def source_config(init: str) -> OpenClipConfig:
    """Return the config of the model that `open_clip:NAME[:WEIGHTS]` names, as its weights were trained.

    Some pretrained tags need another activation function than the model's config has.
    """
    name = EncoderName.parse(init)
    found = read_open_clip_config(name.name)
    if name.weights is None or not is_in_package(name.name) or split_part(name.weights)[0].exists():
        return found
    needed = needs_quick_gelu(name.name.replace("/", "-"), name.weights.partition("=")[0])
    return replace(found, model=found.model | {"quick_gelu": needed or bool(found.model.get("quick_gelu"))})


def require_same_architecture(config: OpenClipTower, source: OpenClipConfig) -> None:
    """Raise ValueError where a tower would make something else of the weights of a model than the model does."""
    differ = other_architecture(read_open_clip_config(config.model, config.args), source, config.of)
    if differ:
        raise ValueError(
            f"{config.model} is not the model of these weights: {'; '.join(differ)}; name the one that is, as "
            "ViT-B-32-quickgelu for ViT-B-32, or change these keys in args"
        )


def pretrained_model(name: str) -> nn.Module:
    """Return a model of open_clip with its own weights. Raises ValueError where it has none, or several."""
    read_open_clip_config(name)  # refuses a name that stands for nothing
    import open_clip

    weights = None
    if model_folder(name) is None and not name.startswith(HUB):
        known = name.replace("/", "-")
        tags = open_clip.list_pretrained_tags_by_model(known)
        if len(tags) != 1:
            raise ValueError(
                f"pretrained: open_clip has {len(tags)} pretrained models of {name} ({', '.join(tags) or 'none'}), "
                f"expected one; name the weights, as open_clip:{name}:TAG or as the path of a file"
            )
        weights = tags[0]
    model: nn.Module = load_open_clip_model(name, weights).model
    return model


def named_model(init: str) -> nn.Module:
    """Return the model of open_clip that `open_clip:NAME[:WEIGHTS]` names. Raises ValueError for random weights."""
    name = EncoderName.parse(init)
    require_open_clip(name.name)
    if name.size is not None:
        raise ValueError(f"{init!r}: leave out @{name.size}: weights are resampled to data.image_size")
    if name.weights is None:
        return pretrained_model(name.name)
    model: nn.Module = load_open_clip_model(name.name, name.weights).model
    return model


def tower_weights(model: Any, of: str) -> dict[str, Tensor]:
    """Return the weights of one tower of a model of open_clip, under the names of our towers."""
    if of == "image":
        stated = model.visual.preprocess_cfg
        pixels = {name: torch.tensor(stated[name]).view(1, 3, 1, 1) for name in PIXELS}
        return {f"model.{name}": tensor for name, tensor in model.visual.state_dict().items()} | pixels
    return {f"model.{name}": tensor for name, tensor in text_part(model.state_dict()).items()}


def text_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the text tower out of the weights of a model, under the names of a text tower by itself."""
    part = {name.removeprefix("text."): tensor for name, tensor in state.items() if name.startswith("text.")}
    return part or {name: tensor for name, tensor in state.items() if name.partition(".")[0] in TEXT_MODULES}


def _of_file(tower: Any, init: str) -> dict[str, Tensor]:
    """Return the part of a file that is the tower. What is beside its modules belongs to the other tower."""
    path, part = split_part(init)
    state = read_state(path, WEIGHTS)
    own = tower.model.state_dict()
    found, prefix = model_part(state, own, init, part)
    modules = {name.partition(".")[0] for name in own}
    weights = {f"model.{name}": tensor for name, tensor in found.items() if name.partition(".")[0] in modules}
    beside = prefix.removesuffix("model")  # where the file is of a tower of ours, which has these in it
    pixels = {name: state[beside + name] for name in PIXELS if beside + name in state}
    return weights | (pixels if prefix.endswith("model") else {})
