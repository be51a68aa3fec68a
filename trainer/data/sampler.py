"""The order of samples: a pure function of (seed, epoch), whatever the number of ranks and workers.

A set of samples is visited either in a permutation of all of it (random access), or in lanes: the tars in a random
order, end to end, are cut into equal lengths that are read side by side, each through a shuffle buffer (streaming).
Every lane has its own places in each global batch, so who reads it changes nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Address = tuple[int, int]  # epoch of the sample's set, index of the sample


class Epoch(NamedTuple):
    """One visit to a set: what is visited, in how many steps, of which the first is step `first` of the run."""

    number: int
    visited: Indices
    first: int
    steps: int


def epochs(visited: Callable[[int], Indices], batch: int, start: int, stop: int) -> Iterator[Epoch]:
    """Yield the epochs that the steps start .. stop-1 touch; each is its whole batches of `batch` samples.

    Raises ValueError when an epoch has fewer samples than a batch.
    """
    number, first = 0, 0
    while first < stop:
        indices = visited(number)
        steps = len(indices) // batch
        if steps == 0:
            raise ValueError(too_few(batch, len(indices)))
        if first + steps > start:
            yield Epoch(number, indices, first, steps)
        number, first = number + 1, first + steps


def too_few(batch: int, samples: int) -> str:
    """Return what is wrong with a set that cannot fill its places in one batch."""
    return f"a batch of {batch} needs at least {batch} samples, the tars hold {samples}; lower `batch`"


def permutation(seed: int, epoch: int, samples: int, *salt: int) -> Indices:
    """Return the order (samples,) in which one epoch visits the set. `salt`: of one set of several."""
    return np.random.default_rng([seed, epoch, *salt]).permutation(samples)


def global_batches(
    seed: int, visited: Callable[[int], Indices], batch: int, start: int, stop: int, *salt: int
) -> Iterator[tuple[int, Indices]]:
    """Yield (epoch, sample indices (batch,)) for the steps start .. stop-1. `visited`: the samples of an epoch.

    An epoch is its whole batches; the samples left over differ from epoch to epoch.
    Raises ValueError when an epoch has fewer samples than a batch.
    """
    for epoch in epochs(visited, batch, start, stop):
        order = epoch.visited[permutation(seed, epoch.number, len(epoch.visited), *salt)]
        for step in range(max(start, epoch.first), min(stop, epoch.first + epoch.steps)):
            yield epoch.number, order[(step - epoch.first) * batch : (step - epoch.first + 1) * batch]


def by_tar(seed: int, epoch: int, indices: Indices, tars: Indices, *salt: int) -> Indices:
    """Return `indices`, sorted as given inside each tar, with the tars in an order of the epoch's own.

    `tars`: the tar of each index.
    """
    names, numbers = np.unique(tars, return_inverse=True)
    places = np.random.default_rng([seed, epoch, *salt]).permutation(len(names))
    return indices[np.argsort(places[numbers], kind="stable")]


def buffered(samples: int, buffer: int, rng: np.random.Generator) -> Indices:
    """Return the order (samples,) in which a shuffle buffer gives what arrives as 0, 1, 2, ...

    It holds at most `buffer` samples: what is given at place i is one of the first i + buffer that arrived.
    """
    held = list(range(min(buffer, samples)))
    order = []
    for arriving, slot in enumerate(rng.integers(0, buffer, max(0, samples - buffer)).tolist(), start=buffer):
        order.append(held[slot])
        held[slot] = arriving
    return np.array([*order, *rng.permutation(held)], np.int64)


def shares(weights: Sequence[float], batch: int) -> list[int]:
    """Return how many samples of each batch come from each set: by weight, rounded by largest remainder.

    Raises ValueError for a weight so small that its set would have none.
    """
    exact = np.array(weights, np.float64) / sum(weights) * batch
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: batch - counts.sum()]] += 1
    if not counts.all():
        least = int(np.argmin(counts))
        raise ValueError(
            f"set number {least + 1} of weight {weights[least]:g} among {list(weights)} has no sample in a batch of "
            f"{batch}: raise its weight or `batch`"
        )
    return [int(count) for count in counts]


def places(counts: Sequence[int]) -> Indices:
    """Return which set each place of a global batch (batch,) belongs to: spread evenly, so that any part is alike."""
    at = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(at, kind="stable")]


class RankBatches:
    """A torch batch sampler: this rank's contiguous share of each global batch, as (epoch, index) addresses."""

    def __init__(
        self,
        seed: int,
        visited: Sequence[Callable[[int], Indices]],
        counts: Sequence[int],
        rank: int,
        ranks: int,
        start: int,
        stop: int,
    ) -> None:
        """`visited`, `counts`: of each set, the samples of its epochs, and how many of them are in a global batch.

        Raises ValueError for ranks that do not divide the batch.
        """
        batch = sum(counts)
        if batch % ranks:
            raise ValueError(f"batch {batch} is not divisible by {ranks} ranks; change `batch` or the launch")
        self._arguments = [
            (seed, part, count, start, stop, i) for i, (part, count) in enumerate(zip(visited, counts, strict=True))
        ]
        self._places = places(counts)
        self._mine = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
        self._steps = stop - start

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[Address]]:
        for drawn in zip(*(global_batches(*arguments) for arguments in self._arguments), strict=True):
            epochs_b, indices_b = np.empty_like(self._places), np.empty_like(self._places)
            for number, (epoch, indices) in enumerate(drawn):
                epochs_b[self._places == number], indices_b[self._places == number] = epoch, indices
            yield list(zip(epochs_b[self._mine].tolist(), indices_b[self._mine].tolist(), strict=True))
