"""Sequential access: several streams, each of which reads its tars one after the other, through a shuffle buffer.

The tars of an epoch in a seeded order, end to end, are cut into streams of equal length, so all streams take the same
number of steps, and a tar at a cut is read by two of them. A stream owns the same positions of every global batch,
whichever rank and worker reads it. Its samples are a pure function of (seed, epoch, stream): a resumed run computes
what the shuffle buffer held, and continues reading at the first of those samples.
"""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from threetowers.cache.processes.prefetch import prefetch
from threetowers.cache.webdataset.sample_stream import stream_samples
from threetowers.trainer.config import ConfigError
from threetowers.trainer.data.joins.visit import Visit
from threetowers.trainer.data.mixture import batch_layout
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.sampler import Epoch, Indices, epochs

READ_AHEAD = 1024  # samples that the threads of all streams read before they are needed; at least 4 of each stream
MOST_STREAMS = 512  # by default: each holds up to three tars of rows of each cache
FEW_TARS = 64  # streams that there may be by default, however few the tars


class StreamSegment(NamedTuple):
    """The part of one epoch of one component that a stream reads.

    Attributes:
        epoch: Number of the epoch.
        indices: Its samples, in the order of the tars.
        done: How many of them, in shuffled order, earlier steps have used.
    """

    epoch: int
    indices: Indices
    done: int


class StreamStep(NamedTuple):
    """The work of one stream in one step.

    Attributes:
        stream: Number of the stream.
        components: The component of each position of the batch that the stream fills.
        segments: By component, the segment that begins, or is resumed, with this step.
    """

    stream: int
    components: list[int]
    segments: dict[int, StreamSegment]


class StreamedSample(NamedTuple):
    """A sample as it was read from its tar, with what is stored for this visit by cached tower. Nothing is decoded."""

    visit: Visit
    members: Mapping[str, bytes]
    rows: Mapping[str, Any]


class StreamSampler:
    """A torch batch sampler: the steps of this rank's streams, each in `parts` parts of a few streams.

    A stream stays with one worker, because torch's DataLoader hands its batches to its workers in turn and `parts` is a
    multiple of their number.
    """

    def __init__(
        self,
        samples: SampleSet,
        seed: int,
        num_streams: int,
        rank: int,
        world_size: int,
        parts: int,
        start: int,
        stop: int,
    ) -> None:
        """Set up the sampler for the steps start .. stop-1.

        Raises:
            ConfigError: The streams cannot be divided among the ranks.
        """
        if num_streams % world_size:
            raise ConfigError(
                f"data.num_streams: {num_streams} streams cannot be divided among {world_size} ranks; start a number "
                "of ranks that divides them, or, in a new run, set data.num_streams to a multiple of its ranks"
            )
        self._samples = samples
        self._seed = seed
        self._steps = range(start, stop)
        counts = [component.samples_per_batch for component in samples.components]
        self._layout_sb = batch_layout(counts).reshape(num_streams, -1)  # by stream, the component of its positions
        # By component (row): its samples in one step of each stream, and in one step of all streams before that one.
        self._counts_cs = np.stack([(self._layout_sb == number).sum(1) for number in range(len(counts))])
        self._before_cs = np.cumsum(self._counts_cs, axis=1) - self._counts_cs
        per_rank = num_streams // world_size
        own = range(rank * per_rank, (rank + 1) * per_rank)
        self._streams_of_parts = [streams.tolist() for streams in np.array_split(own, parts)]

    def __len__(self) -> int:
        """Return the number of parts of all steps."""
        return len(self._steps) * len(self._streams_of_parts)

    def __iter__(self) -> Iterator[list[StreamStep]]:
        """Yield the work of each part, step after step."""
        start, stop = self._steps.start, self._steps.stop
        if start == stop:
            return
        coming = [
            epochs(partial(self._samples.epoch_indices, component=number), int(count), start, stop)
            for number, count in enumerate(self._counts_cs.sum(1))
        ]
        current = [next(component_epochs) for component_epochs in coming]
        for step in self._steps:
            # Components have epochs of their own: which of them begin, or are resumed, with this step?
            orders: dict[int, Indices] = {}
            for number, epoch in enumerate(current):
                if step == epoch.first_step + epoch.steps:
                    epoch = current[number] = next(coming[number])
                if step in (start, epoch.first_step):
                    tar_numbers = self._samples.tar_numbers(epoch.indices)
                    orders[number] = tar_order(self._seed, epoch.number, epoch.indices, tar_numbers, number)
            for streams in self._streams_of_parts:
                yield [self._stream_step(stream, step, current, orders) for stream in streams]

    def _stream_step(
        self, stream: int, step: int, current: Sequence[Epoch], orders: Mapping[int, Indices]
    ) -> StreamStep:
        segments = {}
        for number, indices in orders.items():
            epoch = current[number]
            count = int(self._counts_cs[number, stream])
            first = epoch.steps * int(self._before_cs[number, stream])
            own = indices[first : first + epoch.steps * count]
            segments[number] = StreamSegment(epoch.number, own, (step - epoch.first_step) * count)
        return StreamStep(stream, self._layout_sb[stream].tolist(), segments)


