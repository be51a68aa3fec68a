"""timm's models as encoders of images: their evaluation transform, and the features of one forward pass."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import (
    LAYER,
    FrozenEncoder,
    ImageEncoder,
    ImageModel,
    require_offered,
    state_digest,
)
from threetowers.cache.encoders.image_features import TOKEN_FEATURES, ImageLayout, LayerOutputs, token_feature
from threetowers.cache.encoders.names import EncoderName, EncoderOptions
from threetowers.cache.encoders.timm_models import (
    SOURCES,
    classifiers,
    create_timm_model,
    local_folder,
)
from threetowers.cache.encoders.weights_file import (
    load_strictly,
    model_part,
    one_line,
    read_state,
    require_finite,
    split_part,
)
from threetowers.cache.format.manifest import Preprocessing


class TimmFeatures(ImageModel):
    """The features of a timm model.

    - `pooled`: what comes before its classifier (timm's pre-logits).
    - `cls`: the class token, where it has one.
    - `mean_patch`: the mean of the tokens of patches, without class, distillation and register tokens, where it has
      tokens.
    - `cls+mean_patch`: both, concatenated in this order, as dino.txt (arXiv:2412.16334) takes them.
    - `layer:NAME`: the output of a module as one vector (`mean_over_image`).

    Tokens are those of `forward_features`: after the final norm, except in models that norm what is pooled instead
    (`fc_norm`), whose tokens have none.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int], name: str) -> None:
        """Find out what a model offers.

        Args:
            model: Of timm, in evaluation mode.
            input_size: (height, width) of its input in pixels.
            name: Of the model, for messages.

        Raises:
            ValueError: It cannot compute an image of this size.
        """
        super().__init__()
        self.model: Any = model
        self.layout = timm_layout(model, input_size, name)
        self.features = ("pooled", *timm_token_features(model, self.layout))
        self._name = name
        self._layers = LayerOutputs(model, self.layout, name)

    def forward(self, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        for feature in features:
            if not feature.startswith(LAYER):
                reason = "a timm model has no joint space of images and text" if feature == "projected" else ""
                require_offered(feature, (*self.features, f"{LAYER}NAME"), self._name, reason)
        with_layers = self._layers.begin(features)
        x = self.model.forward_features(x_b3HW)
        found = {}
        if "pooled" in features or with_layers:  # a layer may be one of the head
            found["pooled"] = self.model.forward_head(x, pre_logits=True)
        return tuple(found[one] if one in found else self._other(one, x) for one in features)

    def _other(self, feature: str, x: Tensor) -> Tensor:
        """Return a feature other than `pooled`; `x`: the tokens (b, L, D), if it is one of these."""
        if feature.startswith(LAYER):
            return self._layers.vector(feature)
        return token_feature(feature, x, self.layout.prefix)


def timm_layout(model: nn.Module, input_size: tuple[int, int], name: str) -> ImageLayout:
    """Return the layout of the outputs of a timm model. Raises ValueError where it cannot compute this size."""
    timm_model: Any = model
    weights = next(model.parameters())
    try:
        with torch.inference_mode():
            x = timm_model.forward_features(torch.zeros(1, 3, *input_size, dtype=weights.dtype, device=weights.device))
    except Exception as error:  # each family of models raises its own kinds
        raise ValueError(f"{name} gives no features at {input_size}: {one_line(error)}") from error
    channels_last = str(getattr(model, "output_fmt", "")).endswith("NHWC")
    if not isinstance(x, Tensor) or x.ndim != 3:
        return ImageLayout(input_size, channels_last=channels_last)
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:  # the other families tell by how much they reduce the sides
        reduction = timm_model.feature_info[-1]["reduction"]
        prefix = x.shape[1] - math.prod(math.ceil(side / reduction) for side in input_size)
    if prefix < 0:  # class tokens alone
        return ImageLayout(input_size)
    return ImageLayout(input_size, prefix, x.shape[1], channels_last)


def timm_token_features(model: nn.Module, layout: ImageLayout) -> tuple[str, ...]:
    """Return the features that a timm model has by its tokens."""
    if layout.tokens is None:
        return ()
    has_class = layout.prefix > 0 and getattr(model, "cls_token", None) is not None
    return TOKEN_FEATURES if has_class else ("mean_patch",)


def load_timm_encoder(name: EncoderName, options: EncoderOptions) -> FrozenEncoder:
    """Load a timm model as an encoder of images.

    Args:
        name: A timm model, e.g. `vit_base_patch16_224.augreg_in21k`, `hf-hub:ORG/NAME`, or a folder that timm saved a
            model to, also as `local-dir:FOLDER`. Its size is the side of the input in pixels; position embeddings are
            resampled. Its weights are `pretrained` (the default), those of timm's hub or of the folder;
            `package:efficientnet-lite0` (1, 2), those inside a pip package; or a file or folder (`read_state`), loaded
            strictly. In a checkpoint the model is found by its names, averaged weights first, as in timm; FILE#PREFIX
            names another part.
        options: How it is loaded and run. Formats other than JPEG, and views that are crops, are decoded in full.

    Raises:
        ValueError: An unknown model, weights that cannot be loaded or do not fit, an input size that the model does
            not support, a model without pooled features, or a runtime that cannot be used.
    """
    from timm.data import create_transform, resolve_data_config

    model, source = load_timm_model(name.name, name.weights or "pretrained")
    digest = state_digest(model.state_dict())
    config = resolve_data_config({}, model=model)
    if name.size is not None and (3, name.size, name.size) != tuple(config["input_size"]):
        config["input_size"] = (3, name.size, name.size)
        _resize_input(model, name.name, name.size)
    device = torch.device(options.device)
    model = model.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    preprocessing = Preprocessing(
        input_size=config["input_size"][1:],
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        decode=options.decode,
    )
    transform = create_transform(**config, is_training=False, use_prefetcher=True)  # uint8, normalised by the encoder
    image = ImageEncoder(
        name.model,
        TimmFeatures(model, preprocessing.input_size, name.model),
        preprocessing,
        transform,
        device,
        options.precision,
        options.runtime,
        options.compiled,
    )
    image.width()  # refuses a model without pooled features
    return FrozenEncoder(name.model, source, digest, image, packages=("torch", "timm", "pillow"))


def load_timm_model(name: str, weights: str) -> tuple[nn.Module, str]:
    """Return a timm model with weights, and where these came from, as manifests say it.

    Raises:
        ValueError: As for `load_timm_encoder`.
    """
    if weights == "pretrained":
        model = create_timm_model(name, pretrained=True)
        # A tag is of timm's own names; what the hub or a folder gives under another name has none.
        tag = None if name.startswith(SOURCES) else getattr(model, "pretrained_cfg", {}).get("tag")
        return model, local_folder(name) or (f"pretrained:{tag}" if tag else "pretrained")
    if weights.startswith("package:"):
        from threetowers.cache.encoders.packaged_weights import load_packaged_model

        return load_packaged_model(name, weights.removeprefix("package:")), weights
    path, part = split_part(weights)
    with torch.device("meta"):
        headless = create_timm_model(name, num_classes=0)
    state, part = model_part(read_state(path), headless.state_dict(), weights, part)
    # The file's own classifier, of any number of classes, so that all of its tensors are loaded and counted.
    heads = [state[f"{head}.weight"] for head in classifiers(headless) if f"{head}.weight" in state]
    model = create_timm_model(name, num_classes=len(heads[0]) if heads else 0)
    load_strictly(model, state, str(path), f"timm:{name}")
    require_finite(model, str(path))
    return model, f"file:{path.name}" + (f"#{part}" if part else "")


def _resize_input(model: nn.Module, name: str, size: int) -> None:
    if not getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False):
        return
    if not hasattr(model, "set_input_size"):
        raise ValueError(f"timm:{name} supports one input size only: leave out @{size}")
    try:
        resize: Callable[..., None] = model.set_input_size  # type: ignore[assignment]
        resize(img_size=size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ValueError(f"timm:{name} does not support @{size}: {error}") from error
