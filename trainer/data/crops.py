"""The image a tower sees: a square of bytes, cut from the decoded picture."""

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from threetowers.cache.format.views import apply_crop, random_box


def center(image: Image.Image, size: int) -> Tensor:
    """Return the largest central square, resized: (3, size, size) uint8."""
    return _bytes(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def mirrored(image_3hw: Tensor) -> Tensor:
    """Return the mirror image."""
    return image_3hw.flip(-1)


def stored_crop(image: Image.Image, size: int, params_5: npt.NDArray[np.float32]) -> Tensor:
    """Return the part of the picture that a cache saw (`cache.views`), resized: (3, size, size) uint8."""
    return _bytes(apply_crop(image, params_5, (size, size)))


def random_crop(image: Image.Image, size: int, scale: float, rng: np.random.Generator) -> Tensor:
    """Return a random crop of `scale` to 1 of the area and aspect 3/4 to 4/3, resized: (3, size, size) uint8."""
    box = random_box(*image.size, scale, rng)
    return _bytes(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
