"""Views: the declared image transforms of a cache, each with its own array of embeddings.

`center` is the teacher's own evaluation transform. `center+flip` adds its mirror image. `crops:K` are K random resized
crops, which may be augmented; their boxes, and the operations of the augmentation with their values, are stored beside
the rows, so that a trainer shows the same part of the image, changed in the same way, and draws nothing itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import ConfigDict

from threetowers.cache.format.image_ops import N_OP_PARAMS, apply_ops, op_problem, operations
from threetowers.cache.format.rand_augment import NO_AUGMENT, RandAugment

MAX_CROPS = 100
ASPECTS = (3 / 4, 4 / 3)
N_CROP_PARAMS = 5  # left, top, right, bottom as fractions of the upright image, and flip: 0 or 1
# How operations that depend on the whole image see it, whatever the size that a view is wanted at: as most teachers do
MEASURED_SIZE = (224, 224)
MEASURED_INTERPOLATION = "bicubic"

Pixels = npt.NDArray[np.uint8]
Params = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Views:
    """The views of each image that a cache holds.

    Attributes:
        policy: `center`, `center+flip` or `crops:K`.
        seed: of the random crops; 0 for other policies.
        scale: smallest share of the image's area in a crop; 1 for other policies.
        augment: what is done to the crops, `none` or `randaugment:OPS:MAGNITUDE`; `none` for other policies.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    policy: str = "center"
    seed: int = 0
    scale: float = 1.0
    augment: str = NO_AUGMENT

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown policy, or for a seed, scale or augmentation that it does not have."""
        if self.policy in ("center", "center+flip"):
            if (self.seed, self.scale, self.augment) != (0, 1.0, NO_AUGMENT):
                raise ValueError(f"views {self.policy!r} have no seed, scale or augment: only crops:K do")
            return
        kind, _, count = self.policy.partition(":")
        if kind != "crops" or not (count.isascii() and count.isdigit()) or not 1 <= int(count) <= MAX_CROPS:
            raise ValueError(
                f"views {self.policy!r}: expected center, center+flip, or crops:K with K from 1 to {MAX_CROPS}"
            )
        if not 0 < self.scale <= 1 or self.seed < 0:
            raise ValueError(f"views: scale {self.scale}, seed {self.seed}: expected 0 < scale <= 1 and seed >= 0")
        RandAugment.parse(self.augment)

    def __str__(self) -> str:
        """Return the policy as on the command line, with seed, scale and augmentation of crops."""
        if not self.cropped:
            return self.policy
        augmented = "" if self.augment == NO_AUGMENT else f", augment {self.augment}"
        return f"{self.policy}, seed {self.seed}, scale {self.scale}{augmented}"

    @property
    def cropped(self) -> bool:
        """Whether the views are crops, and the cache has an array of parameters for each."""
        return self.policy.startswith("crops:")

    @property
    def count(self) -> int:
        """Number of views V, each with its own array."""
        return int(self.policy.partition(":")[2]) if self.cropped else 1 + (self.policy == "center+flip")

    @property
    def n_params(self) -> int:
        """Number P of parameters of a view: box and flip, and id and value of each operation."""
        policy = RandAugment.parse(self.augment)
        return N_CROP_PARAMS + (N_OP_PARAMS * policy.num_ops if policy else 0)

    def params(self, key_hash: int, width: int, height: int) -> Params:
        """Return the (V, P) parameters of the crops of one image, a function of seed, key, view and image size.

        With or without augmentation the boxes are the same.
        """
        policy = RandAugment.parse(self.augment)
        params_VP = np.empty((self.count, self.n_params), np.float32)
        for k in range(self.count):
            rng = np.random.default_rng([self.seed, key_hash, k])
            left, top, right, bottom = random_box(width, height, self.scale, rng)
            flip = rng.random() < 0.5
            params_VP[k, :N_CROP_PARAMS] = left / width, top / height, right / width, bottom / height, flip
            if policy:
                params_VP[k, N_CROP_PARAMS:] = policy.draw(rng)
        return params_VP

    def pixels(
        self,
        image: Image.Image,
        key_hash: int,
        center: Callable[[Image.Image], Pixels],
        size: tuple[int, int],
        interpolation: str,
    ) -> tuple[Pixels, Params]:
        """Return all views of one upright image: (V, 3, H, W) uint8 pixels and their (V, P) parameters.

        The parameters of `center` and `center+flip` are zeros, because these views are not cut by a box.

        Args:
            image: the upright image.
            key_hash: hash of the sample's key, which seeds the crops.
            center: the teacher's evaluation transform.
            size: the teacher's input (height, width) in pixels.
            interpolation: the teacher's, in PIL's terms.
        """
        if self.cropped:
            params = self.params(key_hash, *image.size)
            views = [as_pixels(render_view(image, row, size, interpolation)) for row in params]
            return np.stack(views), params
        first = np.asarray(center(image))
        views = [first, first[..., ::-1]][: self.count]
        return np.stack(views), np.zeros((self.count, self.n_params), np.float32)


CENTER = Views()


def params_problem(params_NP: Params) -> str | None:
    """Return what is wrong with the first bad parameters of N crops, (N, P); None if all can be shown."""
    box_N4 = params_NP[:, :4]
    inside = (box_N4 >= 0).all() and (box_N4 <= 1).all() and (box_N4[:, :2] < box_N4[:, 2:]).all()
    if not inside or not np.isin(params_NP[:, 4], (0, 1)).all():
        return "a crop that is not inside its image"
    return op_problem(params_NP[:, N_CROP_PARAMS:])


def random_box(width: int, height: int, scale: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw left, top, right, bottom, in pixels, of a random resized crop: `scale` to 1 of the area, aspect 3/4 to 4/3.

    Where the image is too narrow for that area at that aspect, the box is as wide or high as the image.
    """
    area = width * height * rng.uniform(scale, 1)
    aspect = np.exp(rng.uniform(*np.log(ASPECTS)))
    box_width = min(width, math.sqrt(area * aspect))
    box_height = min(height, area / box_width)
    box_width = min(width, area / box_height)
    left = rng.uniform(0, width - box_width)
    top = rng.uniform(0, height - box_height)
    return left, top, min(width, left + box_width), min(height, top + box_height)


