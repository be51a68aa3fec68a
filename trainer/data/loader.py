"""From sample addresses to batches: image bytes, tokens, cached rows, concepts."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.preemption import ignore_sigterm
from threetowers.cache.webdataset.sample import BadSample
from threetowers.cache.webdataset.tar_index import BadTar
from threetowers.trainer.config import TrainConfig
from threetowers.trainer.data.items import Item, Items
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.sampler import Address, RankBatches
from threetowers.trainer.data.streaming import LaneStep, RankLanes, Streamed, read_segment
from threetowers.trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. `inputs`: one tensor per tower, by its name."""

    inputs: dict[str, Tensor]  # images (b, 3, S, S) uint8, tokens (b, L) int64, cached rows (b, D) float32
    present: dict[str, Tensor]  # (b,) bool for each tower that some samples may lack (on_missing_row: mask)
    concepts_b: Tensor  # int64; equal for samples that show the same thing
    bad: tuple[str, ...]  # samples of this batch that could not be read, each with its reason

    def __len__(self) -> int:
        return len(self.concepts_b)

    def pin_memory(self) -> "Batch":
        return replace(self, inputs={n: t.pin_memory() for n, t in self.inputs.items()})

    def to(self, device: torch.device) -> "Batch":
        inputs, present = (
            {n: t.to(device, non_blocking=True) for n, t in part.items()} for part in (self.inputs, self.present)
        )
        concepts_b = self.concepts_b.to(device, non_blocking=True)
        return replace(self, inputs=inputs, present=present, concepts_b=concepts_b)


