"""Frozen encoders: pretrained models of images, of text, or of both, as caches, trainer and evaluation use them.

A kind of encoder brings its models as `ImageModel` and `TextModel`; arithmetic, runtimes and widths are the same for
all.
"""

import contextlib
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from threetowers.cache.encoders.onnx_runtime import OnnxNetwork, require_onnx_runtime
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens
from threetowers.cache.encoders.weights_file import State, one_line
from threetowers.cache.format.manifest import (
    EncoderPrecision,
    EncoderRuntime,
    Preprocessing,
    Side,
    TextProcessing,
)
from threetowers.cache.processes.float32_products import exact_products

DRAFT_MARGIN = 2  # a draft keeps this many times the pixels per side of the resized image, enough for its filter
LAYER = "layer:"  # begins the name of a feature that is the output of a module
UNIT = "unit:"  # begins the name of a feature that is another one scaled to unit norm


class ImageModel(nn.Module, ABC):
    """A model from normalised pixels to features, as one kind of encoder computes them.

    Attributes:
        features: The features that it offers, the default first; beside these `layer:NAME` of its modules, perhaps.
    """

    features: tuple[str, ...]

    @abstractmethod
    def forward(self, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each, by one pass. Raises ValueError for one that it does not offer."""


class TextModel(nn.Module, ABC):
    """A model from tokens to features, as one kind of encoder computes them.

    Attributes:
        features: The features that it offers, the default first.
        processing: How captions become tokens, and tokens a vector.
    """

    features: tuple[str, ...]
    processing: TextProcessing

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each caption, with the prompt before it, cut to the model's length."""

    @abstractmethod
    def collate(self, tokens: Sequence[Tokens]) -> Mapping[str, Tensor]:
        """Return a batch of captions as the inputs of `forward`, padded so that no row depends on the others."""

    @abstractmethod
    def forward(self, inputs: Mapping[str, Tensor], features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each, by one pass. Raises ValueError for one that it does not offer."""


class PixelNetwork(nn.Module):
    """An image model from uint8 pixels to some of its features, normalisation included."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: ImageModel, preprocessing: Preprocessing, features: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.features = tuple(features)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images_b3HW: Tensor) -> tuple[Tensor, ...]:
        """Return the features, (b, D) each."""
        x_b3HW = images_b3HW.float().div_(255).sub_(self.mean).div_(self.std)
        weights = next(self.model.parameters(), self.mean)
        features: tuple[Tensor, ...] = self.model(x_b3HW.to(weights.dtype), self.features)
        return features


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """The image side of a frozen encoder.

    Attributes:
        name: Of the encoder, for messages.
        model: Computes the features.
        preprocessing: Its evaluation transform, in timm's terms.
        transform: Maps an RGB image to (3, H, W) uint8 pixels; normalisation is left to the forward pass.
        device: Where the model runs.
        precision: Arithmetic of the forward pass; `bfloat16` is autocast over float32 weights.
        runtime: What runs it; `onnx` does on the CPU in float32.
        compiled: Whether torch.compile compiles it.

    Raises:
        ValueError: The runtime is not installed, or is not for this device or precision.
    """

    name: str
    model: ImageModel
    preprocessing: Preprocessing
    transform: Callable[[Image.Image], npt.NDArray[np.uint8]]
    device: torch.device
    precision: EncoderPrecision = "float32"
    runtime: EncoderRuntime = "torch"
    compiled: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a runtime that cannot be used."""
        if self.runtime == "torch":
            return
        if self.device.type != "cpu" or self.precision != "float32":
            raise ValueError(
                f"--runtime onnx: expected the CPU and float32, found {self.device.type} and {self.precision}: use "
                "--runtime torch, or --device cpu --precision float32"
            )
        require_onnx_runtime()

    @property
    def features(self) -> tuple[str, ...]:
        """The features that it offers, the default first."""
        return self.model.features

    @property
    def min_side(self) -> int | None:
        """The shorter side in pixels down to which a JPEG may be decoded; None for a full decode."""
        if self.preprocessing.decode == "pillow":
            return None
        return math.ceil(DRAFT_MARGIN * max(self.preprocessing.input_size) / self.preprocessing.crop_pct)

    def width(self, feature: str | None = None) -> int:
        """Return the width D of a feature, by default the first. Raises ValueError for one that it does not offer."""
        feature = (feature or self.features[0]).removeprefix(UNIT)
        if feature not in self._widths:
            images_13HW = torch.zeros(1, 3, *self.preprocessing.input_size, dtype=torch.uint8, device=self.device)
            try:
                with torch.inference_mode():
                    (x_1D,) = self._network((feature,), compiled=False)(images_13HW)
            except ValueError:
                raise
            except Exception as error:  # each family of models raises its own kinds
                size = self.preprocessing.input_size
                raise ValueError(f"{self.name} gives no {feature!r} features at {size}: {one_line(error)}") from error
            if x_1D.ndim != 2 or len(x_1D) != 1:
                raise ValueError(f"{self.name}: expected {feature!r} features (1, D), found {tuple(x_1D.shape)}")
            self._widths[feature] = x_1D.shape[1]
        return self._widths[feature]

    def prepare(self, features: Sequence[str] | None = None) -> None:
        """Do now what the first forward pass would do once. Raises ValueError as that would."""
        if self.runtime == "onnx":
            self._onnx_network(_computed(features or self.features[:1]))

    def embed(self, images_b3HW: Tensor, feature: str | None = None) -> Tensor:
        """Return one feature of uint8 pixels: (b, D) float32, not normalised, on the CPU.

        Raises:
            ValueError: The pixels are not uint8, so perhaps normalised already; the feature is not offered; with the
                runtime `onnx` also as for `OnnxNetwork`.
        """
        (x_bD,) = self.forward(images_b3HW.to(self.device, non_blocking=True), (feature or self.features[0],))
        return x_bD.cpu().clone()  # outside inference mode an ordinary tensor

    def forward(self, images_b3HW: Tensor, features: Sequence[str]) -> list[Tensor]:
        """Return several features like `embed`, by one pass, from and to the device.

        A GPU is given its work, and not waited for.
        """
        if images_b3HW.dtype != torch.uint8:
            raise ValueError(f"expected uint8 pixels as `transform` gives them, found {images_b3HW.dtype}")
        computed = _computed(features)
        if self.runtime == "onnx":
            return _as_named(computed, self._onnx_network(computed)(images_b3HW), features)
        network = self._network(computed, self.compiled)
        # Inference mode first: at its end it puts back the autocast that it found, and would leave it on for good.
        with torch.inference_mode(), encoder_arithmetic(self.precision, self.device):
            found = [x_bD.float() for x_bD in network(images_b3HW.to(memory_format=torch.channels_last))]
        return _as_named(computed, found, features)

    @cached_property
    def _widths(self) -> dict[str, int]:
        return {}

    @cached_property
    def _networks(self) -> dict[tuple[tuple[str, ...], bool], Any]:
        return {}

    @cached_property
    def _onnx_networks(self) -> dict[tuple[str, ...], OnnxNetwork]:
        return {}

    def _network(self, features: tuple[str, ...], compiled: bool) -> Any:
        """Return the model with its normalisation, on the device."""
        if (features, compiled) not in self._networks:
            if compiled:  # an error is one line before, and many after
                for feature in features:
                    self.width(feature)
            network = PixelNetwork(self.model, self.preprocessing, features).to(self.device).eval()
            self._networks[features, compiled] = torch.compile(network) if compiled else network
        return self._networks[features, compiled]

    def _onnx_network(self, features: tuple[str, ...]) -> OnnxNetwork:
        """Return the same for ONNX Runtime. Raises ValueError where the model cannot be exported."""
        if features not in self._onnx_networks:
            network = self._network(features, compiled=False)
            self._onnx_networks[features] = OnnxNetwork(network, self.preprocessing.input_size, features, self.name)
        return self._onnx_networks[features]


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """The text side of a frozen encoder.

    Attributes:
        name: Of the encoder, for messages.
        model: Tokenises captions and computes the features.
        device: Where the model runs.
        precision: Arithmetic of the forward pass; `bfloat16` is autocast over float32 weights.
    """

    name: str
    model: TextModel
    device: torch.device
    precision: EncoderPrecision = "float32"

    @property
    def features(self) -> tuple[str, ...]:
        """The features that it offers, the default first."""
        return self.model.features

    @property
    def processing(self) -> TextProcessing:
        """How captions become tokens, and tokens a vector."""
        return self.model.processing

    def width(self, feature: str | None = None) -> int:
        """Return the width D of a feature, by default the first. Raises ValueError for one that it does not offer."""
        return self.embed(["a"], feature).shape[1]

    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each caption, with the prompt before it, cut to the model's length."""
        return self.model.tokenize(captions)

    def forward(self, tokens: Sequence[Tokens], features: Sequence[str]) -> list[Tensor]:
        """Return several features of a batch of captions, (b, D) float32 each, by one pass, on the device.

        A GPU is given its work, and not waited for.
        """
        inputs = {name: x.to(self.device, non_blocking=True) for name, x in self.collate(tokens).items()}
        return self.compute(inputs, features)

    def collate(self, tokens: Sequence[Tokens]) -> Mapping[str, Tensor]:
        """Return a batch of captions as the inputs of `compute`, on the CPU."""
        return self.model.collate(tokens)

    def compute(self, inputs: Mapping[str, Tensor], features: Sequence[str]) -> list[Tensor]:
        """Return what `forward` returns, of inputs on the device."""
        computed = _computed(features)
        with torch.inference_mode(), encoder_arithmetic(self.precision, self.device):
            found = [x_bD.float() for x_bD in self.model(inputs, computed)]
        return _as_named(computed, found, features)

    def embed(self, captions: Sequence[str], feature: str | None = None) -> Tensor:
        """Return one feature of captions: (b, D) float32, on the CPU, as the model gives it.

        Raises:
            ValueError: The feature is not offered.
        """
        (x_bD,) = self.forward(self.tokenize(captions), (feature or self.features[0],))
        return x_bD.cpu().clone()


@dataclass(frozen=True, eq=False)
class FrozenEncoder:
    """A frozen pretrained model.

    Attributes:
        name: Kind and name of the model, as `timm:tf_efficientnet_lite0`, without weights.
        weights: Where the weights came from.
        weights_digest: Sha256 of the state dict.
        image: Its image side; None where it sees no images.
        text: Its text side; None where it reads no text.
        logit_scale: The learned inverse temperature of image and text in their joint space; None without one.
        packages: Names of the packages whose versions decide what it computes.
    """

    name: str
    weights: str
    weights_digest: str
    image: ImageEncoder | None = None
    text: TextEncoder | None = None
    logit_scale: float | None = None
    packages: tuple[str, ...] = ("torch",)

    @overload
    def side(self, of: Literal["image"]) -> ImageEncoder: ...

    @overload
    def side(self, of: Literal["text"]) -> TextEncoder: ...

    @overload
    def side(self, of: Side) -> ImageEncoder | TextEncoder: ...

    def side(self, of: Side) -> ImageEncoder | TextEncoder:
        """Return one side. Raises ValueError where the model does not have it."""
        side = self.image if of == "image" else self.text
        if side is None:
            other = "text" if of == "image" else "image"
            raise ValueError(f"{self.name} has no {of} side: choose an encoder that has one, or use --of {other}")
        return side

    def running(self, precision: EncoderPrecision, runtime: EncoderRuntime) -> "FrozenEncoder":
        """Return the same encoder, computing in this precision by this runtime (which is that of images)."""
        image = self.image and replace(self.image, precision=precision, runtime=runtime)
        text = self.text and replace(self.text, precision=precision)
        return replace(self, image=image, text=text)

    def with_weights(self, dtype: torch.dtype) -> "FrozenEncoder":
        """Return the same encoder with weights, and so products, of another type. Its modules change in place."""
        for side in (self.image, self.text):
            if side is not None:
                side.model.to(dtype)
        return self.running("float32", "torch")


def _computed(features: Sequence[str]) -> tuple[str, ...]:
    """Return the features that a model computes for these, each once: UNIT is what is done with them."""
    return tuple(dict.fromkeys(feature.removeprefix(UNIT) for feature in features))


def _as_named(computed: Sequence[str], found: Sequence[Tensor], features: Sequence[str]) -> list[Tensor]:
    """Return the features by name of those that a model has computed."""
    x_bD = dict(zip(computed, found, strict=True))
    return [
        nn.functional.normalize(x_bD[feature.removeprefix(UNIT)], dim=-1) if feature.startswith(UNIT) else x_bD[feature]
        for feature in features
    ]


def encoder_arithmetic(precision: EncoderPrecision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which products are computed in this precision."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return exact_products()


def require_offered(feature: str, offered: Sequence[str], name: str, reason: str = "") -> None:
    """Raise ValueError for a feature that a model does not offer. `reason`: why, for some feature that is asked for."""
    if feature not in offered:
        because = f": {reason}" if reason else ""
        raise ValueError(f"{name}: feature: expected one of {', '.join(offered)}, found {feature!r}{because}")


def state_digest(state: State) -> str:
    """Return the sha256 of names, types, shapes and bytes of a state dict, whatever the order of its entries."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
