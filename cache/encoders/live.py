"""The live teacher of a cache: the encoder that its manifest names, to embed samples again or for the first time."""

from collections.abc import Mapping, Sequence
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
    return _load([manifest], weights, device)


class LiveTeachers:
    """The teachers of some caches, each loaded when it is first asked for.

    Caches of one encoder have one teacher: it takes images as one of them says, and captions as the other.
    """

    def __init__(self, manifests: Mapping[str, Manifest], weights: Mapping[str, str | None], device: str) -> None:
        """Load nothing yet.

        Args:
            manifests: of the caches, by any name.
            weights: by the same name, see `live_teacher`. Where caches share a teacher, those of one of them will do.
            device: where the models run.
        """
        self._manifests = manifests
        self._weights = weights
        self._device = device
        self._loaded: dict[str, FrozenEncoder] = {}
        self._groups: list[list[str]] = []
        for name, manifest in manifests.items():
            fitting = (g for g in self._groups if all(_have_one_teacher(manifests[each], manifest) for each in g))
            group = next(fitting, None)
            if group is None:
                self._groups.append([name])
            else:
                group.append(name)

    def teacher(self, name: str) -> FrozenEncoder:
        """Return the teacher of a cache. Raises what `live_teacher` raises."""
        if name not in self._loaded:
            group = next(group for group in self._groups if name in group)
            weights = next((self._weights[each] for each in group if self._weights.get(each)), None)
            loaded = _load([self._manifests[each] for each in group], weights, self._device)
            self._loaded |= dict.fromkeys(group, loaded)
        return self._loaded[name]


def _have_one_teacher(one: Manifest, other: Manifest) -> bool:
    """Return whether an encoder that is loaded once is the teacher of two caches."""
    fields = ("encoder", "weights_digest", "precision")
    if any(getattr(one, field) != getattr(other, field) for field in fields):
        return False
    return one.of != other.of or (one.preprocessing, one.text) == (other.preprocessing, other.text)


def _load(manifests: Sequence[Manifest], weights: str | None, device: str) -> FrozenEncoder:
    """Load the teacher of caches that have one. Raises what `live_teacher` raises."""
    first = manifests[0]
    kind, _, name = first.encoder.partition(":")
    own = first.weights.startswith("pretrained") or first.weights == name  # a folder that holds them
    source = weights or (None if own else first.weights)
    if source is not None and source.startswith("file:"):
        raise ValueError(f"the teacher's weights came from {source.removeprefix('file:')!r}: give its path (weights)")
    preprocessing = next((manifest.preprocessing for manifest in manifests if manifest.preprocessing), None)
    text = next((manifest.text for manifest in manifests if manifest.text), None)
    height, width = preprocessing.input_size if preprocessing else (0, 1)
    size = height if height == width else None  # a name has the side of a square
    options = EncoderOptions(
        device=device,
        precision=first.precision,
        decode=preprocessing.decode if preprocessing else "pillow",
        prompt=text.prompt if text else None,
        max_length=text.max_length if text else None,
    )
    teacher = load_frozen_encoder(EncoderName(kind, name, size, source), options)
    for manifest in manifests:
        if lines := _differences(manifest, teacher):
            raise ManifestError(
                f"this teacher ({source or manifest.encoder}) is not the one of the cache: {'; '.join(lines)}"
            )
    return teacher


def _differences(manifest: Manifest, teacher: FrozenEncoder) -> list[str]:
    """Return in what an encoder differs from the teacher of a cache."""
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
    return [f"{field}: expected {expected}, found {found}" for field, expected, found in fields if expected != found]


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
