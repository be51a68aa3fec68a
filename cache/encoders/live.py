"""The live teacher of a cache: the very model that its contract names, and what it says of pictures today."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from threetowers.cache.encoders.teacher import Teacher, load_teacher
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.format.views import Params, Pixels, as_pixels, replay

BATCH = 32


def live_teacher(manifest: Manifest, weights: str | None = None, device: str = "cpu") -> Teacher:
    """Load the teacher that a contract promises.

    Args:
        weights: where they lie now (`load_teacher`); by default where the contract says they came from.

    Raises:
        ContractError: the model that is found is not the one that was promised.
        ValueError: the weights cannot be had; a contract knows a file by its name only, so that it must be given.
    """
    source = weights or ("pretrained" if manifest.weights.startswith("pretrained") else manifest.weights)
    if source.startswith("file:"):
        raise ValueError(f"the teacher's weights came from {source.removeprefix('file:')!r}: say where it is (weights)")
    size, decode = manifest.preprocessing.input_size[0], manifest.preprocessing.decode
    teacher = load_teacher(manifest.backbone, source, size, device, manifest.compute, decode)
    lines = [
        f"{field}: expected {expected}, found {found}"
        for field, expected, found in (
            ("weights_digest", manifest.weights_digest, teacher.weights_digest),
            ("dim", manifest.dim, teacher.dim),
            *(
                (f"preprocessing.{name}", expected, asdict(teacher.preprocessing)[name])
                for name, expected in asdict(manifest.preprocessing).items()
            ),
        )
        if expected != found
    ]
    if lines:
        raise ManifestError(f"the teacher at hand ({source}) is not the one of the cache: {'; '.join(lines)}")
    return teacher


def view_pixels(teacher: Teacher, image: Image.Image, view: int, params_5: Params | None) -> Pixels:
    """(3, H, W) one view of an upright picture: cut as stored where there are params; else center, or its mirror."""
    if params_5 is not None:
        how = teacher.preprocessing
        return as_pixels(replay(image, params_5, how.input_size, how.interpolation))
    pixels = np.asarray(teacher.transform(image))
    return pixels[..., ::-1] if view else pixels


def embed(teacher: Teacher, pixels: Sequence[Pixels], batch_size: int = BATCH) -> npt.NDArray[np.float32]:
    """(n, D) what the teacher says of these (3, H, W) pixels."""
    if not pixels:
        return np.zeros((0, teacher.dim), np.float32)
    batches = (np.stack(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size))
    return np.concatenate([teacher.embed(torch.from_numpy(batch)).numpy() for batch in batches])
