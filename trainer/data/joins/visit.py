"""The visit of an epoch to a sample: which view of its image and which of its captions are shown."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from threetowers.cache.webdataset.captions import CaptionFormat


@dataclass(frozen=True, slots=True)
class Visit:
    """What an epoch shows of a sample: a pure function of these fields.

    Attributes:
        seed: Seed of the run.
        epoch: Number of the epoch of the sample's component.
        index: Index of the sample.
        view: View of its image.
        captions: Where its captions are, and by which weights one is drawn.
    """

    seed: int
    epoch: int
    index: int
    view: int
    captions: CaptionFormat

    def rng(self) -> np.random.Generator:
        """Return random numbers of this visit, from the first."""
        fields = [self.seed, self.epoch, self.index]
        # An array gives the same numbers as a list, in half the time
        return np.random.default_rng(np.array(fields, np.uint32) if max(fields) < 1 << 32 else fields)

    def place(self, counts: Mapping[str, int], rng: np.random.Generator | None = None) -> tuple[str, int]:
        """Draw one of the sample's captions: its source, and its position among those of the source.

        Args:
            counts: How many captions each source has, at least one in all.
            rng: The visit's random numbers, from which other things are drawn afterwards. Without them none are made
                where there is no choice, as that takes longer than to read a row.
        """
        if rng is None:
            if list(counts.values()) == [1]:
                return next(iter(counts)), 0
            rng = self.rng()
        return self.captions.draw_place(counts, rng)
