"""The live teacher of a cache: the model that its manifest names, to embed images again or for the first time."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from threetowers.cache.encoders.teacher import Teacher, load_teacher
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.format.views import Params, Pixels, apply_crop, as_pixels

BATCH_SIZE = 32


def live_teacher(manifest: Manifest, weights: str | None = None, device: str = "cpu") -> Teacher:
    """Load the teacher of a cache.

    Args:
        manifest: of the cache.
        weights: where the weights are now (`load_teacher`); by default where the manifest has them from.
        device: where the model runs.

    Raises:
        ManifestError: the loaded model is not the one of the manifest.
        ValueError: the weights cannot be loaded; of a file the manifest has only the name, so its path must be given.
    """
    own = manifest.weights.startswith("pretrained") or manifest.weights == manifest.backbone  # a folder that timm saved
    source = weights or ("pretrained" if own else manifest.weights)
    if source.startswith("file:"):
        raise ValueError(f"the teacher's weights came from {source.removeprefix('file:')!r}: give its path (weights)")
    image_size = manifest.preprocessing.input_size[0]
    decode = manifest.preprocessing.decode
    teacher = load_teacher(manifest.backbone, source, image_size, device, manifest.precision, decode)
    fields = [
        ("weights_digest", manifest.weights_digest, teacher.weights_digest),
        ("dim", manifest.dim, teacher.dim),
    ]
    found_preprocessing = asdict(teacher.preprocessing)
    for name, expected in asdict(manifest.preprocessing).items():
        fields.append((f"preprocessing.{name}", expected, found_preprocessing[name]))
    lines = [f"{field}: expected {expected}, found {found}" for field, expected, found in fields if expected != found]
    if lines:
        raise ManifestError(f"this teacher ({source}) is not the one of the cache: {'; '.join(lines)}")
    return teacher


def view_pixels(teacher: Teacher, image: Image.Image, view: int, params_5: Params | None) -> Pixels:
    """Return (3, H, W) pixels of one view of an upright image: the crop if there are params, else center or mirror."""
    if params_5 is not None:
        preprocessing = teacher.preprocessing
        return as_pixels(apply_crop(image, params_5, preprocessing.input_size, preprocessing.interpolation))
    pixels = np.asarray(teacher.transform(image))
    return pixels[..., ::-1] if view else pixels


def embed(teacher: Teacher, pixels: Sequence[Pixels], batch_size: int = BATCH_SIZE) -> npt.NDArray[np.float32]:
    """Return the (n, D) embeddings of n views, (3, H, W) pixels each."""
    if not pixels:
        return np.zeros((0, teacher.dim), np.float32)
    batches = (np.stack(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size))
    return np.concatenate([teacher.embed(torch.from_numpy(batch)).numpy() for batch in batches])
