"""The live teacher of a cache: the encoder that its manifest names, to embed samples again or for the first time."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder, TextEncoder
from threetowers.cache.encoders.names import EncoderName, EncoderOptions, load_frozen_encoder
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.format.views import Params, Pixels, as_pixels, render_view

BATCH_SIZE = 32


def live_teacher(manifest: Manifest, weights: str | None = None, device: str = "cpu") -> FrozenEncoder:
    """Load the teacher of a cache.

    Args:
        manifest: of the cache.
        weights: where the weights are now (`load_frozen_encoder`); by default where the manifest has them from.
        device: where the model runs.

    Raises:
        ManifestError: the loaded encoder is not the one of the manifest.
        ValueError: the weights cannot be loaded; of a file the manifest has only the name, so its path must be given.
    """
    kind, _, name = manifest.encoder.partition(":")
    own = manifest.weights.startswith("pretrained") or manifest.weights == name  # a folder that holds them
    source = weights or (None if own else manifest.weights)
    if source is not None and source.startswith("file:"):
        raise ValueError(f"the teacher's weights came from {source.removeprefix('file:')!r}: give its path (weights)")
    height, width = manifest.preprocessing.input_size if manifest.preprocessing else (0, 1)
    size = height if height == width else None  # a name has the side of a square
    options = EncoderOptions(
        device=device,
        precision=manifest.precision,
        decode=manifest.preprocessing.decode if manifest.preprocessing else "pillow",
        prompt=manifest.text.prompt if manifest.text else None,
        max_length=manifest.text.max_length if manifest.text else None,
    )
    teacher = load_frozen_encoder(EncoderName(kind, name, size, source), options)
    side = teacher.side(manifest.of)
    fields = [
        ("weights_digest", manifest.weights_digest, teacher.weights_digest),
        ("dim", manifest.dim, side.width(manifest.feature)),
    ]
    expected_input = manifest.preprocessing or manifest.text
    found_input = side.preprocessing if isinstance(side, ImageEncoder) else side.processing
    part = "preprocessing" if isinstance(side, ImageEncoder) else "text"
    found_values = asdict(found_input)
    for field, expected in asdict(expected_input).items():  # type: ignore[arg-type]
        fields.append((f"{part}.{field}", expected, found_values[field]))
    lines = [f"{field}: expected {expected}, found {found}" for field, expected, found in fields if expected != found]
    if lines:
        raise ManifestError(
            f"this teacher ({source or manifest.encoder}) is not the one of the cache: {'; '.join(lines)}"
        )
    return teacher


def view_pixels(encoder: ImageEncoder, image: Image.Image, view: int, params_P: Params | None) -> Pixels:
    """Return (3, H, W) pixels of one view of an upright image: a crop if there are params, else center or mirror."""
    if params_P is not None:
        preprocessing = encoder.preprocessing
        return as_pixels(render_view(image, params_P, preprocessing.input_size, preprocessing.interpolation))
    pixels = np.asarray(encoder.transform(image))
    return pixels[..., ::-1] if view else pixels


def embed(
    encoder: ImageEncoder, pixels: Sequence[Pixels], feature: str | None = None, batch_size: int = BATCH_SIZE
) -> npt.NDArray[np.float32]:
    """Return one feature (n, D) of n views, (3, H, W) pixels each."""
    if not pixels:
        return np.zeros((0, encoder.width(feature)), np.float32)
    batches = (np.stack(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size))
    return np.concatenate([encoder.embed(torch.from_numpy(batch), feature).numpy() for batch in batches])


def embed_captions(
    encoder: TextEncoder, captions: Sequence[str], feature: str | None = None, batch_size: int = BATCH_SIZE
) -> npt.NDArray[np.float32]:
    """Return one feature (n, D) of n captions."""
    if not captions:
        return np.zeros((0, encoder.width(feature)), np.float32)
    batches = (captions[i : i + batch_size] for i in range(0, len(captions), batch_size))
    return np.concatenate([encoder.embed(batch, feature).numpy() for batch in batches])
