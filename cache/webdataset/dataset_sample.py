"""A random sample of the images in some tars, and estimates of how many samples the tars have."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.tar_index import TarIndex, expand, index_tar, read_member

MAX_TARS = 16


@dataclass(frozen=True)
class DatasetSample:
    """Images drawn from some of the tars of a data set.

    `indexed` are the indexes of some of the `n_tars` tars, evenly spaced in the list; `sample` are the (tar number,
    ordinal) in these of the images that were drawn.
    """

    n_tars: int
    indexed: tuple[TarIndex, ...]
    sample: tuple[tuple[int, int], ...]

    @property
    def exact(self) -> bool:
        """Whether the number of samples is counted, not estimated from some of the tars."""
        return len(self.indexed) == self.n_tars

    @property
    def n_samples(self) -> int:
        """Samples in all tars."""
        return round(float(np.mean([len(index.samples) for index in self.indexed])) * self.n_tars)

    @property
    def largest(self) -> int:
        """Samples in the largest indexed tar."""
        return max(len(index.samples) for index in self.indexed)

    def data(self, at: tuple[int, int]) -> bytes:
        """Return the bytes of one image of the sample."""
        number, ordinal = at
        index = self.indexed[number]
        return read_member(index, ordinal, index.samples[ordinal].image)

    def key(self, at: tuple[int, int]) -> str:
        """Return the key of one image of the sample."""
        number, ordinal = at
        return self.indexed[number].samples[ordinal].key

    def images(self) -> tuple[list[Image.Image], int]:
        """Decode the images of the sample; return them and the number that cannot be decoded."""
        found = []
        bad = 0
        for at in self.sample:
            try:
                found.append(decode_rgb(self.data(at)))
            except BadImage:
                bad += 1
        return found, bad


def sample_dataset(tars: Sequence[str | Path], sample: int, seed: int = 0, max_tars: int = MAX_TARS) -> DatasetSample:
    """Index up to `max_tars` of these tars and draw up to `sample` of their images.

    Raises:
        BadTar, ValueError: bad input, named in the message.
    """
    if sample < 1:
        raise ValueError(f"--sample {sample}: expected at least 1")
    paths = expand(tars)
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(max_tars, len(paths))).round().astype(int)).tolist()
    indexed = tuple(index_tar(paths[i]) for i in chosen)
    ends = np.cumsum([len(index.samples) for index in indexed])
    starts = np.concatenate([[0], ends[:-1]])
    drawn = np.sort(np.random.default_rng(seed).permutation(int(ends[-1]))[:sample])
    tar_n = np.searchsorted(ends, drawn, side="right")
    ordinal_n = drawn - starts[tar_n]
    return DatasetSample(len(paths), indexed, tuple(zip(tar_n.tolist(), ordinal_n.tolist(), strict=True)))
