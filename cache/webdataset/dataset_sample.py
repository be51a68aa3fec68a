"""A look at a set of tars before anything is spent: how much there is, and a random sample of its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.tar_index import TarIndex, expand, index_tar, read_member

MAX_TARS = 16


@dataclass(frozen=True)
class Survey:
    """`indexed` of `n_tars` tars, evenly spaced in the list; `sample` are (tar number, ordinal) in these."""

    n_tars: int
    indexed: tuple[TarIndex, ...]
    sample: tuple[tuple[int, int], ...]

    @property
    def exact(self) -> bool:
        """Whether the counts are counted, not estimated from some of the tars."""
        return len(self.indexed) == self.n_tars

    @property
    def samples_per_tar(self) -> float:
        return float(np.mean([len(index.samples) for index in self.indexed]))

    @property
    def n_samples(self) -> int:
        return round(self.samples_per_tar * self.n_tars)

    @property
    def largest(self) -> int:
        """Samples in the largest tar that was looked at."""
        return max(len(index.samples) for index in self.indexed)

    def data(self, at: tuple[int, int]) -> bytes:
        """The bytes of one image of the sample."""
        index = self.indexed[at[0]]
        return read_member(index, at[1], index.samples[at[1]].image)

    def key(self, at: tuple[int, int]) -> str:
        return self.indexed[at[0]].samples[at[1]].key

    def pictures(self) -> tuple[list[tuple[str, Image.Image]], int]:
        """Name and picture of each image of the sample that can be decoded, and how many cannot."""
        found, bad = [], 0
        for at in self.sample:
            try:
                found.append((f"{self.indexed[at[0]].location}: {self.key(at)}", decode_rgb(self.data(at))))
            except BadImage:
                bad += 1
        return found, bad


def survey(tars: Sequence[str | Path], sample: int, seed: int = 0, max_tars: int = MAX_TARS) -> Survey:
    """Index up to `max_tars` of these tars and draw up to `sample` of their images.

    Raises:
        BadTar, ValueError: bad input, named; `sample` below 1.
    """
    if sample < 1:
        raise ValueError(f"sample={sample}: expected at least 1 picture")
    paths = expand(tars)
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(max_tars, len(paths))).round().astype(int)).tolist()
    indexed = tuple(index_tar(paths[i]) for i in chosen)
    ends = np.cumsum([len(index.samples) for index in indexed])
    drawn = np.sort(np.random.default_rng(seed).permutation(int(ends[-1]))[:sample])
    tar_n = np.searchsorted(ends, drawn, side="right")
    starts = np.concatenate([[0], ends[:-1]])
    return Survey(len(paths), indexed, tuple(zip(tar_n.tolist(), (drawn - starts[tar_n]).tolist(), strict=True)))
