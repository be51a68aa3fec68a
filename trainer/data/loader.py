"""From sample addresses to batches: image bytes, tokens, cached rows, concepts."""

import functools
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from threetowers.trainer.config import Run
from threetowers.trainer.data.join import NoRow
from threetowers.trainer.data.order import RankBatches
from threetowers.trainer.data.samples import BadSample, SampleSet, annotation, concept, image
from threetowers.trainer.data.view import random_crop
from threetowers.trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. `inputs`: one tensor per tower, by its name."""

    inputs: dict[str, Tensor]  # images (b, 3, S, S) uint8, tokens (b, L) int64, cached rows (b, D) float32
    present: dict[str, Tensor]  # (b,) bool for each tower that some samples may lack (on_bad_row: mask)
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


class Item(NamedTuple):
    image: Tensor | None  # None in a run without an image tower (LiT): the picture is then never decoded
    caption: str
    rows: dict[str, npt.NDArray[np.float32] | None]  # by cached tower; None where the sample has no row
    concept: int


class TrainingItems(Dataset[Item | BadSample]):
    """Reads one sample by (epoch, index). What is random in it depends on (seed, epoch, index) alone.

    A sample that cannot be read comes back as the reason: raised in a worker, it would arrive wrapped in tracebacks.
    """

    def __init__(self, run: Run, samples: SampleSet) -> None:
        self._run = run
        self._samples = samples
        self._sees_images = bool(run.towers_of("timm"))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, address: tuple[int, int]) -> Item | BadSample:
        epoch, index = address
        try:
            return self._read(epoch, index)
        except BadSample as error:
            return error

    def _read(self, epoch: int, index: int) -> Item:
        number, ordinal = self._samples.address(index)
        tar, data, samples = self._samples.tars[number], self._run.data, self._samples
        rng = np.random.default_rng([self._run.seed, epoch, index])
        text = annotation(tar, ordinal)
        caption = text.captions[rng.integers(len(text.captions))]
        view = epoch % samples.views.count
        decode = functools.cache(lambda: image(tar, ordinal, data.max_pixels))
        pixels = None
        if self._sees_images:
            cropped = data.crop_scale < 1
            pixels = (
                random_crop(decode(), data.image_size, data.crop_scale, rng)
                if cropped
                else samples.picture(index, view, decode(), data.image_size)
            )
        try:
            rows = {name: join.training_row(number, ordinal, view, decode) for name, join in samples.caches.items()}
        except NoRow as error:
            raise BadSample(f"{tar.location}: sample {tar.samples[ordinal].key!r}: {error}") from error
        return Item(pixels, caption, rows, concept_hash(concept(tar, ordinal, text, data.concept_field)))


def concept_hash(name: str) -> int:
    """Return a 64-bit signed hash of a concept's name."""
    return int(np.uint64(xxhash.xxh3_64_intdigest(name.encode())).astype(np.int64))


class Collate:
    """Puts items into a batch, and names those that could not be read."""

    def __init__(self, run: Run, samples: SampleSet, tokenizer: Tokenizer) -> None:
        self._run = run
        self._dims = {name: join.cache.dim for name, join in samples.caches.items()}
        self._tokenizer = tokenizer

    def __call__(self, items: Sequence[Item | BadSample]) -> Batch:
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
                inputs[name] = self._tokenizer.encode([item.caption for item in good], self._run.data.context)
            else:
                inputs[name], has_b = self._rows([item.rows[name] for item in good], self._dims[name])
                if tower.on_bad_row == "mask":
                    present[name] = has_b
        concepts_b = torch.tensor([item.concept for item in good])
        return Batch(inputs, present, concepts_b, bad)

    @staticmethod
    def _rows(rows: Sequence[npt.NDArray[np.float32] | None], dim: int) -> tuple[Tensor, Tensor]:
        """(b, D) rows, zeros where there is none, and (b,) bool which are there."""
        nothing = np.zeros(dim, np.float32)
        stacked = np.stack([nothing if row is None else row for row in rows])
        return torch.from_numpy(stacked), torch.tensor([row is not None for row in rows])


def training_loader(
    run: Run, samples: SampleSet, tokenizer: Tokenizer, rank: int, ranks: int, start: int, stop: int
) -> "DataLoader[Item | BadSample]":
    """Return a loader of this rank's batches for the steps start .. stop-1.

    The samples of a step depend on (seed, step) alone; a run resumed at `start` sees what an undisturbed one would.
    """
    return DataLoader(
        TrainingItems(run, samples),
        batch_sampler=RankBatches(run.seed, samples.visited, run.batch, rank, ranks, start, stop),
        collate_fn=Collate(run, samples, tokenizer),
        num_workers=run.data.workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if run.data.workers else None,
        worker_init_fn=_leave_sigterm_to_the_trainer,
    )


def _leave_sigterm_to_the_trainer(worker: int) -> None:
    """A scheduler sends SIGTERM to every process: workers must serve on until the last checkpoint is written.

    They end with the loader, or when their parent is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
