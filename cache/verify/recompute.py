"""Do the rows of a cache mean what its contract says? A sample of pictures, embedded again by the live teacher."""

from __future__ import annotations

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
from threetowers.cache.webdataset.tar_index import Sample

SLACK = 0.002  # below the precision tier's own bound: another device, batch size or reduced arithmetic
SHOWN = 3


@dataclass(frozen=True)
class Candidate:
    """One row to compare, and where its picture lies. `lot` was drawn to choose it."""

    lot: float
    entry: TarEntry
    location: str
    sample: Sample
    ordinal: int
    view: int
    row_D: npt.NDArray[np.float32]
    params_5: Params | None
    image_hash: int

    def __str__(self) -> str:
        return (
            f"tar {self.entry.path} ({self.entry.id}): {self.sample.key!r} (ordinal {self.ordinal}), view {self.view}"
        )


@dataclass(frozen=True)
class Meaning:
    """Cosines of stored rows with the live teacher's, and the bound they were held to; the worst rows by name."""

    rows: int
    min: float | None
    mean: float | None
    bound: float
    worst: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        if self.min is None:
            return "no row to compare with the live teacher"
        worst = ", ".join(f"{name}: {cosine:.6f}" for name, cosine in self.worst)
        return (
            f"{self.rows} rows against the live teacher: cosine min {self.min:.6f}, mean {self.mean:.6f}, bound "
            f"{self.bound:g}; worst {worst}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "min": self.min,
            "mean": self.mean,
            "bound": self.bound,
            "worst": [{"row": name, "cosine": cosine} for name, cosine in self.worst],
        }


def compare(
    manifest: Manifest, candidates: Sequence[Candidate], weights: str | None, device: str, min_cosine: float | None
) -> tuple[Meaning, list[tuple[int, str]]]:
    """What the live teacher says of these rows, and the (tar id, problem) of each row that is not as it says.

    Raises:
        ContractError, ValueError: the teacher is not the cache's, or cannot be had (`live_teacher`).
    """
    bound = manifest.precision.min_cosine - SLACK if min_cosine is None else min_cosine
    teacher = live_teacher(manifest, weights, device)
    problems: list[tuple[int, str]] = []
    kept, pixels = [], []
    for candidate in candidates:
        storage, name = split_address(candidate.location)
        offset, size = candidate.sample.members[candidate.sample.image]
        data = storage.read(name, offset, offset + size)
        if xxhash.xxh3_64_intdigest(data) != candidate.image_hash:
            problems.append((candidate.entry.id, f"{candidate}: its image is not the one that was embedded"))
            continue
        try:
            image = decode_rgb(data, min_side=None if manifest.views.cropped else teacher.min_side)
        except BadImage as error:
            problems.append((candidate.entry.id, f"{candidate}: was embedded, and now: {error}"))
            continue
        kept.append(candidate)
        pixels.append(view_pixels(teacher, image, candidate.view, candidate.params_5))
    if not kept:
        return Meaning(0, None, None, bound, ()), problems
    found = cosines(np.stack([candidate.row_D for candidate in kept]), embed(teacher, pixels))
    order = np.argsort(found)
    for i in order[found[order] < bound].tolist():
        problems.append((kept[i].entry.id, f"{kept[i]}: cosine with the live teacher {found[i]:.6f}, bound {bound:g}"))
    worst = tuple((str(kept[i]), float(found[i])) for i in order[:SHOWN].tolist())
    return Meaning(len(kept), float(found.min()), float(found.mean()), bound, worst), problems
