"""Models of transformers as encoders: of text (BERT, T5, Llama), of images (ViT, DINOv2), or of both (CLIP, SigLIP)."""

import logging
from typing import Any

import torch
from torch import nn

from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder, TextEncoder, state_digest
from threetowers.cache.encoders.huggingface.image_model import HfImageModel
from threetowers.cache.encoders.huggingface.image_processor import load_image_transform
from threetowers.cache.encoders.huggingface.loading import ModelFiles, load_pretrained, require
from threetowers.cache.encoders.huggingface.text_model import HfTextModel, text_call
from threetowers.cache.encoders.huggingface.tokenizer import (
    CaptionTokenizer,
    chosen_length,
    length_limit,
    load_tokenizer,
)
from threetowers.cache.encoders.names import EncoderName, EncoderOptions
from threetowers.cache.encoders.weights_file import require_finite

logger = logging.getLogger(__name__)

KIND = "hf"
FIXED_LENGTH = ("siglip", "siglip2")  # trained on captions padded to their full length, without a mask


def load_hf_encoder(name: EncoderName, options: EncoderOptions) -> FrozenEncoder:
    """Load a model of transformers as an encoder.

    Args:
        name: A folder that `save_pretrained` wrote, with its tokenizer or image processor, or a name on the hub,
            perhaps with @REVISION. Its weights are a folder with a copy of the files of that name. Its size is the side
            of an image in pixels, for models that take several. Neither pickled objects nor code of the hub are run.
        options: How it is loaded and run. A prompt is put before each caption as it is.

    Raises:
        ValueError: transformers is not installed; the files cannot be loaded, are incomplete, or are of a model that is
            neither of text nor of images; a length or size that the model does not take.
    """
    require("transformers", "hf", KIND)
    files = ModelFiles.of(name)
    full_name = f"{KIND}:{name.name}"
    from transformers import AutoConfig

    config: Any = files.load("config", AutoConfig.from_pretrained)
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0  # a masked autoencoder hides patches at random, unless it is told not to
    if hasattr(config, "use_cache"):
        config.use_cache = False  # nothing is generated
    model: Any = load_pretrained(files, config)
    require_finite(model, files.source)
    digest = state_digest(model.state_dict())
    device = torch.device(options.device)
    model.to(device)
    sees, reads = _sides(model)
    image = _image_side(model, files, name, full_name, options, device) if sees else None
    text = _text_side(model, config, files, full_name, options, device) if reads else None
    scale = getattr(model, "logit_scale", None)
    return FrozenEncoder(
        full_name,
        str(files.folder) if files.folder is not None else "pretrained",
        digest,
        image,
        text,
        float(scale.detach().exp()) if scale is not None else None,
        packages=("torch", "transformers", "tokenizers", "pillow"),
    )


def _sides(model: Any) -> tuple[bool, bool]:
    """Return whether a model sees images, and whether it reads text. Raises ValueError if it does neither."""
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        return True, True
    sides = model.main_input_name == "pixel_values", model.main_input_name == "input_ids"
    if not any(sides):
        raise ValueError(
            f"{type(model).__name__}: expected a model of text or images, found one of {model.main_input_name}"
        )
    return sides


def _image_side(
    model: nn.Module,
    files: ModelFiles,
    name: EncoderName,
    full_name: str,
    options: EncoderOptions,
    device: torch.device,
) -> ImageEncoder:
    transform, preprocessing = load_image_transform(files, name.size, options.decode, full_name)
    try:
        image_model = HfImageModel(model, preprocessing.input_size, full_name)
    except (RuntimeError, ValueError, TypeError) as error:
        height, width = preprocessing.input_size
        raise ValueError(f"{full_name} does not take images of {height}x{width} pixels: {error}") from error
    return ImageEncoder(
        full_name,
        image_model,
        preprocessing,
        transform,
        device,
        options.precision,
        options.runtime,
        options.compiled,
    )


def _text_side(
    model: Any, config: Any, files: ModelFiles, full_name: str, options: EncoderOptions, device: torch.device
) -> TextEncoder:
    tokenizer = load_tokenizer(files)
    _, tower = text_call(model)
    limit = length_limit(tokenizer, config, tower)
    special = tokenizer.num_special_tokens_to_add()
    max_length = chosen_length(options.max_length, limit, special, full_name)
    fixed_length = str(config.model_type).removesuffix("_text_model") in FIXED_LENGTH
    if fixed_length and max_length != limit:
        raise ValueError(
            f"{full_name}: --max-length: found {max_length}, expected {limit}: it was trained on captions padded to it"
        )
    tokens = CaptionTokenizer(tokenizer, max_length, options.prompt or "", tower.get_input_embeddings().num_embeddings)
    text_model = HfTextModel(model, tokens, full_name, fixed_length)
    if files.folder is not None and (files.folder / "modules.json").is_file():
        logger.warning(
            "%s is a model of sentence-transformers: %s: pools its states as its files say, %s: by %r",
            files.source,
            "st",
            KIND,
            text_model.processing.pooling,
        )
    return TextEncoder(full_name, text_model, device, options.precision)
