"""How far the teacher moves under a training augmentation: does one cached view do, or does it take several?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from threetowers.cache.encoders.live import embed, view_pixels
from threetowers.cache.encoders.teacher import Teacher
from threetowers.cache.format.dtypes import cosines
from threetowers.cache.format.views import Params, random_box
from threetowers.cache.webdataset.dataset_sample import survey

PERCENTILES = (1, 5, 50)


@dataclass(frozen=True)
class ViewRow:
    """Cosines between the teacher's center view and one augmentation of the same picture, over pictures and draws.

    `own_nearest`: the share of augmented pictures whose nearest center view in the sample is their own.
    """

    name: str
    min: float
    percentiles: tuple[float, ...]
    mean: float
    own_nearest: float


@dataclass(frozen=True)
class ViewComparison:
    """What was measured, on how many pictures; `bad` of the sample could not be decoded."""

    pictures: int
    bad: int
    draws: int
    rows: tuple[ViewRow, ...]

    def text(self) -> str:
        """A table for a person."""
        head = ("min", *(f"{p} %" for p in PERCENTILES), "mean", "own nearest")
        lines = [
            f"the teacher's cosine between the center view and an augmented one: {self.pictures} pictures, "
            f"{self.draws} draws each" + (f", {self.bad} not decodable" if self.bad else ""),
            f"{'':34}" + "".join(f"{name:>13}" for name in head),
        ]
        for row in self.rows:
            values = (row.min, *row.percentiles, row.mean)
            lines.append(f"{row.name:34}" + "".join(f"{v:13.4f}" for v in values) + f"{row.own_nearest:13.1%}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The table for a script."""
        rows = [
            {
                "augmentation": row.name,
                "min": row.min,
                **{f"p{p}": v for p, v in zip(PERCENTILES, row.percentiles, strict=True)},
                "mean": row.mean,
                "own_nearest": row.own_nearest,
            }
            for row in self.rows
        ]
        return {"pictures": self.pictures, "not_decodable": self.bad, "draws": self.draws, "rows": rows}


def measure_views(
    tars: Sequence[str | Path],
    teacher: Teacher,
    *,
    crop_scales: Sequence[float] = (0.9, 0.6, 0.35, 0.1),
    sample: int = 256,
    draws: int = 2,
    seed: int = 0,
) -> ViewComparison:
    """Embed a sample of pictures by the teacher, as they are cached (center) and as a run would augment them.

    Each of `crop_scales` is a run's `data.crop_scale`: the smallest share of the area of a random crop. The last row
    pairs each picture with another: the cosine that means nothing.

    Raises:
        ValueError: fewer than two pictures that can be decoded, a scale beyond 0 to 1, no draws.
    """
    if draws < 1 or not all(0 < scale <= 1 for scale in crop_scales):
        raise ValueError(f"crop scales {tuple(crop_scales)}, draws {draws}: expected 0 < scale <= 1 and a draw")
    pictures, bad = survey(tars, sample, seed).pictures()
    if len(pictures) < 2:
        raise ValueError(f"{len(pictures)} of the sampled pictures can be decoded: expected at least 2")
    images = [image for _, image in pictures]
    center_nD = embed(teacher, [view_pixels(teacher, image, 0, None) for image in images])
    mirrored_nD = embed(teacher, [view_pixels(teacher, image, 1, None) for image in images])
    rng = np.random.default_rng(seed)
    rows = [_row("mirrored", center_nD, mirrored_nD)]
    for scale in crop_scales:
        crops = [view_pixels(teacher, image, 0, _crop(image, scale, rng)) for image in images for _ in range(draws)]
        rows.append(_row(f"random crop, crop_scale {scale:g}", center_nD, embed(teacher, crops)))
    rows.append(_row("another picture", center_nD, np.roll(center_nD, 1, axis=0)))
    return ViewComparison(len(images), bad, draws, tuple(rows))


def _crop(image: Image.Image, scale: float, rng: np.random.Generator) -> Params:
    left, top, right, bottom = random_box(*image.size, scale, rng)
    width, height = image.size
    return np.array([left / width, top / height, right / width, bottom / height, 0], np.float32)


def _row(name: str, center_nD: npt.NDArray[np.float32], other_mD: npt.NDArray[np.float32]) -> ViewRow:
    """Compare (n, D) center views with (n * draws, D) others, the draws of a picture side by side."""
    own_m = np.repeat(np.arange(len(center_nD)), len(other_mD) // len(center_nD))
    cosine_m = cosines(center_nD[own_m], other_mD)
    unit_nD = center_nD / np.linalg.norm(center_nD, axis=1, keepdims=True).clip(1e-30)
    nearest_m = (other_mD @ unit_nD.T).argmax(axis=1)
    percentiles = tuple(float(v) for v in np.percentile(cosine_m, PERCENTILES))
    return ViewRow(name, float(cosine_m.min()), percentiles, float(cosine_m.mean()), float((nearest_m == own_m).mean()))
