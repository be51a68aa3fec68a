"""The image a tower sees: a square of bytes, cut from the decoded picture."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def center(image: Image.Image, size: int) -> Tensor:
    """Return the largest central square, resized: (3, size, size) uint8."""
    return _bytes(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def random_crop(image: Image.Image, size: int, scale: float, rng: np.random.Generator) -> Tensor:
    """Return a random crop of `scale` to 1 of the area and aspect 3/4 to 4/3, resized: (3, size, size) uint8."""
    width, height = image.size
    area = width * height * rng.uniform(scale, 1)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    crop_width = min(width, (area * aspect) ** 0.5)
    crop_height = min(height, area / crop_width)
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    return _bytes(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
