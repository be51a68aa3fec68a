"""Transforms of an image for the image tower: crops to a square of bytes, and random augmentation of them."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from threetowers.cache.format.views import Params, random_box, render_view
from threetowers.trainer.config import Augment


def center_crop(image: Image.Image, size: int) -> Tensor:
    """Return the largest central square, resized: (3, size, size) uint8."""
    return _to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def stored_view(image: Image.Image, size: int, params_P: Params, interpolation: str) -> Tensor:
    """Return a view by the parameters that a cache records (see `cache.format.views`): (3, size, size) uint8."""
    return _to_tensor(render_view(image, params_P, (size, size), interpolation))


def random_crop(image: Image.Image, size: int, scale: float, rng: np.random.Generator) -> Tensor:
    """Return a random crop of `scale` to 1 of the area and aspect 3/4 to 4/3, resized: (3, size, size) uint8."""
    box = random_box(*image.size, scale, rng)
    return _to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def augment(image_3HW: Tensor, options: Augment, rng: np.random.Generator) -> Tensor:
    """Return a randomly augmented image.

    The transforms are those of torchvision, in this order: horizontal flip; brightness, contrast, saturation and hue in
    a random order, as in its ColorJitter; grayscale; Gaussian blur. Nothing but `rng` is random, so that the result
    depends on the sample's own seed alone.

    Args:
        image_3HW: (3, H, W) uint8.
        options: Probabilities and strengths.
        rng: The sample's random numbers. A transform that is off takes none.

    Returns:
        (3, H, W) uint8; `image_3HW` itself where nothing applies.
    """
    from torchvision.transforms.v2 import functional as F

    image = image_3HW
    if _happens(options.flip, rng):
        image = image.flip(-1)
    if _happens(options.jitter, rng):
        for name in rng.permutation(["brightness", "contrast", "saturation", "hue"]).tolist():
            strength = getattr(options, name)
            if strength:
                identity = 0.0 if name == "hue" else 1.0
                factor = rng.uniform(identity - strength, identity + strength)
                image = getattr(F, f"adjust_{name}")(image, factor)
    if _happens(options.grayscale, rng):
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if _happens(options.blur, rng):
        sigma = float(rng.uniform(0.1, 2.0))
        kernel_size = 2 * int(np.ceil(2 * sigma)) + 1
        image = F.gaussian_blur(image, [kernel_size] * 2, [sigma] * 2)
    return image


def _happens(probability: float, rng: np.random.Generator) -> bool:
    return probability > 0 and bool(rng.random() < probability)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
