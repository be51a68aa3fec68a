"""Random changes of a picture's bytes, by torchvision's transforms of tensors."""

import numpy as np
from torch import Tensor

from threetowers.trainer.config import Augment


def augmented(image_3hw: Tensor, options: Augment, rng: np.random.Generator) -> Tensor:
    """Return a picture (3, H, W) uint8 changed at random, as the options say; itself where they say nothing.

    Flip, then brightness, contrast, saturation and hue in a random order (torchvision's ColorJitter), then grey, then
    blur. Takes from `rng` what it needs and nothing else, so that a picture depends on its own seed alone.
    """
    from torchvision.transforms.v2 import functional as F

    image = image_3hw
    if _happens(options.flip, rng):
        image = image.flip(-1)
    if _happens(options.jitter, rng):
        for name in rng.permutation(["brightness", "contrast", "saturation", "hue"]).tolist():
            strength = getattr(options, name)
            if strength:
                centre = 0.0 if name == "hue" else 1.0
                image = getattr(F, f"adjust_{name}")(image, rng.uniform(centre - strength, centre + strength))
    if _happens(options.grayscale, rng):
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if _happens(options.blur, rng):
        sigma = float(rng.uniform(0.1, 2.0))
        image = F.gaussian_blur(image, [2 * int(np.ceil(2 * sigma)) + 1] * 2, [sigma] * 2)
    return image


def _happens(probability: float, rng: np.random.Generator) -> bool:
    return probability > 0 and bool(rng.random() < probability)