def render_view(image: Image.Image, params_P: Params, size: tuple[int, int], interpolation: str) -> Image.Image:
    """Show a view as its stored parameters say, at `size` (height, width).

    Whatever is random was drawn before: equal arguments give equal bytes, for teacher and student.

    Raises:
        ValueError: a parameter is missing, or an operation is unknown, or has a value that it cannot have.
    """
    if len(params_P) < N_CROP_PARAMS:
        raise ValueError(
            f"{len(params_P)} parameters of a view, expected {N_CROP_PARAMS} of its crop, and {N_OP_PARAMS} of each "
            "operation"
        )
    crop_5 = params_P[:N_CROP_PARAMS]
    ops = operations(params_P[N_CROP_PARAMS:])
    view = measured = apply_crop(image, crop_5, size, interpolation)
    if any(op.measures for op, _ in ops) and (size, interpolation) != (MEASURED_SIZE, MEASURED_INTERPOLATION):
        measured = apply_crop(image, crop_5, MEASURED_SIZE, MEASURED_INTERPOLATION)
    return apply_ops(view, measured, ops)


def apply_crop(image: Image.Image, crop_5: Params, size: tuple[int, int], interpolation: str) -> Image.Image:
    """Cut a stored crop out of the upright image and resize it to `size` (height, width), in one resampling."""
    left, top, right, bottom, flip = crop_5.tolist()
    width, height = image.size
    box = (left * width, top * height, right * width, bottom * height)
    view = image.resize((size[1], size[0]), Image.Resampling[interpolation.upper()], box=box)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view


def as_pixels(image: Image.Image) -> Pixels:
    """Return an RGB image as (3, H, W) uint8."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