def default_streams(batch_size: int, tars: int) -> int:
    """Return into how many streams the tars of a run are cut unless its config says so.

    It depends on nothing but what a run is, as the order of its samples does: not on ranks or workers. It divides the
    batch; powers of two are taken out of the batch alone, so that numbers of ranks that divide the batch mostly divide
    the streams, too.

    Args:
        batch_size: The global batch size.
        tars: The tars of the run.
    """
    most = max(FEW_TARS, min(MOST_STREAMS, tars))
    streams = batch_size
    while streams > most and streams % 2 == 0:
        streams //= 2
    return next(number for number in range(min(streams, most), 0, -1) if streams % number == 0)


def tar_order(seed: int, epoch: int, indices: Indices, tar_numbers: Indices, component: int = 0) -> Indices:
    """Return `indices` with their tars in a random order of the epoch, and their own order inside each tar.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        indices: Samples of one component, (n,).
        tar_numbers: The tar of each of them, (n,).
        component: Number of the component.
    """
    tars, tar_of = np.unique(tar_numbers, return_inverse=True)
    positions = np.random.default_rng([seed, epoch, component]).permutation(len(tars))
    return indices[np.argsort(positions[tar_of], kind="stable")]


def shuffle_buffer_order(samples: int, buffer_size: int, rng: np.random.Generator) -> Indices:
    """Return the order (samples,) in which a shuffle buffer yields the samples 0, 1, 2, ... that are put into it.

    It holds at most `buffer_size` samples: entry i of the order is one of the first i + buffer_size samples.
    """
    held = list(range(min(buffer_size, samples)))
    order = []
    slots = rng.integers(0, buffer_size, max(0, samples - buffer_size)).tolist()
    for arriving, slot in enumerate(slots, start=buffer_size):
        order.append(held[slot])
        held[slot] = arriving
    return np.array([*order, *rng.permutation(held)], np.int64)


def read_segment(
    samples: SampleSet, segment: StreamSegment, buffer_size: int, rng: np.random.Generator, read_ahead: int
) -> Iterator[StreamedSample]:
    """Yield the remaining samples of a segment in shuffled order. A thread reads ahead.

    Args:
        samples: All samples of the run.
        segment: The samples to read, and how many are done.
        buffer_size: Samples that the shuffle buffer holds.
        rng: Random numbers of the shuffle buffer.
        read_ahead: Samples that the thread reads before they are needed.

    Raises:
        BadTar: A tar has changed since it was indexed.
        ManifestError: A cache has changed since it was opened, or is damaged.
    """
    order = shuffle_buffer_order(len(segment.indices), buffer_size, rng)[segment.done :]
    to_read = segment.indices[np.sort(order)]
    held: dict[int, StreamedSample] = {}
    with contextlib.closing(prefetch(_read_tars(samples, segment.epoch, to_read), read_ahead)) as arriving:
        for index in segment.indices[order].tolist():
            while index not in held:
                sample = next(arriving)
                held[sample.visit.index] = sample
            yield held.pop(index)


def _read_tars(samples: SampleSet, epoch: int, indices: Indices) -> Iterator[StreamedSample]:
    """Yield samples, which are sorted by tar, with their rows."""
    by_tar = list(samples.by_tar(indices))
    tar_numbers = [tar_number for tar_number, _ in by_tar]
    view = samples.view(epoch)
    with contextlib.ExitStack() as stack:
        # One generator a cache, each of which reads the rows of the next tar while this one is in use
        rows_of_tars = {
            name: stack.enter_context(contextlib.closing(join.streamed_rows(tar_numbers, view)))
            for name, join in samples.caches.items()
        }
        for tar_number, ordinals in by_tar:
            row_of = {name: next(rows) for name, rows in rows_of_tars.items()}
            with contextlib.closing(_members_of_tar(samples, tar_number, ordinals)) as members_of_samples:
                for ordinal, members in zip(ordinals, members_of_samples, strict=True):
                    visit = samples.visit(epoch, samples.index(tar_number, ordinal))
                    yield StreamedSample(visit, members, {name: row(ordinal, visit) for name, row in row_of.items()})


def _members_of_tar(
    samples: SampleSet, tar_number: int, ordinals: list[int]
) -> Generator[Mapping[str, bytes], None, None]:
    """Yield the members of some samples of a tar, which are in order; where none are needed, it is not opened."""
    extensions = samples.extensions_read(tar_number)
    if not extensions and not samples.reads_images:
        yield from ({} for _ in ordinals)
        return
    wanted = set(ordinals)
    with contextlib.closing(stream_samples(samples.tars[tar_number], ordinals[0], extensions)) as tar_samples:
        for ordinal, members in tar_samples:
            if ordinal in wanted:
                yield members
            if ordinal == ordinals[-1]:
                break
