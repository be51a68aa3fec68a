"""Pictures through a model: read and decoded in worker processes while the model computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from threetowers.cache.webdataset.sample import BadSample, read_image
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.eval.datasets.evaluation_set import Floats, Picture
from threetowers.trainer.data.cache_join import CacheJoin

View = Callable[[Picture], Tensor]


@dataclass(frozen=True)
class PixelView:
    """The picture itself, by a transform. Like every view it can be pickled: worker processes may be spawned."""

    tars: Sequence[TarIndex]
    transform: Callable[[Image.Image], Tensor]
    max_pixels: int

    def __call__(self, picture: Picture) -> Tensor:
        return self.transform(read_image(self.tars[picture.tar], picture.ordinal, self.max_pixels))


@dataclass(frozen=True)
class RowView:
    """The picture's row of a cache."""

    join: CacheJoin

    def __call__(self, picture: Picture) -> Tensor:
        return torch.from_numpy(self.join.row(picture.tar, picture.ordinal))


@dataclass(frozen=True)
class TeacherTransform:
    """A teacher's transform alone: the model stays where it computes."""

    transform: Callable[[Image.Image], npt.NDArray[np.uint8]]

    def __call__(self, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.transform(picture)))


class Views(Dataset[Tensor | BadSample]):
    """The model's view of each picture; what cannot be read comes back as the reason, not as a worker's traceback."""

    def __init__(self, pictures: Sequence[Picture], view: View) -> None:
        self._pictures, self._view = pictures, view

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Tensor | BadSample:
        try:
            return self._view(self._pictures[index])
        except BadSample as error:
            return error


def forward_pictures(
    pictures: Sequence[Picture], view: View, forward: Callable[[Tensor], Tensor], batch_size: int, workers: int
) -> Iterator[Floats]:
    """Yield `forward` of each batch of views, on the CPU as float32. Raises BadSample for a picture without a view."""
    loader = DataLoader(
        Views(pictures, view),
        batch_size=batch_size,
        num_workers=min(workers, -(-len(pictures) // batch_size)),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    with tqdm(total=len(pictures), unit="images", leave=False, disable=None) as bar:
        for views in loader:
            if isinstance(views, BadSample):
                raise views
            yield host(forward(views))
            bar.update(len(views))


def forward_captions(
    captions: Sequence[str], forward: Callable[[Sequence[str]], Tensor], batch_size: int
) -> Iterator[Floats]:
    """Yield `forward` of each batch of captions, on the CPU as float32."""
    with tqdm(total=len(captions), unit="captions", leave=False, disable=None) as bar:
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            yield host(forward(batch))
            bar.update(len(batch))


def host(x_bD: Tensor) -> Floats:
    """A result as a float32 array."""
    array: Floats = x_bD.float().cpu().numpy()
    return array


def _collate(views: Sequence[Tensor | BadSample]) -> Tensor | BadSample:
    bad = [view for view in views if isinstance(view, BadSample)]
    return bad[0] if bad else torch.stack([view for view in views if isinstance(view, Tensor)])
