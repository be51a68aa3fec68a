"""timm's models as encoders of images: their evaluation transform, and features before the classifier."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder, ImageModel, require_offered, state_digest
from threetowers.cache.encoders.names import EncoderName, EncoderOptions
from threetowers.cache.encoders.timm_models import (
    SOURCES,
    classifiers,
    create_timm_model,
    local_folder,
    pooled_features,
)
from threetowers.cache.encoders.weights_file import (
    load_strictly,
    model_part,
    read_state,
    require_finite,
    split_part,
)
from threetowers.cache.format.manifest import Preprocessing


class TimmFeatures(ImageModel):
    """The features of a timm model: `pooled`, those before its classifier."""

    features = ("pooled",)

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self._name = name

    def forward(self, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        for feature in features:
            require_offered(feature, self.features, self._name)
        return tuple(pooled_features(self.model, x_b3HW) for _ in features)


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
    if name.size is not None:
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
    full_name = f"timm:{local_folder(name.name) or name.name}"  # one name for one model, also in the manifest
    image = ImageEncoder(
        full_name,
        TimmFeatures(model, full_name),
        preprocessing,
        transform,
        device,
        options.precision,
        options.runtime,
        options.compiled,
    )
    image.width()  # refuses a model without pooled features
    return FrozenEncoder(full_name, source, digest, image, packages=("torch", "timm", "pillow"))


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
