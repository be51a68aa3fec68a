"""One sample made ready for a batch: its picture, a caption, cached rows, what it shows."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xxhash
from torch import Tensor

from threetowers.cache.webdataset.sample import BadSample, ReadMember, read_annotation, read_image
from threetowers.cache.webdataset.tar_index import read_member
from threetowers.trainer.config import Augment, TrainConfig
from threetowers.trainer.data.augmentation import augmented
from threetowers.trainer.data.cache_join import NoRow, Row
from threetowers.trainer.data.crops import random_crop
from threetowers.trainer.data.sample_set import SampleSet, concept


class Item(NamedTuple):
    image: Tensor | None  # None in a run without an image tower (LiT): the picture is then never decoded
    caption: str
    rows: dict[str, Row | None]  # by cached tower; None where the sample has no row
    concept: int


class Items:
    """Makes items by (epoch, index). What is random in one depends on (seed, epoch, index) alone."""

    def __init__(self, run: TrainConfig, samples: SampleSet) -> None:
        self._run = run
        self._samples = samples
        self._sees_images = bool(run.towers_of("timm"))
        self._augments = run.data.augment != Augment()

    def read(self, epoch: int, index: int) -> Item | BadSample:
        """Return a sample, read from its place in its tar; or why it cannot be used."""
        number, ordinal = self._samples.address(index)
        view = self._samples.view(epoch)
        member = functools.partial(read_member, self._samples.tars[number], ordinal)
        return self.make(
            epoch, index, member, lambda name: self._samples.caches[name].stored_row(number, ordinal, view)
        )

    def make(self, epoch: int, index: int, read: ReadMember, stored: Callable[[str], Row | None]) -> Item | BadSample:
        """Return a sample whose members and stored rows (by tower) are had so; or why it cannot be used.

        The reason is returned: raised in a worker, it would arrive wrapped in tracebacks.
        """
        try:
            return self._made(epoch, index, read, stored)
        except BadSample as error:
            return error

    def _made(self, epoch: int, index: int, read: ReadMember, stored: Callable[[str], Row | None]) -> Item:
        samples, data = self._samples, self._run.data
        number, ordinal = samples.address(index)
        tar, view = samples.tars[number], samples.view(epoch)
        rng = np.random.default_rng([self._run.seed, epoch, index])
        text = read_annotation(tar, ordinal, read, caption_per_line=data.caption_per_line)
        caption = text.captions[rng.integers(len(text.captions))]
        decode = functools.cache(lambda: read_image(tar, ordinal, data.max_pixels, read))
        pixels = None
        if self._sees_images:
            cropped = data.crop_scale < 1
            pixels = (
                random_crop(decode(), data.image_size, data.crop_scale, rng)
                if cropped
                else samples.picture(index, view, decode(), data.image_size)
            )
            if self._augments:
                pixels = augmented(pixels, data.augment, rng)
        try:
            rows = {
                name: join.filled(stored(name), number, ordinal, view, decode) for name, join in samples.caches.items()
            }
        except NoRow as error:
            raise BadSample(f"{tar.location}: sample {tar.samples[ordinal].key!r}: {error}") from error
        field = samples.part_of(number).group_field
        return Item(pixels, caption, rows, concept_hash(concept(tar, ordinal, text, field)))


def concept_hash(name: str) -> int:
    """Return a 64-bit signed hash of a concept's name."""
    return int(np.uint64(xxhash.xxh3_64_intdigest(name.encode())).astype(np.int64))
