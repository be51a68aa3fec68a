"""Forward passes over images and captions; worker processes read and decode images while the model computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from threetowers.cache.processes.loader_workers import loading, worker_beginning
from threetowers.cache.processes.progress import progress_bar
from threetowers.cache.processes.worker_processes import worker_context
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.eval.datasets.image_set import EvalImage
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.trainer.data.joins.image_join import ImageJoin

ImageView = Callable[[EvalImage], Tensor]  # reads one image as a model's input


@dataclass(frozen=True)
class PixelView:
    """The pixels of an image, by a transform. Like every view it can be pickled: worker processes may be spawned."""

    tars: Sequence[TarIndex]
    transform: Callable[[Image.Image], Tensor]
    max_pixels: int

    def __call__(self, image: EvalImage) -> Tensor:
        """Return the transformed image. Raises BadSample where it cannot be decoded."""
        return self.transform(read_image(self.tars[image.tar], image.ordinal, self.max_pixels))


@dataclass(frozen=True)
class RowView:
    """The row of an image in a cache."""

    join: ImageJoin

    def __call__(self, image: EvalImage) -> Tensor:
        """Return the image's row (D,)."""
        return torch.from_numpy(self.join.row(image.tar, image.ordinal))


@dataclass(frozen=True)
class TeacherTransform:
    """A teacher's transform without its model, which stays in the main process."""

    transform: Callable[[Image.Image], npt.NDArray[np.uint8]]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the transformed pixels, uint8."""
        return torch.from_numpy(np.ascontiguousarray(self.transform(image)))


class ViewDataset(Dataset[Tensor | BadSample]):
    """A model's view of each image; one that cannot be read is returned as the error, not as a worker's traceback."""

    def __init__(self, images: Sequence[EvalImage], view: ImageView) -> None:
        self._images = images
        self._view = view

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor | BadSample:
        try:
            return self._view(self._images[index])
        except BadSample as error:
            return error


def forward_images(
    images: Sequence[EvalImage],
    view: ImageView,
    forward: Callable[[Tensor], Tensor],
    batch_size: int,
    workers: int,
) -> Iterator[Embeddings]:
    """Yield the output of a model for each batch of images, as float32 on the CPU.

    Args:
        images: The images, in the order of the output.
        view: Reads one image as the model's input.
        forward: The model: a batch of views to (b, width).
        batch_size: Images per batch.
        workers: Processes that read and decode images; 0: this one.

    Raises:
        BadSample: An image cannot be read.
    """
    workers = min(workers, -(-len(images) // batch_size))
    loader = DataLoader(
        ViewDataset(images, view),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        multiprocessing_context=worker_context() if workers else None,
        worker_init_fn=worker_beginning(),
    )
    with loading(loader) as batches, progress_bar("embed images", len(images), "images") as bar:
        for views in batches:
            if isinstance(views, BadSample):
                raise views
            yield to_float32(forward(views))
            bar.update(len(views))


def forward_captions(
    captions: Sequence[str], forward: Callable[[Sequence[str]], Tensor], batch_size: int
) -> Iterator[Embeddings]:
    """Yield the output of a model for each batch of captions, as float32 on the CPU."""
    with progress_bar("embed captions", len(captions), "captions") as bar:
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            yield to_float32(forward(batch))
            bar.update(len(batch))


def to_float32(x_bD: Tensor) -> Embeddings:
    """Return a tensor as a float32 array on the CPU."""
    array: Embeddings = x_bD.float().cpu().numpy()
    return array


def _collate(views: Sequence[Tensor | BadSample]) -> Tensor | BadSample:
    tensors = []
    for view in views:
        if isinstance(view, BadSample):
            return view
        tensors.append(view)
    return torch.stack(tensors)
