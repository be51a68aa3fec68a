"""Streams: each lane reads its tars one after the other, through a shuffle buffer.

Tars in a seeded order, end to end, are cut into lanes of equal length, so all lanes take the same number of steps and a
tar at a cut is read by two. Lane l owns the same places of every global batch, whichever rank and worker reads it. What
a lane gives is a pure function of (seed, epoch, lane): a resumed run knows what its buffer held, and reads on from the
first of those samples.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from threetowers.cache.prefetch import prefetch
from threetowers.cache.webdataset.sample_stream import stream_samples
from threetowers.trainer.config import ConfigError
from threetowers.trainer.data.cache_join import Row
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.sampler import Epoch, Indices, buffered, by_tar, epochs, places

AHEAD = 64  # samples of a lane that its thread has read before they are asked for


class Segment(NamedTuple):
    """The samples of one set that a lane visits in one epoch, in the order of its tars; so many of them are done."""

    epoch: int
    indices: Indices
    done: int


class LaneStep(NamedTuple):
    """What a lane does in one step."""

    lane: int
    parts: list[int]  # the sets that its places belong to
    begins: dict[int, Segment]  # by set: the epochs that begin, or are resumed, with this step


class Streamed(NamedTuple):
    """A sample as it came out of a lane."""

    epoch: int
    sample: int
    members: Mapping[str, bytes]
    rows: Mapping[str, Row | None]  # by cached tower


class RankLanes:
    """A torch batch sampler: the steps of this rank's lanes, each step in as many parts as there are workers.

    Relies on the loader giving its batches to its workers in turn: a lane stays with the worker that reads it.
    """

    def __init__(
        self,
        samples: SampleSet,
        visited: Sequence[Callable[[int], Indices]],
        counts: Sequence[int],
        seed: int,
        lanes: int,
        rank: int,
        ranks: int,
        workers: int,
        start: int,
        stop: int,
    ) -> None:
        """`visited`, `counts`: as for RankBatches. Raises ConfigError for ranks that do not divide the lanes."""
        if lanes % ranks:
            raise ConfigError(
                f"data.num_streams: {lanes} streams cannot be dealt out to {ranks} ranks; start a number of ranks that "
                "divides them, or, in a new run, change data.num_streams"
            )
        self._samples, self._visited, self._seed = samples, list(visited), seed
        self._start, self._stop = start, stop
        self._parts_lb = places(counts).reshape(lanes, -1)
        # samples of each set (row) in a step of each lane, and in those of the lanes before it
        self._share_nl = np.stack([(self._parts_lb == part).sum(1) for part in range(len(counts))])
        self._before_nl = np.cumsum(self._share_nl, axis=1) - self._share_nl
        mine = range(rank * lanes // ranks, (rank + 1) * lanes // ranks)
        self._workers = [chunk.tolist() for chunk in np.array_split(mine, max(1, workers))]

    def __len__(self) -> int:
        return (self._stop - self._start) * len(self._workers)

    def __iter__(self) -> Iterator[list[LaneStep]]:
        counts = self._share_nl.sum(1).tolist()
        coming = [epochs(v, n, self._start, self._stop) for v, n in zip(self._visited, counts, strict=True)]
        now = [part for found in coming for part in itertools.islice(found, 1)]  # none where there is no step
        for step in range(self._start, self._stop):
            for part, epoch in enumerate(now):
                if step == epoch.first + epoch.steps:
                    now[part] = next(coming[part])
            fresh = {
                part: self._in_order(part, epoch)
                for part, epoch in enumerate(now)
                if step in (self._start, epoch.first)
            }
            for lanes in self._workers:
                yield [self._lane_step(lane, step, now, fresh) for lane in lanes]

    def _in_order(self, part: int, epoch: Epoch) -> Indices:
        return by_tar(self._seed, epoch.number, epoch.visited, self._samples.tar_numbers(epoch.visited), part)

    def _lane_step(self, lane: int, step: int, now: Sequence[Epoch], fresh: Mapping[int, Indices]) -> LaneStep:
        begins = {}
        for part, indices in fresh.items():
            epoch, share = now[part], int(self._share_nl[part, lane])
            first = epoch.steps * int(self._before_nl[part, lane])
            mine = indices[first : first + epoch.steps * share]
            begins[part] = Segment(epoch.number, mine, (step - epoch.first) * share)
        return LaneStep(lane, self._parts_lb[lane].tolist(), begins)


def read_segment(samples: SampleSet, segment: Segment, buffer: int, rng: np.random.Generator) -> Iterator[Streamed]:
    """Yield the samples of a segment that are not done, through a shuffle buffer of so many. A thread reads ahead.

    Raises BadTar or ContractError for tars and caches that have changed.
    """
    order = buffered(len(segment.indices), buffer, rng)[segment.done :]
    arriving = segment.indices[np.sort(order)]
    held: dict[int, Streamed] = {}
    with contextlib.closing(prefetch(_arrivals(samples, segment.epoch, arriving), AHEAD)) as source:
        for index in segment.indices[order].tolist():
            while index not in held:
                found = next(source)
                held[found.sample] = found
            yield held.pop(index)


def _arrivals(samples: SampleSet, epoch: int, indices: Indices) -> Iterator[Streamed]:
    """Samples in the order of their tars, with their rows; nothing is decoded."""
    runs = list(samples.by_tar(indices))
    view = samples.view(epoch)
    with contextlib.ExitStack() as stack:
        rows = {
            name: stack.enter_context(contextlib.closing(join.streamed_rows([number for number, _ in runs], view)))
            for name, join in samples.caches.items()
        }
        for number, ordinals in runs:
            row_of = {name: next(found) for name, found in rows.items()}
            wanted = set(ordinals)
            with contextlib.closing(stream_samples(samples.tars[number], ordinals[0])) as found:
                for ordinal, members in found:
                    if ordinal in wanted:
                        stored = {name: row(ordinal) for name, row in row_of.items()}
                        yield Streamed(epoch, samples.index(number, ordinal), members, stored)
                    if ordinal == ordinals[-1]:
                        break
