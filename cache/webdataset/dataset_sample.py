"""A random sample of the images in some tars, and estimates of how many samples the tars have."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.cache.webdataset.sample import Annotation, read_annotation, read_encoded_image, read_image
from threetowers.cache.webdataset.sample_list import unreadable
from threetowers.cache.webdataset.tar_index import TarIndex, read_member
from threetowers.cache.webdataset.tar_list import OnBad, index_tars, require_samples
from threetowers.cache.webdataset.tar_patterns import expand

MAX_TARS = 16


@dataclass(frozen=True)
class DatasetSample:
    """Images drawn from some of the tars of a data set.

    Attributes:
        n_tars: Tars of the data set.
        indexed: The indexes of some of them, evenly spaced in the list.
        sample: The (tar number, ordinal) in these of the samples that were drawn.
        max_pixels: Largest width x height of an image that is decoded.
        on_bad: Whether a bad sample stops the sampling.
        notes: Lines on tars that are not used.
    """

    n_tars: int
    indexed: tuple[TarIndex, ...]
    sample: tuple[tuple[int, int], ...]
    max_pixels: int = MAX_PIXELS
    on_bad: OnBad = "skip"
    notes: tuple[str, ...] = ()

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
        """Return the bytes of one image of the sample. Raises BadSample where there is none."""
        number, ordinal = at
        return read_encoded_image(self.indexed[number], ordinal)

    def image_member(self, at: tuple[int, int]) -> dict[str, bytes]:
        """Return the image of one sample by its extension; nothing where there is none."""
        number, ordinal = at
        sample = self.indexed[number].samples[ordinal]
        return {} if sample.image is None or sample.defect is not None else {sample.image: self.data(at)}

    def readable(self, at: tuple[int, int], extensions: Collection[str]) -> dict[str, bytes]:
        """Return those members of one sample that have these extensions, as far as they can be read."""
        number, ordinal = at
        members = self.indexed[number].samples[ordinal].members
        wanted = [name for name in sorted(members.keys() & set(extensions)) if not unreadable(members[name])]
        return {name: read_member(self.indexed[number], ordinal, name) for name in wanted}

    def annotations(self, captions: CaptionFormat) -> list[Annotation]:
        """Return the captions of the sample, found as `captions` says.

        Raises:
            BadSample: A sample has none, and `on_bad` is error.
        """
        required = self.on_bad == "error"
        return [
            read_annotation(self.indexed[number], ordinal, captions=captions, captions_required=required)
            for number, ordinal in self.sample
        ]

    def images(self) -> tuple[list[Image.Image], Counter[str]]:
        """Decode the images of the sample; return them, and the number of bad samples by the reason.

        Raises:
            BadSample: A sample is bad, and `on_bad` is error.
        """
        found = []
        bad: Counter[str] = Counter()
        for number, ordinal in self.sample:
            try:
                found.append(read_image(self.indexed[number], ordinal, self.max_pixels))
            except BadSample as error:
                if self.on_bad == "error":
                    raise BadSample(f"{error}; on_bad: skip (--on-bad skip) leaves it out", error.reason) from error
                bad[error.reason] += 1
        return found, bad


def sample_dataset(
    tars: Sequence[str | Path],
    sample: int,
    seed: int = 0,
    max_tars: int = MAX_TARS,
    *,
    image_member: str | None = None,
    max_pixels: int = MAX_PIXELS,
    on_bad: OnBad = "skip",
) -> DatasetSample:
    """Index up to `max_tars` of these tars and draw up to `sample` of their samples.

    Args:
        tars: Paths, globs, brace ranges or URLs.
        sample: Samples to draw.
        seed: Of the sample.
        max_tars: Tars to index.
        image_member: See `index_tar`.
        max_pixels: Largest width x height of an image that is decoded.
        on_bad: What is done about bad samples and tars.

    Raises:
        BadTar, BadSample, ValueError: bad input, named in the message.
    """
    if sample < 1:
        raise ValueError(f"--sample {sample}: expected at least 1")
    paths = expand(tars)
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(max_tars, len(paths))).round().astype(int)).tolist()
    listed = require_samples(index_tars([paths[i] for i in chosen], image_member, on_bad))
    indexed = tuple(listed.tars)
    ends = np.cumsum([len(index.samples) for index in indexed])
    starts = np.concatenate([[0], ends[:-1]])
    drawn = np.sort(np.random.default_rng(seed).permutation(int(ends[-1]))[:sample])
    tar_n = np.searchsorted(ends, drawn, side="right")
    ordinal_n = drawn - starts[tar_n]
    drawn_samples = tuple(zip(tar_n.tolist(), ordinal_n.tolist(), strict=True))
    n_tars = len(paths) - len(listed.bad) - len(listed.empty)
    return DatasetSample(n_tars, indexed, drawn_samples, max_pixels, on_bad, tuple(listed.notes()))
