"""From sample addresses to the batches of one rank: reading, decoding, augmentation, tokens, cached rows, groups."""

import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.processes.loader_workers import loading, worker_beginning
from threetowers.cache.processes.mapped_pickle import MappedPickle
from threetowers.cache.processes.preemption import ignore_sigterm
from threetowers.cache.processes.prefetch import prefetch
from threetowers.cache.processes.worker_processes import worker_context
from threetowers.cache.processes.world import World
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import read_member
from threetowers.trainer.config import Augment, CacheTower, TrainConfig
from threetowers.trainer.data.batch import Batch, join_parts, owners
from threetowers.trainer.data.joins.cache_join import CachedRow, MissingRow
from threetowers.trainer.data.joins.sample_members import SampleMembers
from threetowers.trainer.data.joins.tar_groups import group_hash
from threetowers.trainer.data.joins.text_join import DrawnRows, TextJoin, no_caption, other_captions
from threetowers.trainer.data.joins.visit import Visit
from threetowers.trainer.data.row_batches import BatchOfRows, RowReader, RowSegment, is_rows_alone
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.sampler import RandomAccessSampler, SampleAddress
from threetowers.trainer.data.streaming import (
    READ_AHEAD,
    StreamedSample,
    StreamSampler,
    StreamSegment,
    StreamStep,
    read_segment,
)
from threetowers.trainer.data.transforms import augment, random_crop
from threetowers.trainer.data.worker_plan import WorkerPlan, plan_workers


class TrainingSample(NamedTuple):
    """One sample, ready for a batch.

    Attributes:
        image: (3, S, S) uint8; None in a run without an image tower, such as LiT, which decodes no image.
        captions: Those that are drawn of its captions; None in a run that reads no words.
        rows: By cached tower, its embedding (D,), of text those of its captions (k, D); None where it has none.
        num_captions: How many captions are drawn, k, whether as words or as rows; 1 where no row tells.
        group: Hash of the name of its group.
        notes: What was tolerated in its image and its annotation, as short phrases.
    """

    image: Tensor | None
    captions: tuple[str, ...] | None
    rows: dict[str, CachedRow | None]
    num_captions: int
    group: int
    notes: tuple[str, ...] = ()


class LoaderFailure(NamedTuple):
    """An error of tars or caches, which ends the run."""

    error: Exception


FATAL = (BadTar, ManifestError, OSError)

# Workers return errors, because an exception would arrive wrapped in the worker's traceback
LoadedSample = TrainingSample | BadSample | LoaderFailure


class TrainingSampleReader:
    """Reads and prepares samples. What is random in a sample depends on (seed, epoch, index) alone."""

    def __init__(self, config: TrainConfig, samples: SampleSet) -> None:
        """Set up the reader of a run's samples."""
        self._config = config
        self._samples = samples
        self._augments = config.data.augment != Augment()
        self._crops = config.data.crop_scale < 1

    def read(self, epoch: int, index: int) -> TrainingSample:
        """Return a sample by random access.

        Raises:
            BadSample: The sample cannot be used.
        """
        samples = self._samples
        tar_number, ordinal = samples.address(index)
        visit = samples.visit(epoch, index)
        return self.prepare(
            visit,
            read=functools.partial(read_member, samples.tars[tar_number], ordinal),
            stored_row=lambda tower: samples.caches[tower].stored_row(tar_number, ordinal, visit),
        )

    def prepare(self, visit: Visit, read: Callable[[str], bytes], stored_row: Callable[[str], Any]) -> TrainingSample:
        """Return a sample from its members.

        Args:
            visit: The visit of its component's epoch.
            read: Gives the bytes of a member by its extension.
            stored_row: Gives what is stored for the visit in the cache of a tower, see `CacheJoin.stored_row`.

        Raises:
            BadSample: The sample cannot be used.
        """
        samples, data = self._samples, self._config.data
        tar_number, ordinal = samples.address(visit.index)
        tar = samples.tars[tar_number]
        members = SampleMembers(tar, ordinal, read, visit.captions, data.max_pixels)
        rng = visit.rng() if samples.reads_images and (self._crops or self._augments) else None

        # The captions, which are drawn before anything else
        captions = tuple(members.captions(visit, rng)) if samples.reads_words else None
        stored = {tower: stored_row(tower) for tower in samples.caches}
        num_captions = self._draw_cached(visit, stored, members, rng) if captions is None else len(captions)

        image = None
        if samples.reads_images:
            if self._crops and rng is not None:
                image = random_crop(members.image, data.side, data.crop_scale, rng)
            else:
                image = samples.view_image(visit.index, visit.view, members.image, data.side)
            if self._augments and rng is not None:
                image = augment(image, data.augment, rng)

        rows = {}
        for tower, join in samples.caches.items():
            try:
                rows[tower] = join.with_fallback(stored[tower], tar_number, visit, members)
            except MissingRow as error:
                raise BadSample(f"{tar.location}: sample {tar.samples[ordinal].key!r}: {error}") from error

        group = members.group(samples.component_of(tar_number).group_field)
        return TrainingSample(image, captions, rows, num_captions, group_hash(group), tuple(members.notes))

    def _draw_cached(
        self, visit: Visit, stored: Mapping[str, Any], members: SampleMembers, rng: np.random.Generator | None
    ) -> int:
        """Check that all caches of text hold the drawn captions, and take these from the random numbers.

        Words are read only where one of the caches lacks the sample, and its teacher has to embed them.

        Returns:
            How many captions are drawn; 1 where nothing tells, as no cache holds the sample.

        Raises:
            BadSample: There is no caption that the run draws from.
            ManifestError: The caches hold different captions.
        """
        drawn = {tower: rows for tower, rows in stored.items() if isinstance(rows, DrawnRows)}
        is_read = any(
            stored[tower] is None and isinstance(join, TextJoin) and join.on_missing_row == "live"
            for tower, join in self._samples.caches.items()
        )
        num_captions = len(members.captions(visit, rng)) if is_read else 1
        if not drawn:
            return num_captions
        first, rows = next(iter(drawn.items()))
        if not rows.numbers:
            raise no_caption(members.tar, members.ordinal, visit.captions)
        for tower, other in drawn.items():
            if other.caption_hashes != rows.caption_hashes:
                raise other_captions(members.tar, members.ordinal, first, tower)
        if rng is not None and not is_read:
            visit.places(rows.counts, rng)
        return len(rows.numbers)


