"""The frozen teacher: a timm backbone with known weights, its evaluation transform, and raw pre-logits features."""

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from threetowers.cache.encoders.timm_models import (
    SOURCES,
    classifiers,
    create_timm_model,
    local_folder,
    pooled_features,
)
from threetowers.cache.encoders.weights_file import (
    State,
    load_strictly,
    model_part,
    one_line,
    read_state,
    require_finite,
    split_part,
)
from threetowers.cache.format.manifest import DecodeMode, Preprocessing, TeacherPrecision, TeacherRuntime
from threetowers.cache.processes.float32_products import exact_products

if TYPE_CHECKING:
    from threetowers.cache.encoders.onnx_runtime import OnnxNetwork

DRAFT_MARGIN = 2  # a draft keeps this many times the pixels per side of the resized image, enough for its filter


class FeatureNetwork(nn.Module):
    """A timm model from uint8 pixels to pooled features, normalization included."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images_b3HW: Tensor) -> Tensor:
        """Return the (b, D) features before the classifier."""
        return pooled_features(self.model, images_b3HW.float().div_(255).sub_(self.mean).div_(self.std))


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen backbone, ready to embed.

    Attributes:
        backbone: timm name, `hf-hub:` name, or the folder that the model was saved to.
        weights: where the weights came from.
        weights_digest: sha256 of the state dict.
        preprocessing: the evaluation transform, in timm's terms.
        dim: width D of an embedding.
        device: where the model runs.
        model: the timm model.
        transform: maps an RGB image to (3, H, W) uint8 pixels; normalization is left to `embed`.
        precision: arithmetic of the forward pass.
        runtime: what runs it; `onnx` does on the CPU in float32.

    Raises:
        ValueError: the runtime is not installed, or is not for this device or precision.
    """

    backbone: str
    weights: str
    weights_digest: str
    preprocessing: Preprocessing
    dim: int
    device: torch.device
    model: nn.Module
    transform: Callable[[Image.Image], npt.NDArray[np.uint8]]
    precision: TeacherPrecision = "float32"
    runtime: TeacherRuntime = "torch"

    def __post_init__(self) -> None:
        """Raise ValueError for a runtime that cannot be used."""
        if self.runtime == "torch":
            return
        from threetowers.cache.encoders.onnx_runtime import require_onnx_runtime

        if self.device.type != "cpu" or self.precision != "float32":
            raise ValueError(
                f"--runtime onnx: expected the CPU and float32, found {self.device.type} and {self.precision}: use "
                "--runtime torch, or --device cpu --precision float32"
            )
        require_onnx_runtime()

    @property
    def min_side(self) -> int | None:
        """The shorter side in pixels down to which a JPEG may be decoded; None for a full decode."""
        if self.preprocessing.decode == "pillow":
            return None
        return math.ceil(DRAFT_MARGIN * max(self.preprocessing.input_size) / self.preprocessing.crop_pct)

    @cached_property
    def network(self) -> FeatureNetwork:
        """The model with its normalization, on the device."""
        return FeatureNetwork(self.model, self.preprocessing).to(self.device).eval()

    @cached_property
    def onnx_network(self) -> "OnnxNetwork":
        """The same for ONNX Runtime. Raises ValueError where the model cannot be exported."""
        from threetowers.cache.encoders.onnx_runtime import OnnxNetwork

        return OnnxNetwork(self.network, self.preprocessing.input_size, f"backbone {self.backbone!r}")

    def prepare(self) -> None:
        """Do now what the first forward pass would do once. Raises ValueError as that would."""
        if self.runtime == "onnx":
            _ = self.onnx_network

    def embed(self, images_b3HW: Tensor) -> Tensor:
        """Embed uint8 pixels: (b, D) float32 pooled features before the classifier, not normalised, on the CPU.

        Raises:
            ValueError: the pixels are not uint8, so perhaps normalised already; with `runtime="onnx"` also as for
                `OnnxNetwork`.
        """
        features_bD = self.forward(images_b3HW.to(self.device, non_blocking=True))
        return features_bD.cpu().clone()  # outside inference mode an ordinary tensor

    def forward(self, images_b3HW: Tensor) -> Tensor:
        """Embed like `embed`, from and to the device; a GPU is given its work, and not waited for."""
        if images_b3HW.dtype != torch.uint8:
            raise ValueError(f"expected uint8 pixels as `transform` gives them, found {images_b3HW.dtype}")
        if self.runtime == "onnx":
            return self.onnx_network(images_b3HW)
        # Inference mode first: at its end it puts back the autocast that it found, and would leave it on for good.
        with torch.inference_mode(), self._arithmetic():
            features_bD: Tensor = self.network(images_b3HW.to(memory_format=torch.channels_last))
            return features_bD.float()

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which products are computed in the teacher's precision."""
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return exact_products()


