"""How many captions the samples of some tars have, found out on a few of them, so that a cache makes room for all."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample import read_annotation
from threetowers.cache.webdataset.tar_index import TarIndex

MAX_TARS = 16
MAX_SAMPLES = 256  # of a tar, whose captions are counted


def captions_per_tar(tars: Sequence[TarIndex], captions: CaptionFormat, pool: ThreadPoolExecutor) -> int:
    """Return how many captions the largest tar has, were it as dense as the densest of up to MAX_TARS of them.

    The tars and their samples are taken at equal distances. At least 1 is returned.

    Raises:
        BadSample: none of these samples has a caption.
        BadTar: a tar has changed since it was indexed.
    """
    some = [tars[i] for i in _spread(len(tars), MAX_TARS)]
    densities = list(pool.map(partial(_density, captions=captions), some))
    if not any(densities):
        # The error of the first sample says what it has instead of captions.
        first = next(tar for tar in some if len(tar.samples))
        try:
            read_annotation(first, 0, captions=captions)
        except BadSample as error:
            raise BadSample(f"none of the samples that were looked at has a caption; the first: {error}") from None
    return max(1, math.ceil(max(densities) * max(len(tar.samples) for tar in tars)))


def _density(tar: TarIndex, captions: CaptionFormat) -> float:
    """Return the captions per sample of a tar, in some of its samples."""
    ordinals = _spread(len(tar.samples), MAX_SAMPLES)
    found = [len(read_annotation(tar, i, captions=captions, captions_required=False).captions) for i in ordinals]
    return sum(found) / len(found) if found else 0.0


def _spread(n: int, most: int) -> list[int]:
    """Return up to `most` of n numbers, at equal distances, with the first and the last."""
    numbers: list[int] = np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist()
    return numbers
