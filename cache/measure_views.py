"""How far training augmentations move the teacher's embeddings: is one cached view enough, or are crops needed?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from threetowers.cache.builder.build_config import EncoderConfig
from threetowers.cache.encoders.live import embed, view_pixels
from threetowers.cache.format.dtypes import cosines
from threetowers.cache.format.rand_augment import NO_AUGMENT, RandAugment
from threetowers.cache.format.views import Params, Pixels, random_box
from threetowers.cache.webdataset.tar_list import counts_by_reason

COSINE_PERCENTILES = (1, 5, 50)


@dataclass(frozen=True)
class AugmentationRow:
    """Cosines between the center view and one augmentation of the same image, over images and draws.

    `own_nearest`: the share of augmented images whose nearest center view in the sample is their own.
    """

    name: str
    min: float
    percentiles: tuple[float, ...]
    mean: float
    own_nearest: float


@dataclass(frozen=True)
class ViewComparison:
    """The table, the number of images it is measured on, of bad samples by reason, and lines on tars not used."""

    images: int
    bad: dict[str, int]
    draws: int
    rows: tuple[AugmentationRow, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the table for a person."""
        bad = f"; left out: {counts_by_reason(self.bad)}" if self.bad else ""
        head = ("min", *(f"{p} %" for p in COSINE_PERCENTILES), "mean", "own nearest")
        lines = [
            f"cosine between the center view and an augmented one: {self.images} images, {self.draws} draws each{bad}",
            f"{'':34}" + "".join(f"{name:>13}" for name in head),
        ]
        for row in self.rows:
            values = (row.min, *row.percentiles, row.mean)
            lines.append(f"{row.name:34}" + "".join(f"{v:13.4f}" for v in values) + f"{row.own_nearest:13.1%}")
        return "\n".join([*lines, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """Return the table for a script."""
        rows = []
        for row in self.rows:
            percentiles = {f"p{p}": value for p, value in zip(COSINE_PERCENTILES, row.percentiles, strict=True)}
            rows.append(
                {"augmentation": row.name, "min": row.min}
                | percentiles
                | {"mean": row.mean, "own_nearest": row.own_nearest}
            )
        return {"images": self.images, "bad": self.bad, "draws": self.draws, "rows": rows}


def measure_views(
    config: EncoderConfig,
    *,
    crop_scales: Sequence[float] = (0.9, 0.6, 0.35, 0.1),
    view_augment: str = NO_AUGMENT,
    sample: int = 256,
    draws: int = 2,
    seed: int = 0,
) -> ViewComparison:
    """Embed a sample of images as they are cached (center) and as a run would augment them, and compare.

    The last row of the result pairs each image with another one, as a baseline.

    Args:
        config: images and encoder.
        crop_scales: values of a run's `data.crop_scale`, the smallest share of the area of a random crop.
        view_augment: `randaugment:OPS:MAGNITUDE`, to compare the same crops augmented too.
        sample: images to measure on.
        draws: random crops of each image.
        seed: of the sample and the crops.

    Raises:
        ValueError: fewer than two images that can be decoded, a scale beyond 0 to 1, an unknown augmentation, or no
            draws.
    """
    if draws < 1 or not all(0 < scale <= 1 for scale in crop_scales):
        raise ValueError(
            f"--crop-scales {tuple(crop_scales)}, --draws {draws}: expected 0 < scale <= 1 and at least one draw"
        )
    policy = RandAugment.parse(view_augment)
    drawn = config.sample_images(sample, seed)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = config.load_encoder(device).side("image")
    (source,) = config.sources()

    def embedded(views: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        return embed(encoder, views, source.feature)

    images, bad = drawn.images()
    if len(images) < 2:
        raise ValueError(f"{len(images)} of the sampled images can be decoded: expected at least 2")
    center_nD = embedded([view_pixels(encoder, image, 0, None) for image in images])
    mirrored_nD = embedded([view_pixels(encoder, image, 1, None) for image in images])
    rows = [_row("mirrored", center_nD, mirrored_nD)]

    repeated = [image for image in images for _ in range(draws)]
    box_rng = np.random.default_rng(seed)
    op_rng = np.random.default_rng([seed, 1])  # so that the crops are the same with and without augmentation

    def embedded_crops(params: Sequence[Params]) -> npt.NDArray[np.float32]:
        pairs = zip(repeated, params, strict=True)
        return embedded([view_pixels(encoder, image, 0, params_P) for image, params_P in pairs])

    for scale in crop_scales:
        params = [_random_crop(image, scale, box_rng) for image in repeated]
        rows.append(_row(f"random crop, crop_scale {scale:g}", center_nD, embedded_crops(params)))
        if policy:
            params = [np.append(crop_5, policy.draw(op_rng)) for crop_5 in params]
            rows.append(_row(f"  and {view_augment}", center_nD, embedded_crops(params)))
    rows.append(_row("another image", center_nD, np.roll(center_nD, 1, axis=0)))
    return ViewComparison(len(images), dict(bad), draws, tuple(rows), drawn.notes)


def _random_crop(image: Image.Image, scale: float, rng: np.random.Generator) -> Params:
    width, height = image.size
    left, top, right, bottom = random_box(width, height, scale, rng)
    return np.array([left / width, top / height, right / width, bottom / height, 0], np.float32)


def _row(name: str, center_nD: npt.NDArray[np.float32], other_mD: npt.NDArray[np.float32]) -> AugmentationRow:
    """Compare (n, D) center views with (n * draws, D) others, the draws of an image being adjacent."""
    own_m = np.repeat(np.arange(len(center_nD)), len(other_mD) // len(center_nD))
    cosine_m = cosines(center_nD[own_m], other_mD)
    unit_nD = center_nD / np.linalg.norm(center_nD, axis=1, keepdims=True).clip(1e-30)
    nearest_m = (other_mD @ unit_nD.T).argmax(axis=1)
    return AugmentationRow(
        name=name,
        min=float(cosine_m.min()),
        percentiles=tuple(float(value) for value in np.percentile(cosine_m, COSINE_PERCENTILES)),
        mean=float(cosine_m.mean()),
        own_nearest=float((nearest_m == own_m).mean()),
    )