def joined(parts: Sequence[Batch]) -> Batch:
    """Return the parts of a batch as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    full = [part for part in parts if len(part)] or parts[:1]
    return Batch(
        {name: _cat([part.inputs[name] for part in full]) for name in full[0].inputs},
        {name: _cat([part.present[name] for part in full]) for name in full[0].present},
        _cat([part.concepts_b for part in full]),
        tuple(reason for part in parts for reason in part.bad),
    )


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    out = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=tensors[0].is_pinned())
    return torch.cat(list(tensors), out=out)


class Failure(NamedTuple):
    """An error about tars or caches that ends the run. Raised in a worker, it would arrive wrapped in tracebacks."""

    error: Exception


FATAL = (BadTar, ManifestError, OSError)
Read = Item | BadSample | Failure


class IndexedItems(Dataset[Read]):
    """Reads one sample by (epoch, index), wherever it lies."""

    def __init__(self, run: TrainConfig, samples: SampleSet) -> None:
        self._items = Items(run, samples)

    def __getitem__(self, address: Address) -> Read:
        try:
            return self._items.read(*address)
        except FATAL as error:
            return Failure(error)


class StreamedItems(Dataset[Read]):
    """Reads samples in the order of their lanes. What the lanes hold is sent along with the epochs' first steps."""

    def __init__(self, run: TrainConfig, samples: SampleSet) -> None:
        self._items = Items(run, samples)
        self._samples = samples
        self._buffer = max(1, run.data.shuffle_buffer // run.data.num_streams)
        self._seed = run.seed
        self._reading: dict[tuple[int, int], Iterator[Streamed]] = {}

    def __getitems__(self, works: Sequence[LaneStep]) -> list[Read]:
        try:
            return [item for work in works for item in self._step(work)]
        except FATAL as error:
            return [Failure(error)]

    def _step(self, work: LaneStep) -> Iterator[Item | BadSample]:
        for part, segment in work.begins.items():
            rng = np.random.default_rng([self._seed, segment.epoch, part, work.lane, 1])
            self._reading[work.lane, part] = read_segment(self._samples, segment, self._buffer, rng)
        for part in work.parts:
            found = next(self._reading[work.lane, part])
            yield self._items.make(found.epoch, found.sample, found.members.__getitem__, found.rows.__getitem__)


class Collate:
    """Puts items into a batch, and names those that could not be read."""

    def __init__(self, run: TrainConfig, samples: SampleSet, tokenizer: Tokenizer) -> None:
        self._run = run
        self._dims = {name: join.cache.dim for name, join in samples.caches.items()}
        self._tokenizer = tokenizer

    def __call__(self, items: Sequence[Read]) -> Batch | Failure:
        for item in items:
            if isinstance(item, Failure):
                return item
        good = [item for item in items if isinstance(item, Item)]
        bad = tuple(str(item) for item in items if isinstance(item, BadSample))
        inputs: dict[str, Tensor] = {}
        present: dict[str, Tensor] = {}
        if not good:
            return Batch(inputs, present, torch.empty(0, dtype=torch.int64), bad)
        for name, tower in self._run.towers.items():
            if tower.kind == "timm":
                inputs[name] = torch.stack([item.image for item in good if item.image is not None])
            elif tower.kind == "text":
                inputs[name] = self._tokenizer.encode([item.caption for item in good], self._run.data.context_length)
            else:
                inputs[name], has_b = self._rows([item.rows[name] for item in good], self._dims[name])
                if tower.on_missing_row == "mask":
                    present[name] = has_b
        concepts_b = torch.tensor([item.concept for item in good])
        return Batch(inputs, present, concepts_b, bad)

    @staticmethod
    def _rows(rows: Sequence[npt.NDArray[np.float32] | None], dim: int) -> tuple[Tensor, Tensor]:
        """(b, D) rows, zeros where there is none, and (b,) bool which are there."""
        nothing = np.zeros(dim, np.float32)
        stacked = np.stack([nothing if row is None else row for row in rows])
        return torch.from_numpy(stacked), torch.tensor([row is not None for row in rows])


class Batches:
    """This rank's batches of some steps, made by `data.workers` processes. Each iteration starts at the first one."""

    def __init__(self, loader: "DataLoader[Read]", parts: int, steps: int) -> None:
        """`parts`: how many of what the loader gives make up a batch."""
        self._loader, self._parts, self._steps = loader, parts, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        found = iter(self._loader)
        while parts := list(itertools.islice(found, self._parts)):
            for part in parts:
                if isinstance(part, Failure):
                    raise part.error
            yield joined(parts)


def training_loader(
    run: TrainConfig, samples: SampleSet, tokenizer: Tokenizer, rank: int, ranks: int, start: int, stop: int
) -> Batches:
    """Return this rank's batches of the steps start .. stop-1.

    The samples of a step depend on (seed, step) alone; a run resumed at `start` sees what an undisturbed one would.
    Raises ConfigError for ranks that do not divide the batch, or the lanes of streams. While iterated over, the errors
    of tars and caches that have changed since they were opened.
    """
    visited = [partial(samples.visited, part=number) for number in range(len(samples.parts))]
    counts = [part.share for part in samples.parts] if len(samples.parts) > 1 else [run.global_batch_size]
    dataset: Dataset[Read]
    sampler: RankBatches | RankLanes
    if samples.streamed:
        workers = min(run.data.workers, max(1, run.data.num_streams // ranks))
        sampler = RankLanes(samples, visited, counts, run.seed, run.data.num_streams, rank, ranks, workers, start, stop)
        dataset, parts = StreamedItems(run, samples), max(1, workers)
    else:
        sampler = RankBatches(run.seed, visited, counts, rank, ranks, start, stop)
        dataset, parts, workers = IndexedItems(run, samples), 1, run.data.workers
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collate(run, samples, tokenizer),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_sigterm_to_the_trainer,
    )
    return Batches(loader, parts, stop - start)


def _leave_sigterm_to_the_trainer(worker: int) -> None:
    """A scheduler sends SIGTERM to every process: workers must serve on until the last checkpoint is written.

    They end with the loader, or when their parent is gone.
    """
    ignore_sigterm()
