"""Where a model's view of an image comes from: its pixels, the rows of a cache, or the live teacher (for LiT runs)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from threetowers.cache.contract import ContractError, difference
from threetowers.eval.embed import EvaluationSet, Picture
from threetowers.trainer.config import CacheTower
from threetowers.trainer.data.join import CacheJoin
from threetowers.trainer.data.samples import image
from threetowers.trainer.data.view import center
from threetowers.trainer.trained import TrainedModel

Source = Callable[[Sequence[Picture]], Tensor]

# What must agree between the cache a model was trained on and the one it is evaluated on. Tars, layout and number
# format may differ: held-out images are other images.
BINDING = ("backbone", "weights_digest", "feature", "view", "preprocessing", "dim")


def image_source(model: TrainedModel, data: EvaluationSet, caches: Mapping[str, Path], live_teacher: bool) -> Source:
    """Return what turns pictures into the deployed image tower's input.

    `caches`: for a LiT run, the cache to read by tower name; by default the one it was trained on, which may hold the
    evaluation tars too. Raises ContractError when that cache is of another teacher or of other tars.
    """
    tower = model.run.towers[model.image_tower]
    if not isinstance(tower, CacheTower):
        size, limit = model.run.data.image_size, model.run.data.max_pixels
        return lambda pictures: torch.stack([center(image(data.tars[p.tar], p.ordinal, limit), size) for p in pictures])
    if live_teacher:
        return _teacher_source(model, data)
    path = caches.get(model.image_tower, Path(tower.path))
    try:
        join = CacheJoin(path, data.tars)
    except ContractError as error:
        raise ContractError(
            f"{error}. A run whose image tower is a cached teacher needs rows for the evaluation images: build a cache "
            f"of them and give it as --cache {model.image_tower}=PATH, or use --live-teacher"
        ) from error
    _check(model, path, join)
    return lambda pictures: torch.from_numpy(np.stack([join.row(p.tar, p.ordinal) for p in pictures]))


def view_of(model: TrainedModel) -> str:
    """Return, in words, the transform between a picture and the deployed image tower."""
    if not model.sees_cached_rows:
        return f"central square, bicubic to {model.run.data.image_size} px"
    p = model.contracts[model.image_tower].preprocessing
    height, width = p.input_size
    return f"teacher's: {p.crop_mode} crop {p.crop_pct}, {p.interpolation} to {height} x {width} px"


def _check(model: TrainedModel, path: Path, join: CacheJoin) -> None:
    trained = model.contracts[model.image_tower]
    lines = [line for line in difference(trained, join.cache.contract) if line.split(".")[0].split(":")[0] in BINDING]
    if lines:
        raise ContractError(f"{path}: not the teacher that {model.run.out} was trained on: {'; '.join(lines)}")


def _teacher_source(model: TrainedModel, data: EvaluationSet) -> Source:
    from threetowers.cache.teacher import load_teacher

    contract = model.contracts[model.image_tower]
    teacher = load_teacher(contract.backbone, contract.weights, contract.preprocessing.input_size[0])
    if teacher.weights_digest != contract.weights_digest:
        raise ContractError(
            f"teacher {contract.backbone} ({contract.weights}): weights_digest: expected {contract.weights_digest} as "
            f"in training, found {teacher.weights_digest}"
        )
    limit = model.run.data.max_pixels

    def source(pictures: Sequence[Picture]) -> Tensor:
        views = [teacher.preprocess(image(data.tars[p.tar], p.ordinal, limit)) for p in pictures]
        return teacher.embed(torch.stack(views))

    return source
