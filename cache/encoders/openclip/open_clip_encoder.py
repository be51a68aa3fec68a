"""open_clip's models as encoders of images and of text, with its own evaluation transform and tokenizer."""

from typing import Any

import torch
from torchvision.transforms import Compose, Normalize, ToTensor

from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder, TextEncoder, state_digest
from threetowers.cache.encoders.names import EncoderName, EncoderOptions
from threetowers.cache.encoders.openclip.image_model import OpenClipImages
from threetowers.cache.encoders.openclip.loading import load_open_clip_model
from threetowers.cache.encoders.openclip.text_model import OpenClipText
from threetowers.cache.format.manifest import DecodeMode, Preprocessing

# open_clip's modes of resizing, as timm's modes of cropping. timm pads with the mean, open_clip with one grey.
CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border-{fill_color}"}


def load_open_clip_encoder(name: EncoderName, options: EncoderOptions) -> FrozenEncoder:
    """Load an open_clip model as an encoder of images and of text.

    Args:
        name: A model of open_clip, `hf-hub:ORG/NAME`, or a folder that it saved, also as `local-dir:FOLDER`; its
            weights are as of `load_open_clip_model`.
        options: How it is loaded and run.

    Raises:
        ValueError: The model, its weights or its tokenizer cannot be loaded, or another size, length or runtime is
            wanted than it can be used with.
    """
    loaded = load_open_clip_model(name.name, name.weights)
    model = loaded.model
    digest = state_digest(model.state_dict())
    full_name = f"open_clip:{loaded.name}"
    device = torch.device(options.device)
    model.to(device).to(memory_format=torch.channels_last)
    preprocessing = open_clip_preprocessing(model.visual.preprocess_cfg, loaded.transform, options.decode)
    if name.size is not None and preprocessing.input_size != (name.size, name.size):
        size = " x ".join(map(str, preprocessing.input_size))
        raise ValueError(f"{full_name}: expected the model's own size, {size}, found @{name.size}: leave it out")
    logit_scale = float(model.logit_scale.detach().float().exp())
    text = OpenClipText(model, loaded.tokenizer, options.prompt, options.max_length, full_name)
    image = ImageEncoder(
        full_name,
        OpenClipImages(model.visual, preprocessing.input_size, full_name).eval(),
        preprocessing,
        uint8_transform(loaded.transform),
        device,
        options.precision,
        options.runtime,
        options.compiled,
    )
    image.width()  # refuses a tower that cannot compute an image of its size
    return FrozenEncoder(
        full_name,
        loaded.weights,
        digest,
        image,
        TextEncoder(full_name, text.eval(), device, options.precision),
        logit_scale,
        packages=("torch", "open_clip_torch", "timm", "pillow", *loaded.tokenizer.packages),
    )


def open_clip_preprocessing(config: dict[str, Any], transform: Any, decode: DecodeMode) -> Preprocessing:
    """Return an evaluation transform of open_clip in timm's terms.

    Args:
        config: As open_clip keeps it with a model (`model.visual.preprocess_cfg`).
        transform: What open_clip made of it.
        decode: How the bytes of an image become its pixels.
    """
    size, mode = config["size"], config["resize_mode"]
    height, width = (size, size) if isinstance(size, int) else size
    # Two exceptions are open_clip's own: `random` is for training, and the shorter side of an image that does not
    # become a square is resized by the default.
    bilinear = config["interpolation"] == "bilinear" and not (mode == "shortest" and height != width)
    return Preprocessing(
        input_size=(height, width),
        interpolation="bilinear" if bilinear else "bicubic",
        crop_pct=1.0,
        crop_mode=CROP_MODES[mode].format_map(config),
        mean=tuple(transform.transforms[-1].mean),
        std=tuple(transform.transforms[-1].std),
        decode=decode,
    )


def uint8_transform(transform: Any) -> Compose:
    """Return an evaluation transform of open_clip without its last two steps: from an image to (3, H, W) uint8.

    Raises:
        ValueError: It does not end in a conversion to a tensor and the normalisation.
    """
    from timm.data.transforms import ToNumpy

    *steps, to_tensor, normalize = transform.transforms
    if not isinstance(to_tensor, ToTensor) or not isinstance(normalize, Normalize):
        raise ValueError(f"expected an evaluation transform that ends in ToTensor and Normalize, found {transform}")
    return Compose([*steps, ToNumpy()])