def load_teacher(
    backbone: str,
    weights: str = "pretrained",
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    precision: TeacherPrecision = "float32",
    decode: DecodeMode = "pillow",
    compiled: bool = False,
    runtime: TeacherRuntime = "torch",
) -> Teacher:
    """Load a timm backbone in evaluation mode.

    Args:
        backbone: timm model name, e.g. `vit_base_patch16_224.augreg_in21k`, `hf-hub:ORG/NAME`, or a folder that timm
            saved a model to, also as `local-dir:FOLDER`.
        weights: `pretrained`, those of timm's hub or of the folder; `package:efficientnet-lite0` (1, 2), those inside a
            pip package; or a file or folder (`read_state`), loaded strictly. In a checkpoint the model is found by its
            names, averaged weights first, as in timm; FILE#PREFIX names another part.
        image_size: side of the square input in pixels, by default the model's; position embeddings are resampled.
        device: where the model runs.
        precision: `bfloat16` runs the forward pass under autocast.
        decode: `pillow-draft` lets the JPEG decoder skip detail that the resize would average away: faster for large
            images, not exact. Other formats, and views that are crops, are decoded in full.
        compiled: run the backbone through torch.compile.
        runtime: `onnx` runs it by ONNX Runtime: faster for some convolutional networks on the CPU.

    Raises:
        ValueError: an unknown backbone, weights that cannot be loaded or do not fit, an input size that the model does
            not support, a model without pooled features, or a runtime that cannot be used.
    """
    from timm.data import create_transform, resolve_data_config

    model, source = _load_model(backbone, weights)
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
    transform = create_transform(**config, is_training=False, use_prefetcher=True)  # uint8, normalised by `embed`
    dim = _width(model, backbone, config["input_size"], torch.device(device))
    if compiled:
        module: Any = model
        module.forward_features = torch.compile(module.forward_features)
    backbone = local_folder(backbone) or backbone  # one name for one model, also in the manifest
    return Teacher(
        backbone, source, digest, preprocessing, dim, torch.device(device), model, transform, precision, runtime
    )


def state_digest(state: State) -> str:
    """Return the sha256 of names, types, shapes and bytes of a state dict, whatever the order of its entries."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_model(backbone: str, weights: str) -> tuple[nn.Module, str]:
    """Return a timm model with weights, and where these came from, as manifests say it."""
    if weights == "pretrained":
        model = create_timm_model(backbone, pretrained=True)
        # A tag is of timm's own names; what the hub or a folder gives under another name has none.
        tag = None if backbone.startswith(SOURCES) else getattr(model, "pretrained_cfg", {}).get("tag")
        return model, local_folder(backbone) or (f"pretrained:{tag}" if tag else "pretrained")
    if weights.startswith("package:"):
        from threetowers.cache.encoders.packaged_weights import load_packaged_model

        return load_packaged_model(backbone, weights.removeprefix("package:")), weights
    path, part = split_part(weights)
    with torch.device("meta"):
        headless = create_timm_model(backbone, num_classes=0)
    state, part = model_part(read_state(path), headless.state_dict(), weights, part)
    # The file's own classifier, of any number of classes, so that all of its tensors are loaded and counted.
    heads = [state[f"{name}.weight"] for name in classifiers(headless) if f"{name}.weight" in state]
    model = create_timm_model(backbone, num_classes=len(heads[0]) if heads else 0)
    load_strictly(model, state, str(path), f"backbone {backbone!r}")
    require_finite(model, str(path))
    return model, f"file:{path.name}" + (f"#{part}" if part else "")


def _resize_input(model: nn.Module, backbone: str, image_size: int) -> None:
    if not getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False):
        return
    if not hasattr(model, "set_input_size"):
        raise ValueError(f"backbone {backbone!r} supports one input size only: leave out image_size")
    try:
        resize: Callable[..., None] = model.set_input_size  # type: ignore[assignment]
        resize(img_size=image_size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ValueError(f"backbone {backbone!r} does not support image_size={image_size}: {error}") from error


def _width(model: nn.Module, backbone: str, input_size: tuple[int, int, int], device: torch.device) -> int:
    try:
        with torch.inference_mode():
            features = pooled_features(model, torch.zeros(1, *input_size, device=device))
    except Exception as error:  # each family of models raises its own kinds
        raise ValueError(
            f"backbone {backbone!r} gives no pre-logits features at {input_size}: {one_line(error)}"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"backbone {backbone!r}: expected pooled features (1, D), found {found}")
    return features.shape[1]
