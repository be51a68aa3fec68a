"""Recompute: a random sample of stored rows, compared with what the teacher now says of their images or captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.encoders.encoder import ImageEncoder, TextEncoder
from threetowers.cache.encoders.live import embed, embed_captions, live_teacher, view_pixels
from threetowers.cache.format.dtypes import cosines
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.format.views import Params
from threetowers.cache.webdataset.captions import caption_hash
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.sample import read_annotation, read_encoded_image
from threetowers.cache.webdataset.tar_index import TarIndex

COSINE_TOLERANCE = 0.002  # below the dtype's own bound: another device, batch size or reduced arithmetic
WORST_SHOWN = 3

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SampledRow:
    """A stored row to recompute. The rows with the smallest `priority` are chosen.

    Attributes:
        priority: a random number.
        entry: of the row's tar.
        tar: index of the tar with the row's sample alone.
        ordinal: of the sample.
        row_D: the row.
    """

    priority: float
    entry: TarEntry
    tar: TarIndex
    ordinal: int
    row_D: Float32Array

    def __str__(self) -> str:
        """Return tar, key and ordinal."""
        return f"tar {self.entry.path} ({self.entry.id}): {self.tar.samples.key(0)!r} (ordinal {self.ordinal})"


@dataclass(frozen=True)
class SampledImage(SampledRow):
    """A stored row of an image: its view, how that was cut, and the hash of the image's file."""

    view: int
    params_P: Params | None
    image_hash: int

    def __str__(self) -> str:
        """Return tar, key, ordinal and view."""
        return f"{super().__str__()}, view {self.view}"


@dataclass(frozen=True)
class SampledCaption(SampledRow):
    """A stored row of a caption: its number among those of the sample, and its hash."""

    number: int
    caption_hash: int

    def __str__(self) -> str:
        """Return tar, key, ordinal and number."""
        return f"{super().__str__()}, caption {self.number}"


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
    """Embed the images or captions of some rows again and compare.

    Args:
        manifest: of the cache.
        rows: the rows to recompute.
        weights: path of the teacher's weights, if they came from a file.
        device: of the teacher.
        min_cosine: bound on the cosines; by default a little below that of the dtype.
        max_pixels: largest width x height of an image that is decoded.

    Returns:
        The cosines, and (tar id, problem) of each row whose image or caption changed, or whose cosine is below the
        bound.

    Raises:
        ManifestError, ValueError: the teacher is not that of the cache, or cannot be loaded (`live_teacher`).
    """
    bound = manifest.storage_dtype.min_cosine - COSINE_TOLERANCE if min_cosine is None else min_cosine
    teacher = live_teacher(manifest, weights, device)
    problems: list[tuple[int, str]] = []
    compared: list[SampledRow] = []
    if manifest.of == "image":
        now_nD = _embed_images(teacher.side("image"), manifest, rows, max_pixels, compared, problems)
    else:
        now_nD = _embed_captions(teacher.side("text"), manifest, rows, compared, problems)
    if not compared:
        return Recomputation(0, None, None, bound, ()), problems
    found = cosines(np.stack([row.row_D for row in compared]), now_nD)
    order = np.argsort(found)
    for i in order[found[order] < bound].tolist():
        row = compared[i]
        problems.append((row.entry.id, f"{row}: cosine with the recomputed row {found[i]:.6f}, expected {bound:g}"))
    worst = tuple((str(compared[i]), float(found[i])) for i in order[:WORST_SHOWN].tolist())
    return Recomputation(len(compared), float(found.min()), float(found.mean()), bound, worst), problems


def _embed_images(
    encoder: ImageEncoder,
    manifest: Manifest,
    rows: Sequence[SampledRow],
    max_pixels: int,
    compared: list[SampledRow],
    problems: list[tuple[int, str]],
) -> Float32Array:
    """Return (n, D) embeddings of the images of rows, adding these to `compared`, and the others to `problems`."""
    pixels = []
    min_side = None if manifest.views.cropped else encoder.min_side
    for row in rows:
        assert isinstance(row, SampledImage)
        try:
            data = read_encoded_image(row.tar, 0)
        except BadSample as error:
            problems.append((row.entry.id, f"{row}: has an embedding, but no image: {error}"))
            continue
        if xxhash.xxh3_64_intdigest(data) != row.image_hash:
            problems.append((row.entry.id, f"{row}: its image is not the one that was embedded"))
            continue
        try:
            image = decode_rgb(data, max_pixels=max_pixels, min_side=min_side)
        except BadImage as error:
            problems.append((row.entry.id, f"{row}: has an embedding, but its image cannot be decoded now: {error}"))
            continue
        compared.append(row)
        pixels.append(view_pixels(encoder, image, row.view, row.params_P))
    return embed(encoder, pixels, manifest.feature)


def _embed_captions(
    encoder: TextEncoder,
    manifest: Manifest,
    rows: Sequence[SampledRow],
    compared: list[SampledRow],
    problems: list[tuple[int, str]],
) -> Float32Array:
    """Return the same of captions."""
    captions = []
    caption_format = manifest.caption_sources.caption_format
    for row in rows:
        assert isinstance(row, SampledCaption)
        found = read_annotation(row.tar, 0, captions=caption_format, captions_required=False).captions
        if row.number >= len(found) or caption_hash(found[row.number]) != row.caption_hash:
            problems.append((row.entry.id, f"{row}: its caption is not the one that was embedded"))
            continue
        compared.append(row)
        captions.append(found[row.number])
    return embed_captions(encoder, captions, manifest.feature)
