"""Recompute: a random sample of stored rows, compared with what the teacher computes for their images now."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.encoders.live import embed, live_teacher, view_pixels
from threetowers.cache.format.dtypes import cosines
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.format.views import Params
from threetowers.cache.storage.storage import split_address
from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.sample_list import Sample

COSINE_TOLERANCE = 0.002  # below the dtype's own bound: another device, batch size or reduced arithmetic
WORST_SHOWN = 3


@dataclass(frozen=True)
class SampledRow:
    """A stored row to recompute, and the location of its image. The rows with the smallest `priority` are chosen."""

    priority: float
    entry: TarEntry
    location: str
    sample: Sample
    ordinal: int
    view: int
    row_D: npt.NDArray[np.float32]
    params_P: Params | None
    image_hash: int

    def __str__(self) -> str:
        """Return tar, key, ordinal and view."""
        return (
            f"tar {self.entry.path} ({self.entry.id}): {self.sample.key!r} (ordinal {self.ordinal}), view {self.view}"
        )


@dataclass(frozen=True)
class Recomputation:
    """Cosines of stored rows with recomputed ones, their bound, and the worst rows by name."""

    rows: int
    min: float | None
    mean: float | None
    bound: float
    worst: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        """Return one line for a person."""
        if self.min is None:
            return "no row to recompute"
        worst = ", ".join(f"{name}: {cosine:.6f}" for name, cosine in self.worst)
        return (
            f"{self.rows} rows recomputed: cosine min {self.min:.6f}, mean {self.mean:.6f}, bound {self.bound:g}; "
            f"worst {worst}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for a script."""
        return {
            "rows": self.rows,
            "min": self.min,
            "mean": self.mean,
            "bound": self.bound,
            "worst": [{"row": name, "cosine": cosine} for name, cosine in self.worst],
        }


def recompute(
    manifest: Manifest,
    rows: Sequence[SampledRow],
    weights: str | None,
    device: str,
    min_cosine: float | None,
    max_pixels: int,
) -> tuple[Recomputation, list[tuple[int, str]]]:
    """Embed the images of some rows again and compare.

    Args:
        manifest: of the cache.
        rows: the rows to recompute.
        weights: path of the teacher's weights, if they came from a file.
        device: of the teacher.
        min_cosine: bound on the cosines; by default a little below that of the dtype.
        max_pixels: largest width x height of an image that is decoded.

    Returns:
        The cosines, and (tar id, problem) of each row whose image changed or whose cosine is below the bound.

    Raises:
        ManifestError, ValueError: the teacher is not that of the cache, or cannot be loaded (`live_teacher`).
    """
    bound = manifest.storage_dtype.min_cosine - COSINE_TOLERANCE if min_cosine is None else min_cosine
    encoder = live_teacher(manifest, weights, device).side("image")
    problems: list[tuple[int, str]] = []
    compared = []
    pixels = []
    for row in rows:
        if row.sample.image is None:
            problems.append((row.entry.id, f"{row}: has an embedding, but no image"))
            continue
        storage, name = split_address(row.location)
        offset, size = row.sample.members[row.sample.image]
        data = storage.read(name, offset, offset + size)
        if xxhash.xxh3_64_intdigest(data) != row.image_hash:
            problems.append((row.entry.id, f"{row}: its image is not the one that was embedded"))
            continue
        try:
            min_side = None if manifest.views.cropped else encoder.min_side
            image = decode_rgb(data, max_pixels=max_pixels, min_side=min_side)
        except BadImage as error:
            problems.append((row.entry.id, f"{row}: has an embedding, but its image cannot be decoded now: {error}"))
            continue
        compared.append(row)
        pixels.append(view_pixels(encoder, image, row.view, row.params_P))
    if not compared:
        return Recomputation(0, None, None, bound, ()), problems
    found = cosines(np.stack([row.row_D for row in compared]), embed(encoder, pixels, manifest.feature))
    order = np.argsort(found)
    for i in order[found[order] < bound].tolist():
        row = compared[i]
        problems.append((row.entry.id, f"{row}: cosine with the recomputed row {found[i]:.6f}, expected {bound:g}"))
    worst = tuple((str(compared[i]), float(found[i])) for i in order[:WORST_SHOWN].tolist())
    return Recomputation(len(compared), float(found.min()), float(found.mean()), bound, worst), problems
