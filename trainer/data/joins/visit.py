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
        most_captions: How many of them are drawn, where it has as many.
    """

    seed: int
    epoch: int
    index: int
    view: int
    captions: CaptionFormat
    most_captions: int = 1

    def rng(self) -> np.random.Generator:
        """Return random numbers of this visit, from the first."""
        fields = [self.seed, self.epoch, self.index]
        # An array gives the same numbers as a list, in half the time
        return np.random.default_rng(np.array(fields, np.uint32) if max(fields) < 1 << 32 else fields)

    def places(self, counts: Mapping[str, int], rng: np.random.Generator | None = None) -> list[tuple[str, int]]:
        """Draw the captions that are shown: of each its source, and its position among those of the source.

        The first is the one that is drawn where a single one is shown.

        Args:
            counts: How many captions each source has, at least one in all.
            rng: The visit's random numbers, from which other things are drawn afterwards. Without them none are made
                where there is no choice, as that takes longer than to read a row.
        """
        if rng is None:
            if list(counts.values()) == [1]:
                return [(next(iter(counts)), 0)]
            rng = self.rng()
        return self.captions.draw_places(counts, self.most_captions, rng)