class TarDataset(Dataset[Any]):
    """A torch dataset of a run's samples.

    Workers that are not forks of this process map its index of the tars from a file: a node's workers may be a hundred,
    and an index takes some hundred bytes a sample.
    """

    def __init__(self, config: TrainConfig, samples: SampleSet) -> None:
        """Set up the dataset of a run's samples."""
        self._config = config
        self._samples = samples
        self._reader = TrainingSampleReader(config, samples)
        self._rows = RowReader(samples)
        self._mapped: MappedPickle[tuple[TrainConfig, SampleSet]] | None = None

    def __reduce__(self) -> tuple[Callable[..., "TarDataset"], tuple[object, ...]]:
        """Pickle as a file that is written once."""
        if self._mapped is None:
            self._mapped = MappedPickle((self._config, self._samples))
        return _load_dataset, (type(self), self._mapped)


def _load_dataset(kind: type[TarDataset], mapped: "MappedPickle[tuple[TrainConfig, SampleSet]]") -> TarDataset:
    return kind(*mapped.load())


class RandomAccessDataset(TarDataset):
    """A torch dataset of single samples by their address."""

    def __getitem__(self, address: SampleAddress) -> LoadedSample:
        """Return the sample at an address."""
        try:
            return self._reader.read(*address)
        except BadSample as error:
            return error
        except FATAL as error:
            return LoaderFailure(error)


