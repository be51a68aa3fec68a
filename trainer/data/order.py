"""The order of samples: a pure function of (seed, epoch), whatever the number of ranks and workers."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def permutation(seed: int, epoch: int, samples: int) -> Indices:
    """Return the order (samples,) in which one epoch visits the set."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def global_batches(
    seed: int, visited: Callable[[int], Indices], batch: int, start: int, stop: int
) -> Iterator[tuple[int, Indices]]:
    """Yield (epoch, sample indices (batch,)) for the steps start .. stop-1. `visited`: the samples of an epoch.

    An epoch is its whole batches; the samples left over differ from epoch to epoch.
    Raises ValueError when an epoch has fewer samples than a batch.
    """
    epoch, first = 0, 0  # the first step of the epoch
    while first < stop:
        indices = visited(epoch)
        steps = len(indices) // batch
        if steps == 0:
            raise ValueError(
                f"a batch of {batch} needs at least {batch} samples, the tars hold {len(indices)}; lower `batch`"
            )
        if first + steps > start:
            order = indices[permutation(seed, epoch, len(indices))]
            for step in range(max(start, first), min(stop, first + steps)):
                yield epoch, order[(step - first) * batch : (step - first + 1) * batch]
        epoch, first = epoch + 1, first + steps


class RankBatches:
    """A torch batch sampler: this rank's contiguous share of each global batch, as (epoch, index) addresses."""

    def __init__(
        self, seed: int, visited: Callable[[int], Indices], batch: int, rank: int, ranks: int, start: int, stop: int
    ) -> None:
        if batch % ranks:
            raise ValueError(f"batch {batch} is not divisible by {ranks} ranks; change `batch` or the launch")
        self._arguments = (seed, visited, batch, start, stop)
        local = batch // ranks
        self._mine = slice(rank * local, (rank + 1) * local)
        self._steps = stop - start
        next(global_batches(seed, visited, batch, 0, 1))  # refuse a set that is too small now, not in a worker

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, indices in global_batches(*self._arguments):
            yield [(epoch, int(i)) for i in indices[self._mine]]
