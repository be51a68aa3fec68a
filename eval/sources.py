"""Where a model's view of an image comes from: its pixels, the rows of a cache, or the live teacher (for LiT runs)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from threetowers.cache.contract import ContractError, Preprocessing, teacher_difference
from threetowers.eval.embed import EvaluationSet, Picture
from threetowers.eval.encoder import Loading
from threetowers.eval.encoders.forward import PixelView, RowView, TeacherTransform
from threetowers.trainer.config import CacheTower
from threetowers.trainer.data.join import CacheJoin
from threetowers.trainer.data.view import center
from threetowers.trainer.trained import TrainedModel


@dataclass(frozen=True)
class Source:
    """`view` reads one picture, in a worker process; `prepare` makes a tower's input of a batch, beside the model."""

    view: Callable[[Picture], Tensor]
    prepare: Callable[[Tensor], Tensor] = lambda views: views


def image_source(trained: TrainedModel, tower: str, data: EvaluationSet, loading: Loading) -> Source:
    """Return what turns pictures into an image tower's input.

    For a cached tower: rows of `loading.caches[tower]`, by default of the cache the run was trained on, which may hold
    the evaluation tars too; or the live teacher. Raises ContractError when that cache is of another teacher or tars.
    """
    config = trained.run.towers[tower]
    if not isinstance(config, CacheTower):
        size, limit = trained.run.data.image_size, loading.max_pixels
        return Source(PixelView(data.tars, partial(center, size=size), limit))
    if loading.live_teacher:
        return _teacher_source(trained, tower, data, loading)
    path = loading.caches.get(tower, Path(config.path))
    try:
        join = CacheJoin(path, data.tars)
    except ContractError as error:
        raise ContractError(
            f"{error}. A run whose image tower is a cached teacher needs rows for the evaluation images: build a cache "
            f"of them and give it as --cache {tower}=PATH, or use --live-teacher"
        ) from error
    _check(trained, tower, path, join)
    return Source(RowView(join))


def view_of(trained: TrainedModel, tower: str) -> str:
    """Return, in words, the transform between a picture and an image tower."""
    if tower not in trained.contracts:
        return f"central square, bicubic to {trained.run.data.image_size} px"
    return teacher_view(trained.contracts[tower].preprocessing)


def teacher_view(p: Preprocessing) -> str:
    """Return a teacher's transform in words."""
    height, width = p.input_size
    return f"teacher's: {p.crop_mode} crop {p.crop_pct}, {p.interpolation} to {height} x {width} px"


def _check(trained: TrainedModel, tower: str, path: Path, join: CacheJoin) -> None:
    """Tars, layout and number format may differ from those of training: held-out images are other images."""
    contract = join.cache.contract
    if lines := teacher_difference(trained.contracts[tower], contract):
        raise ContractError(f"{path}: not the teacher that {trained.run.out} was trained on: {'; '.join(lines)}")
    if contract.views.cropped:
        raise ContractError(
            f"{path}: views: expected center or center+flip, found {contract.views}: evaluation looks at whole "
            "pictures; build a cache of the held-out tars with views center"
        )


def _teacher_source(trained: TrainedModel, tower: str, data: EvaluationSet, loading: Loading) -> Source:
    from threetowers.cache.live import live_teacher

    config = trained.run.towers[tower]
    weights = config.weights if isinstance(config, CacheTower) else None
    teacher = live_teacher(trained.contracts[tower], weights, str(loading.torch_device()))
    view = PixelView(data.tars, TeacherTransform(teacher.transform), loading.max_pixels)
    return Source(view, teacher.embed)
