"""The mixture of data sets in a run: how many samples of each are in a global batch, and at which positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS, CaptionFormat
from threetowers.trainer.data.epoch_snapshot import EpochSnapshots


@dataclass(frozen=True)
class MixtureComponent:
    """One of the data sets that a run mixes.

    Attributes:
        name: Its key in `data.datasets`; empty where it is the only one.
        tars: The numbers of its tars in the run's list.
        samples_per_batch: Its samples in every global batch.
        group_field: The field that names the group of a sample; None where each sample is its own group.
        captions: Where the captions of a sample are.
        snapshots: The tars of each epoch, where the caches of the run are still being built.
    """

    name: str
    tars: range
    samples_per_batch: int = 1
    group_field: str | None = None
    captions: CaptionFormat = DEFAULT_CAPTIONS
    snapshots: EpochSnapshots | None = None


def samples_per_batch(weights: Sequence[float], batch_size: int) -> list[int]:
    """Return how many samples of each component are in a global batch: by weight, rounded by largest remainder.

    Raises:
        ValueError: A weight is so small that its component would have no sample.
    """
    exact = np.array(weights, np.float64) / sum(weights) * batch_size
    counts = np.floor(exact).astype(int)
    largest_remainders = np.argsort(counts - exact, kind="stable")
    counts[largest_remainders[: batch_size - counts.sum()]] += 1
    if not counts.all():
        least = int(np.argmin(counts))
        raise ValueError(
            f"data.datasets: number {least + 1} has no sample in a global batch of {batch_size}, as its weight is "
            f"{weights[least]:g} among {list(weights)}; raise its weight or global_batch_size"
        )
    return [int(count) for count in counts]


def batch_layout(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the component of each position of a global batch: (sum(counts),) int64.

    Components are spread evenly, so that every contiguous part of the batch has about the same mixture.
    """
    fractions = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    components = np.repeat(np.arange(len(counts)), counts)
    return components[np.argsort(fractions, kind="stable")]