def buffer_size(config: TrainConfig, samples: SampleSet) -> int:
    """Return how many samples the shuffle buffer of a stream holds."""
    return max(1, config.data.shuffle_buffer // samples.num_streams)


def segment_rng(seed: int, stream: int, component: int, segment: StreamSegment) -> np.random.Generator:
    """Return the random numbers of the shuffle buffer of a stream in an epoch of a component."""
    return np.random.default_rng([seed, segment.epoch, component, stream, 1])


class SequentialDataset(TarDataset):
    """A torch dataset of the samples of streams, which it keeps open from step to step."""

    def __init__(self, config: TrainConfig, samples: SampleSet) -> None:
        """Set up the dataset of a run's samples."""
        super().__init__(config, samples)
        self._buffer_size = buffer_size(config, samples)
        self._read_ahead = max(4, READ_AHEAD // samples.num_streams)
        self._open: dict[tuple[int, int], Iterator[StreamedSample]] = {}  # by stream and component

    def __getitems__(self, steps: Sequence[StreamStep]) -> list[LoadedSample]:
        """Return the next samples of some streams."""
        try:
            return list(itertools.chain.from_iterable(map(self._read, steps)))
        except FATAL as error:
            return [LoaderFailure(error)]

    def _read(self, step: StreamStep) -> list[LoadedSample]:
        for component, segment in step.segments.items():
            rng = segment_rng(self._config.seed, step.stream, component, segment)
            self._open[step.stream, component] = read_segment(
                self._samples, segment, self._buffer_size, rng, self._read_ahead
            )
        loaded: list[LoadedSample] = []
        for component in step.components:
            sample = next(self._open[step.stream, component])
            read = functools.partial(self._member, sample)
            try:
                loaded.append(self._reader.prepare(sample.visit, read, sample.rows.__getitem__))
            except BadSample as error:
                loaded.append(error)
        return loaded

    def _member(self, sample: StreamedSample, extension: str) -> bytes:
        """Return a member that was streamed; one that was not, by random access, which tells why."""
        if extension in sample.members:
            return sample.members[extension]
        tar_number, ordinal = self._samples.address(sample.visit.index)
        return read_member(self._samples.tars[tar_number], ordinal, extension)


class RandomAccessRows(TarDataset):
    """A torch dataset of batches of rows alone, by the addresses of their samples."""

    def __getitems__(self, addresses: Sequence[SampleAddress]) -> Batch | LoaderFailure:
        """Return the batch of the samples at some addresses."""
        try:
            return self._rows.read(addresses)
        except FATAL as error:
            return LoaderFailure(error)


class SequentialRows(TarDataset):
    """A torch dataset of batches of rows alone of streams, which it keeps open from step to step."""

    def __init__(self, config: TrainConfig, samples: SampleSet) -> None:
        """Set up the dataset of a run's samples."""
        super().__init__(config, samples)
        self._open: dict[tuple[int, int], RowSegment] = {}  # by stream and component

    def __getitems__(self, steps: Sequence[StreamStep]) -> Batch | LoaderFailure:
        """Return the batch of the next samples of some streams."""
        batch = BatchOfRows(self._samples, sum(len(step.components) for step in steps))
        first = 0
        try:
            for step in steps:
                self._begin(step)
                layout = np.array(step.components)
                for component in np.unique(layout).tolist():
                    positions = first + np.flatnonzero(layout == component)
                    self._open[step.stream, component].put(batch, positions)
                first += len(layout)
            return batch.finish()
        except FATAL as error:
            return LoaderFailure(error)

    def _begin(self, step: StreamStep) -> None:
        """Open the segments that begin, or are resumed, with a step."""
        for component, segment in step.segments.items():
            rng = segment_rng(self._config.seed, step.stream, component, segment)
            size = buffer_size(self._config, self._samples)
            self._open[step.stream, component] = RowSegment(self._samples, self._rows, segment, size, rng)


class Collator:
    """Puts samples into a batch, and lists those that cannot be used."""

    def __init__(self, config: TrainConfig, samples: SampleSet, tokenizer: Tokenizer | None) -> None:
        """Set up the collator of a run's samples."""
        self._config = config
        self._dims = {name: join.cache.dim for name, join in samples.caches.items()}
        self._tokenizer = tokenizer
        self._pad_id = 0 if tokenizer is None else tokenizer.special.pad

    def __call__(self, loaded: Sequence[LoadedSample]) -> Batch | LoaderFailure:
        """Return the batch of some samples, or the first failure."""
        for sample in loaded:
            if isinstance(sample, LoaderFailure):
                return sample
        good = [sample for sample in loaded if isinstance(sample, TrainingSample)]
        notes = tuple(itertools.chain.from_iterable(sample.notes for sample in good))
        bad = tuple(str(sample) for sample in loaded if isinstance(sample, BadSample))
        reasons = tuple(sample.reason for sample in loaded if isinstance(sample, BadSample))
        inputs: dict[str, Tensor] = {}
        present: dict[str, Tensor] = {}
        if not good:
            return Batch(inputs, present, torch.empty(0, dtype=torch.int64), bad, reasons=reasons, pad_id=self._pad_id)
        for name, tower in self._config.towers.items():
            if isinstance(tower, CacheTower):
                inputs[name] = torch.from_numpy(self._cached_rows(name, good))
                if tower.on_missing_row == "mask":
                    present[name] = torch.tensor([sample.rows[name] is not None for sample in good])
            elif tower.reads == "images":
                inputs[name] = torch.stack([sample.image for sample in good if sample.image is not None])
            else:
                assert self._tokenizer is not None
                captions = [caption for sample in good for caption in sample.captions or ()]
                inputs[name] = self._tokenizer.encode(
                    captions, self._config.data.context_length, self._config.caption_padding
                )
        groups_b = torch.tensor([sample.group for sample in good])
        owner_m = None
        if self._config.data.captions_per_sample > 1:
            owner_m = owners([sample.num_captions for sample in good])
        return Batch(inputs, present, groups_b, bad, notes, reasons, self._pad_id, owner_m)

    def _cached_rows(self, tower: str, samples: Sequence[TrainingSample]) -> CachedRow:
        """Return the rows of a cached tower for some samples, zeros in place of missing ones."""
        of_text = self._config.side_of(tower) == "text"
        rows = []
        for sample in samples:
            found = sample.rows[tower]
            if found is None:
                found = np.zeros((sample.num_captions if of_text else 1, self._dims[tower]), np.float32)
            rows.append(found if of_text else found.reshape(1, -1))
        return np.concatenate(rows)


class TrainingBatches:
    """The batches of one rank for some steps, made by worker processes. Each iteration begins at the first."""

    def __init__(
        self,
        loader: "DataLoader[LoadedSample]",
        parts: int,
        steps: int,
        samples: int,
        most_captions: Mapping[str, int] | None = None,
    ) -> None:
        """Set up the batches.

        Args:
            loader: Gives their parts.
            parts: Into how many parts each is cut.
            steps: How many batches there are.
            samples: The samples of each.
            most_captions: The most rows that a sample has in the inputs of a tower, where that is not one.
        """
        self._loader = loader
        self._parts = parts
        self._steps = steps
        self._samples = samples
        self._most_captions = dict(most_captions or {})

    def __len__(self) -> int:
        """Return the number of steps."""
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batch of each step. Beside a GPU a thread joins its parts, in pinned memory.

        Raises:
            BadTar, ManifestError, OSError: Tars or caches have changed since they were opened, or cannot be read.
        """
        with loading(self._loader) as loaded:  # in the main thread, which torch tells of a worker's end by a signal
            if not torch.cuda.is_available():
                yield from self._joined(loaded, pin_memory=False)
                return
            with contextlib.closing(prefetch(self._joined(loaded, pin_memory=True), depth=1)) as batches:
                yield from batches

    def _joined(self, loaded: Iterator[Batch | LoaderFailure], pin_memory: bool) -> Iterator[Batch]:
        for _ in range(self._steps):
            parts = map(_checked, itertools.islice(loaded, self._parts))
            if self._parts == 1 and not pin_memory:
                yield next(parts)  # as it is, in shared memory
            else:
                yield join_parts(parts, self._samples, pin_memory, self._most_captions)


def _checked(part: Batch | LoaderFailure) -> Batch:
    """Return a part, or raise the error in its place."""
    if isinstance(part, LoaderFailure):
        raise part.error
    return part


def training_loader(
    config: TrainConfig,
    samples: SampleSet,
    tokenizer: Tokenizer | None,
    rank: int,
    world_size: int,
    start: int,
    stop: int,
    plan: WorkerPlan | None = None,
) -> TrainingBatches:
    """Return this rank's batches of the steps start .. stop-1.

    The samples of a step depend on (seed, step) alone: a run that is resumed at `start` sees the same samples as an
    uninterrupted one.

    Args:
        config: The run's config.
        samples: Its samples.
        tokenizer: Its tokenizer; None in a run without a text tower of its own.
        rank: Number of this process.
        world_size: Number of processes.
        start: The first step.
        stop: The step after the last one.
        plan: How workers share the batches; None: as for ranks of which each has a machine of its own.

    Raises:
        ConfigError: The streams of sequential access cannot be divided among the ranks.
        ValueError: The global batch cannot be divided among the ranks.
    """
    plan = plan or plan_workers(config, samples, World(rank, world_size, local_rank=0, local_size=1))
    rows_alone = is_rows_alone(samples)
    dataset: Dataset[Any]
    sampler: RandomAccessSampler | StreamSampler
    if samples.sequential:
        sampler = StreamSampler(samples, config.seed, samples.num_streams, rank, world_size, plan.parts, start, stop)
        dataset = (SequentialRows if rows_alone else SequentialDataset)(config, samples)
    else:
        numbers = range(len(samples.components))
        indices_of = [functools.partial(samples.epoch_indices, component=number) for number in numbers]
        counts = [component.samples_per_batch for component in samples.components]
        sampler = RandomAccessSampler(config.seed, indices_of, counts, rank, world_size, start, stop, plan.parts)
        dataset = (RandomAccessRows if rows_alone else RandomAccessDataset)(config, samples)
    collate: Callable[[Any], Any] = _as_it_is if rows_alone else Collator(config, samples, tokenizer)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=plan.workers,
        prefetch_factor=plan.ahead or None,
        multiprocessing_context=worker_context() if plan.workers else None,
        worker_init_fn=functools.partial(_begin_worker, worker_beginning()),
    )
    most_captions = {name: config.captions_of(name) for name in config.towers}
    return TrainingBatches(loader, plan.parts, stop - start, config.global_batch_size // world_size, most_captions)


def _as_it_is(batch: Batch | LoaderFailure) -> Batch | LoaderFailure:
    """Return what a dataset of whole batches gives."""
    return batch


def _begin_worker(beginning: Callable[[int], None], worker: int) -> None:
    """Ignore SIGTERM and Ctrl-C in a worker: every process gets them, and the last step still needs the workers.

    They end with the loader, or when their parent is gone.
    """
    beginning(worker)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a thread a core in every worker would be too many
    ignore_sigterm()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
