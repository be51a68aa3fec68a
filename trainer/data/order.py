"""The order of samples: a pure function of (seed, epoch), whatever the number of ranks and workers."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def permutation(seed: int, epoch: int, samples: int) -> Indices:
    """Return the order (samples,) in which one epoch visits the set."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def global_batches(seed: int, samples: int, batch: int, start: int, stop: int) -> Iterator[tuple[int, Indices]]:
    """Yield (epoch, sample indices (batch,)) for the steps start .. stop-1.

    An epoch is its whole batches; the `samples % batch` left over differ from epoch to epoch.
    Raises ValueError when the set is smaller than one batch.
    """
    per_epoch = samples // batch
    if per_epoch == 0:
        raise ValueError(f"a batch of {batch} needs at least {batch} samples, the tars hold {samples}; lower `batch`")
    order, order_epoch = np.empty(0, np.int64), -1
    for step in range(start, stop):
        epoch, position = divmod(step, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = permutation(seed, epoch, samples), epoch
        yield epoch, order[position * batch : (position + 1) * batch]


class RankBatches:
    """A torch batch sampler: this rank's contiguous share of each global batch, as (epoch, index) addresses."""

    def __init__(self, seed: int, samples: int, batch: int, rank: int, ranks: int, start: int, stop: int) -> None:
        if batch % ranks:
            raise ValueError(f"batch {batch} is not divisible by {ranks} ranks; change `batch` or the launch")
        self._arguments = (seed, samples, batch, start, stop)
        local = batch // ranks
        self._mine = slice(rank * local, (rank + 1) * local)
        self._steps = stop - start
        next(global_batches(seed, samples, batch, 0, 1))  # refuse a set that is too small now, not in a worker

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, indices in global_batches(*self._arguments):
            yield [(epoch, int(i)) for i in indices[self._mine]]
