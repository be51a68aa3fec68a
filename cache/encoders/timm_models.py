"""timm's models by name: its own, `hf-hub:ORG/NAME[@REVISION]`, and `local-dir:FOLDER` or just the folder."""

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.weights_file import one_line

LOCAL = "local-dir:"
SOURCES = ("hf-hub:", "hf_hub:", LOCAL)  # prefixes of names, before a colon that separates nothing


def local_folder(name: str) -> str | None:
    """Return the folder that a name stands for, as FOLDER or `local-dir:FOLDER`; None for other names."""
    if name.startswith(LOCAL):
        return name.removeprefix(LOCAL)
    return name if (Path(name) / "config.json").is_file() else None


def create_timm_model(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Create a timm model.

    Args:
        name: A timm model, `hf-hub:ORG/NAME`, or a folder that timm saved a model to, also as `local-dir:FOLDER`.
        pretrained: With its own weights.
        arguments: Of `timm.create_model`.

    Raises:
        ValueError: timm has no such model, or cannot create it, or its files cannot be had.
    """
    import timm

    folder = local_folder(name)
    if folder is not None:
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"{name!r}: expected a folder that timm saved a model to, found no config.json in it")
        full_name = LOCAL + folder
    else:
        full_name = name
        if not name.startswith(SOURCES) and not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3)
            hub = f"; a model of the hub is hf-hub:{name}, in a folder local-dir:{name}" if "/" in name else ""
            raise ValueError(f"{name!r} is unknown to timm {timm.__version__}; close: {close or 'none'}{hub}")
    try:
        model: nn.Module = timm.create_model(full_name, pretrained=pretrained, **arguments)
    except Exception as error:  # hub, network, file system and timm each raise their own kinds
        stated = {key: value for key, value in arguments.items() if key != "num_classes"}
        given = f" with {stated}" if stated else ""
        remedy = ""
        if full_name.startswith(SOURCES) and folder is None:
            remedy = "; without a connection, download its files and name their folder instead"
        elif pretrained:
            remedy = "; give its weights as the path of a .safetensors file instead"
        what = "load the pretrained weights of" if pretrained else "create"
        raise ValueError(f"timm cannot {what} {name!r}{given}: {one_line(error)}{remedy}") from error
    return model


def head_tensors(name: str, **arguments: Any) -> set[str]:
    """Return the names of the tensors that a timm model has for its classes alone: classifiers, and norms before them.

    Args:
        name: As of `create_timm_model`.
        arguments: Of `timm.create_model`.
    """
    with torch.device("meta"):  # without numbers: only names are wanted
        full, headless = (create_timm_model(name, **arguments, num_classes=classes) for classes in (2, 0))
    return full.state_dict().keys() - headless.state_dict().keys()


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a timm model's classifiers: several in a model that was distilled, none in an encoder."""
    found: str | tuple[str, ...] | None = getattr(model, "pretrained_cfg", {}).get("classifier")
    return (found,) if isinstance(found, str) else tuple(found or ())


def pooled_features(model: nn.Module, pixels_b3HW: Tensor) -> Tensor:
    """Return a timm model's features (b, D) before its classifier."""
    timm_model: Any = model
    features: Tensor = timm_model.forward_head(timm_model.forward_features(pixels_b3HW), pre_logits=True)
    return features
