"""The order of samples under random access: a pure function of (seed, epoch), for any number of ranks and workers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from threetowers.cache.webdataset.tar_list import counts_by_reason
from threetowers.trainer.data.mixture import batch_layout

Indices = npt.NDArray[np.int64]
EpochIndices = Callable[[int], Indices]  # epoch -> indices of the samples that it visits
SampleAddress = tuple[int, int]  # epoch of the sample's component, index of the sample


class Epoch(NamedTuple):
    """One pass over a component, as a number of complete batches.

    Attributes:
        number: Counted from 0.
        indices: The samples that it visits, before they are shuffled.
        first_step: The step of the run at which it begins.
        steps: Its length. Fewer samples than a batch are left over.
    """

    number: int
    indices: Indices
    first_step: int
    steps: int


def epochs(indices_of: EpochIndices, batch_size: int, start: int, stop: int) -> Iterator[Epoch]:
    """Yield the epochs of a component that fall into the steps start .. stop-1.

    Args:
        indices_of: The samples of each epoch. Called for every epoch from 0, in order.
        batch_size: Samples of the component in a global batch.
        start: The first step.
        stop: The step after the last one.

    Raises:
        ValueError: An epoch has fewer samples than a batch.
    """
    number, first_step = 0, 0
    while first_step < stop:
        indices = indices_of(number)
        steps = len(indices) // batch_size
        if steps == 0:
            raise ValueError(too_few_samples(batch_size, len(indices)))
        if first_step + steps > start:
            yield Epoch(number, indices, first_step, steps)
        number += 1
        first_step += steps


def too_few_samples(batch_size: int, samples: int, left_out: Mapping[str, int] | None = None) -> str:
    """Return the message for a component that cannot fill its positions in one batch, for what it leaves out."""
    usable = f" that can be used ({counts_by_reason(left_out)} left out)" if left_out else ""
    return (
        f"a batch of {batch_size} needs at least {batch_size} samples, the tars hold {samples}{usable}; lower "
        "global_batch_size"
    )


def permutation(seed: int, epoch: int, samples: int, component: int = 0) -> Indices:
    """Return the order (samples,) in which one epoch of a component visits its samples."""
    return np.random.default_rng([seed, epoch, component]).permutation(samples)


def global_batches(
    seed: int, indices_of: EpochIndices, batch_size: int, start: int, stop: int, component: int = 0
) -> Iterator[tuple[int, Indices]]:
    """Yield (epoch, sample indices (batch_size,)) of one component for the steps start .. stop-1.

    The samples left over at the end of an epoch differ from epoch to epoch.

    Raises:
        ValueError: An epoch has fewer samples than a batch.
    """
    for epoch in epochs(indices_of, batch_size, start, stop):
        order = epoch.indices[permutation(seed, epoch.number, len(epoch.indices), component)]
        first = max(start, epoch.first_step) - epoch.first_step
        last = min(stop - epoch.first_step, epoch.steps)
        for step in range(first, last):
            yield epoch.number, order[step * batch_size : (step + 1) * batch_size]


class RandomAccessSampler:
    """A torch batch sampler: the contiguous part of each global batch that falls to this rank, as sample addresses.

    Each step comes in `parts` contiguous parts.
    """

    def __init__(
        self,
        seed: int,
        indices_of: Sequence[EpochIndices],
        counts: Sequence[int],
        rank: int,
        world_size: int,
        start: int,
        stop: int,
        parts: int = 1,
    ) -> None:
        """Set up the sampler for the steps start .. stop-1.

        Args:
            seed: Seed of the run.
            indices_of: By component, the samples of its epochs.
            counts: By component, its samples in a global batch.
            rank: Number of this process.
            world_size: Number of processes.
            start: The first step.
            stop: The step after the last one.
            parts: Parts of a step, at most its samples of this rank.

        Raises:
            ValueError: The global batch cannot be divided among the ranks.
        """
        batch_size = sum(counts)
        if batch_size % world_size:
            raise ValueError(
                f"a global batch of {batch_size} is not divisible by {world_size} ranks; change global_batch_size or "
                "the number of processes"
            )
        self._seed = seed
        self._components = list(zip(indices_of, counts, strict=True))
        self._steps = range(start, stop)
        self._layout_B = batch_layout(counts)
        local_size = batch_size // world_size
        own = np.arange(rank * local_size, (rank + 1) * local_size)
        self._own_parts = np.array_split(own, parts)

    def __len__(self) -> int:
        """Return the number of parts of all steps."""
        return len(self._steps) * len(self._own_parts)

    def __iter__(self) -> Iterator[list[SampleAddress]]:
        """Yield the sample addresses of each part, step after step."""
        start, stop = self._steps.start, self._steps.stop
        drawing = [
            global_batches(self._seed, indices_of, count, start, stop, component)
            for component, (indices_of, count) in enumerate(self._components)
        ]
        epochs_B = np.empty_like(self._layout_B)
        indices_B = np.empty_like(self._layout_B)
        for drawn in zip(*drawing, strict=True):
            for component, (epoch, indices) in enumerate(drawn):
                positions_B = self._layout_B == component
                epochs_B[positions_B] = epoch
                indices_B[positions_B] = indices
            for own in self._own_parts:
                yield list(zip(epochs_B[own].tolist(), indices_B[own].tolist(), strict=True))
