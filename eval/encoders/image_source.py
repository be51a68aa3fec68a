"""The source of an image tower's input: pixels, the rows of a cache, or the live teacher (for LiT runs)."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from threetowers.cache.format.manifest import Manifest, ManifestError, Preprocessing, teacher_mismatch
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.eval.datasets.image_set import ImageSet
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.forward import ImageView, PixelView, RowView, TeacherTransform
from threetowers.trainer.config import CacheTower
from threetowers.trainer.data.joins.image_join import ImageJoin
from threetowers.trainer.data.transforms import center_crop
from threetowers.trainer.export.trained_model import TrainedModel


@dataclass(frozen=True)
class ImageSource:
    """How images become an image tower's input.

    Attributes:
        view: Reads one image, in a worker process.
        prepare: Makes the tower's input of a batch of views, in the model's process.
    """

    view: ImageView
    prepare: Callable[[Tensor], Tensor] = lambda views: views


def image_source(trained: TrainedModel, tower: str, data: ImageSet, options: LoadOptions) -> ImageSource:
    """Return the source of an image tower's input.

    For a cached tower these are rows of `options.caches[tower]`, by default of the cache that the run was trained on,
    which may hold the evaluation tars too; or what the live teacher computes.

    Raises:
        ManifestError: The cache is of another teacher or of other tars.
    """
    config = trained.config.towers[tower]
    if not isinstance(config, CacheTower):
        transform = partial(center_crop, size=trained.config.data.side)
        return ImageSource(PixelView(data.tars, transform, options.max_pixels))
    if options.live_teacher:
        return _teacher_source(trained, tower, data, options)
    path = _cache_path(config, tower, options)
    try:
        join = ImageJoin(path, data.tars)
    except ManifestError as error:
        raise ManifestError(
            f"{error}. A run whose image tower is a cached teacher needs rows for the evaluation images: build a cache "
            f"of them and give it as --cache {tower}=PATH, or use --live-teacher"
        ) from error
    _check(trained, tower, path, join)
    return ImageSource(RowView(join))


def evaluated_manifest(trained: TrainedModel, tower: str, options: LoadOptions) -> Manifest | None:
    """Return the manifest of the cache whose rows a tower is given in evaluation; None for a tower without one.

    It may be another cache than that of training, with other views, another dtype or precision. It is that of training
    for the live teacher, and where there is no cache: then `image_source` raises the error, once images are read.
    """
    config = trained.config.towers[tower]
    if not isinstance(config, CacheTower):
        return None
    if not options.live_teacher:
        with contextlib.suppress(ManifestError):
            return EmbeddingCache.open(_cache_path(config, tower, options)).manifest
    return trained.manifests[tower]


def _cache_path(config: CacheTower, tower: str, options: LoadOptions) -> str | Path:
    return options.caches.get(tower, config.path)


def describe_view(trained: TrainedModel, tower: str) -> str:
    """Return, in words, the transform between an image and an image tower."""
    if tower not in trained.manifests:
        return f"central square, bicubic to {trained.config.data.side} px"
    return describe_preprocessing(trained.manifests[tower].image_preprocessing)


def describe_preprocessing(p: Preprocessing) -> str:
    """Return a frozen encoder's transform in words."""
    height, width = p.input_size
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (p.mean, p.std))
    return f"{p.crop_mode} crop {p.crop_pct:g}, {p.interpolation} to {height} x {width} px, mean {mean}, std {std}"


def _check(trained: TrainedModel, tower: str, path: str | Path, join: ImageJoin) -> None:
    """Raise ManifestError for a cache of another teacher; its tars and dtype may differ from those of training."""
    manifest = join.cache.manifest
    if lines := teacher_mismatch(trained.manifests[tower], manifest):
        out = trained.config.output_dir
        raise ManifestError(f"{path}: not the teacher that {out} was trained on: {'; '.join(lines)}")
    if manifest.views.cropped:
        raise ManifestError(
            f"{path}: views: expected center or center+flip, found {manifest.views}: evaluation takes uncropped "
            "images; build a cache of the held-out tars with views center"
        )


def _teacher_source(trained: TrainedModel, tower: str, data: ImageSet, options: LoadOptions) -> ImageSource:
    from threetowers.cache.encoders.live import live_teacher

    config = trained.config.towers[tower]
    weights = config.weights if isinstance(config, CacheTower) else None
    manifest = trained.manifests[tower]
    encoder = live_teacher(manifest, weights, str(options.torch_device())).side("image")
    view = PixelView(data.tars, TeacherTransform(encoder.transform), options.max_pixels)
    return ImageSource(view, partial(encoder.embed, feature=manifest.feature))
