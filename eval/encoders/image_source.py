"""Where a model's view of an image comes from: its pixels, the rows of a cache, or the live teacher (for LiT runs)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from threetowers.cache.format.manifest import ManifestError, Preprocessing, teacher_mismatch
from threetowers.eval.datasets.evaluation_set import EvaluationSet, Picture
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.forward import PixelView, RowView, TeacherTransform
from threetowers.trainer.config import CacheTower
from threetowers.trainer.data.cache_join import CacheJoin
from threetowers.trainer.data.transforms import center_crop
from threetowers.trainer.export.trained_model import TrainedModel


@dataclass(frozen=True)
class Source:
    """`view` reads one picture, in a worker process; `prepare` makes a tower's input of a batch, beside the model."""

    view: Callable[[Picture], Tensor]
    prepare: Callable[[Tensor], Tensor] = lambda views: views


def image_source(trained: TrainedModel, tower: str, data: EvaluationSet, loading: LoadOptions) -> Source:
    """Return what turns pictures into an image tower's input.

    For a cached tower: rows of `loading.caches[tower]`, by default of the cache the run was trained on, which may hold
    the evaluation tars too; or the live teacher. Raises ContractError when that cache is of another teacher or tars.
    """
    config = trained.config.towers[tower]
    if not isinstance(config, CacheTower):
        size, limit = trained.config.data.image_size, loading.max_pixels
        return Source(PixelView(data.tars, partial(center_crop, size=size), limit))
    if loading.live_teacher:
        return _teacher_source(trained, tower, data, loading)
    path = loading.caches.get(tower, Path(config.path))
    try:
        join = CacheJoin(path, data.tars)
    except ManifestError as error:
        raise ManifestError(
            f"{error}. A run whose image tower is a cached teacher needs rows for the evaluation images: build a cache "
            f"of them and give it as --cache {tower}=PATH, or use --live-teacher"
        ) from error
    _check(trained, tower, path, join)
    return Source(RowView(join))


def view_of(trained: TrainedModel, tower: str) -> str:
    """Return, in words, the transform between a picture and an image tower."""
    if tower not in trained.manifests:
        return f"central square, bicubic to {trained.config.data.image_size} px"
    return teacher_view(trained.manifests[tower].preprocessing)


def teacher_view(p: Preprocessing) -> str:
    """Return a teacher's transform in words."""
    height, width = p.input_size
    return f"teacher's: {p.crop_mode} crop {p.crop_pct}, {p.interpolation} to {height} x {width} px"


def _check(trained: TrainedModel, tower: str, path: Path, join: CacheJoin) -> None:
    """Tars, layout and number format may differ from those of training: held-out images are other images."""
    manifest = join.cache.manifest
    if lines := teacher_mismatch(trained.manifests[tower], manifest):
        out = trained.config.output_dir
        raise ManifestError(f"{path}: not the teacher that {out} was trained on: {'; '.join(lines)}")
    if manifest.views.cropped:
        raise ManifestError(
            f"{path}: views: expected center or center+flip, found {manifest.views}: evaluation looks at whole "
            "pictures; build a cache of the held-out tars with views center"
        )


def _teacher_source(trained: TrainedModel, tower: str, data: EvaluationSet, loading: LoadOptions) -> Source:
    from threetowers.cache.encoders.live import live_teacher

    config = trained.config.towers[tower]
    weights = config.weights if isinstance(config, CacheTower) else None
    teacher = live_teacher(trained.manifests[tower], weights, str(loading.torch_device()))
    view = PixelView(data.tars, TeacherTransform(teacher.transform), loading.max_pixels)
    return Source(view, teacher.embed)
