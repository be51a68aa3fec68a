"""The source of an image tower's input: pixels, the rows of a cache, or the live teacher (for LiT runs)."""

from functools import partial

from torch import Tensor

from threetowers.cache.format.manifest import Preprocessing
from threetowers.eval.datasets.image_set import ImageSet
from threetowers.eval.encoders.cached_input import CachedInput
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.forward import ImageView, PixelView, RowView, TeacherTransform
from threetowers.trainer.config import TrainConfig
from threetowers.trainer.data.joins.image_join import ImageJoin
from threetowers.trainer.data.transforms import center_crop


class ImageSource:
    """How images become an image tower's input: `view` reads one in a worker process, `prepare` completes a batch."""

    def __init__(self, config: TrainConfig, options: LoadOptions, cached: CachedInput | None) -> None:
        """Make the source of one tower of a run.

        Args:
            config: Of the run.
            options: How the run is evaluated.
            cached: What a cached tower takes; None for another tower.
        """
        self.cached = cached
        self._max_pixels = options.max_pixels
        self._side = config.data.side if cached is None else 0

    def view(self, data: ImageSet) -> ImageView:
        """Return what reads one image of a set.

        Raises:
            ManifestError: The cache, or the live teacher, is another one than that of the run, or the cache lacks a
                tar of the set.
            ValueError: The live teacher cannot be loaded.
        """
        if self.cached is None:
            return PixelView(data.tars, partial(center_crop, size=self._side), self._max_pixels)
        if not self.cached.reads_rows:
            teacher = self.cached.teacher.side("image")
            return PixelView(data.tars, TeacherTransform(teacher.transform), self._max_pixels)
        self.cached.cache()
        with self.cached.explained():
            return RowView(ImageJoin(self.cached.path, data.tars))

    def prepare(self, views: Tensor) -> Tensor:
        """Return the tower's input of a batch of views."""
        if self.cached is None or self.cached.reads_rows:
            return views
        return self.cached.teacher.side("image").embed(views, self.cached.manifest.feature)

    def __str__(self) -> str:
        """Return what is between an image and the tower."""
        if self.cached is None:
            return f"central square, bicubic to {self._side} px"
        return f"{self.cached}: {describe_preprocessing(self.cached.manifest.image_preprocessing)}"


def describe_preprocessing(p: Preprocessing) -> str:
    """Return a frozen encoder's transform in words."""
    height, width = p.input_size
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (p.mean, p.std))
    return f"{p.crop_mode} crop {p.crop_pct:g}, {p.interpolation} to {height} x {width} px, mean {mean}, std {std}"
