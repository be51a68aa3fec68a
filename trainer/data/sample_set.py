"""The samples of sets of tars by address, and what one sample holds: an image, captions, fields."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from threetowers.cache.format.views import Views
from threetowers.cache.storage.storage import is_url
from threetowers.cache.webdataset.sample import Annotation, BadSample
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.trainer.config import CacheTower, ConfigError, TrainConfig
from threetowers.trainer.data.cache_join import CacheJoin
from threetowers.trainer.data.crops import center, mirrored, stored_crop
from threetowers.trainer.data.epoch_snapshot import FinishedTars, wait_until_built
from threetowers.trainer.data.sampler import Indices, shares, too_few
from threetowers.trainer.data.tar_headers import index_sets

DONE_SO = {"mask": "left out of the terms with", "live": "computed by the teacher of"}  # on_missing_row, in words
Floats = npt.NDArray[np.float32]


def concept(tar: TarIndex, ordinal: int, text: Annotation, field: str | None) -> str:
    """Return the name of what a sample shows: its `field`, or its own key where no field is asked for."""
    if field is None:
        return f"{tar.location}:{ordinal}"
    if field not in text.fields:
        raise BadSample(
            f"{_name(tar, ordinal)}: no field {field!r} in its json member (found {sorted(text.fields)}); "
            "see data.group_field"
        )
    return str(text.fields[field])


@dataclass(frozen=True)
class Part:
    """One of the sets of tars that a run mixes."""

    name: str  # empty where it is the only one
    tars: range  # their numbers in the run's list
    share: int = 1  # samples of it in every global batch
    group_field: str | None = None
    finished: FinishedTars | None = None  # where its caches are still being built


class Visit(NamedTuple):
    """What an epoch visits of a part, and what became of the rest."""

    numbers: list[int]  # of its tars
    indices: Indices
    left_out: Counter[str]
    without_row: Counter[str]  # visited all the same


class SampleSet:
    """The samples of some tars, each with its index: 0 .. total-1 in the order of the tars. Caches by tower name.

    Which of them an epoch visits depends on the policy that each cache has for rows without an embedding, and, in a run
    on a cache that is still being built, on the tars that were finished when the epoch began. Each part has epochs of
    its own.
    """

    def __init__(
        self,
        tars: Sequence[TarIndex],
        caches: Mapping[str, CacheJoin],
        parts: Sequence[Part] | None = None,
        streamed: bool = False,
    ) -> None:
        """`streamed`: not for random access. Raises ConfigError if the caches hold different views."""
        self.tars = list(tars)
        self.caches = dict(caches)
        self.parts = list(parts) if parts is not None else [Part("", range(len(self.tars)))]
        self.streamed = streamed
        self.views = _agreed_views(self.caches)
        self._firsts = np.cumsum([0, *(len(tar.samples) for tar in self.tars)], dtype=np.int64)
        self._part_of = np.repeat(np.arange(len(self.parts)), [len(part.tars) for part in self.parts])
        self._visits: dict[int, Visit] = {}  # the last of each part

    @property
    def total(self) -> int:
        """Samples in the tars, usable or not."""
        return int(self._firsts[-1])

    @property
    def left_out(self) -> Counter[str]:
        """Samples that the epoch last asked for leaves out, by reason."""
        return sum((visit.left_out for visit in self._visits.values()), Counter())

    @property
    def without_row(self) -> Counter[str]:
        """Samples that it visits though a cache has no row for them, by what is done so."""
        return sum((visit.without_row for visit in self._visits.values()), Counter())

    def __len__(self) -> int:
        """Samples that durations count as an epoch: those that can be used, or all where it is too early to know."""
        return sum(map(self.length, range(len(self.parts))))

    def length(self, number: int) -> int:
        """Those of one part."""
        part = self.parts[number]
        if part.finished is None:
            return len(self.visited(0, number))
        return int(self._firsts[part.tars.stop] - self._firsts[part.tars.start])

    def notes(self) -> list[str]:
        """Return lines for the start-up page: which sets are mixed, and how all are read."""
        batch = sum(part.share for part in self.parts)
        sets = [
            f"set {part.name}: {part.share:,} of each batch of {batch:,}, from {self.length(number):,} usable samples "
            f"in {len(part.tars)} tars"
            for number, part in enumerate(self.parts)
            if part.name
        ]
        return [*sets, "read: tar after tar, in lanes"] if self.streamed else sets

    def seen(self, steps: int) -> dict[str, float]:
        """Return metrics of a mixture: samples of each set in so many steps, and epochs of it."""
        found = {}
        for number, part in enumerate(self.parts):
            if part.name:
                found[f"datasets/{part.name}/samples"] = float(steps * part.share)
                found[f"datasets/{part.name}/epoch"] = steps / max(1, self.length(number) // part.share)
        return found

    def address(self, index: int) -> tuple[int, int]:
        """Return (tar number, ordinal) of a sample."""
        number = int(self.tar_numbers(index))
        return number, index - int(self._firsts[number])

    def tar_numbers(self, indices: Indices | int) -> Indices:
        """Return the number of the tar of each sample."""
        return np.searchsorted(self._firsts, indices, "right") - 1

    def by_tar(self, indices: Indices) -> Iterator[tuple[int, list[int]]]:
        """Yield (tar number, ordinals) of each run of samples from one tar."""
        numbers = self.tar_numbers(indices)
        for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(numbers)) + 1):
            number = int(numbers[run[0]])
            yield number, (indices[run] - self._firsts[number]).tolist()

    def index(self, number: int, ordinal: int) -> int:
        """Return the index of a sample by its address."""
        return int(self._firsts[number]) + ordinal

    def part_of(self, number: int) -> Part:
        """Return the part that a tar belongs to."""
        return self.parts[int(self._part_of[number])]

    def view(self, epoch: int) -> int:
        """Return the view of the caches that an epoch shows."""
        return epoch % self.views.count

    def visited(self, epoch: int, part: int = 0) -> Indices:
        """Return the indices of the samples that an epoch visits. Collective where a cache is still being built.

        Raises BadSample if a cache holds no good row for some sample and its policy is "error".
        """
        numbers = self._numbers(epoch, self.parts[part])
        if part not in self._visits or self._visits[part].numbers != numbers:
            left_out, without_row = Counter[str](), Counter[str]()
            usable = [self._firsts[number] + self._usable(number, left_out, without_row) for number in numbers]
            indices = np.concatenate([*usable, np.empty(0, np.int64)])
            self._visits[part] = Visit(numbers, indices, left_out, without_row)
        return self._visits[part].indices

    def moments(self, tower: str) -> tuple[Floats, Floats]:
        """Return mean and standard deviation (D,) of a cached tower's features over the tars of the first epoch."""
        return self.caches[tower].moments([n for part in self.parts for n in self._numbers(0, part)])

    def picture(self, index: int, view: int, image: Image.Image, size: int) -> Tensor:
        """Return a sample's picture (3, size, size) as the caches saw it in this view; its centre without caches."""
        if not self.views.cropped:
            return mirrored(center(image, size)) if view else center(image, size)
        number, ordinal = self.address(index)
        return stored_crop(image, size, next(iter(self.caches.values())).crop(number, ordinal, view, image.size))

    def _numbers(self, epoch: int, part: Part) -> list[int]:
        return list(part.tars) if part.finished is None else part.finished.of(epoch)

    def _usable(self, number: int, left_out: Counter[str], without_row: Counter[str]) -> Indices:
        good = np.ones(len(self.tars[number].samples), bool)
        for name, join in self.caches.items():
            good_rows = join.good_rows(number)
            if join.on_missing_row == "error" and not good_rows.all():
                ordinal = int(np.flatnonzero(~good_rows)[0])
                raise BadSample(
                    f"{_name(self.tars[number], ordinal)}: the cache of tower {name!r} has no embedding for it "
                    f"({np.count_nonzero(~good_rows)} such samples in this tar); repair the tar and rebuild, or set "
                    f"towers.{name}.on_missing_row: skip, mask or live"
                )
            if join.on_missing_row in ("mask", "live"):
                without_row[f"{DONE_SO[join.on_missing_row]} {name!r}"] += int(np.count_nonzero(~good_rows))
                if join.on_missing_row == "live" and not good_rows.all():
                    join.load_teacher()  # here, before workers start: they share it, and it may be missing
                continue
            left_out[f"no embedding in {name!r}"] += int(np.count_nonzero(good & ~good_rows))
            good &= good_rows
        return np.flatnonzero(good).astype(np.int64)


def open_samples(run: TrainConfig, folder: Path) -> SampleSet:
    """Return the samples of a run with their caches, once as much is built as `data.on_incomplete_cache` asks for.

    Collective. `folder`: of the run; where the tars of each epoch are pinned. Raises BadSample, BadTar, ConfigError or
    ContractError for tars and caches that do not fit the run.
    """
    data = run.data
    tars, ranges = index_sets({name: part.tars for name, part in data.named_sets.items()}, data.index_dir)
    caches = {
        name: CacheJoin.of(tower, tars, unbuilt=data.on_incomplete_cache != "error", sets=list(ranges.values()))
        for name, tower in run.towers.items()
        if isinstance(tower, CacheTower)
    }
    joins = list(caches.values())
    if joins and data.on_incomplete_cache == "wait":
        wait_until_built(joins)
    counts = shares([part.weight for part in data.named_sets.values()], run.global_batch_size)
    parts = []
    for (name, part), numbers, share in zip(data.named_sets.items(), ranges.values(), counts, strict=True):
        finished = None
        if joins and data.on_incomplete_cache == "skip":
            pins = folder / f"finished-tars{f'-{name}' if name else ''}.jsonl"
            finished = FinishedTars(pins, joins, share, numbers)
        parts.append(Part(name, numbers, share, part.group_field or data.group_field, finished))
    streamed = data.access == "sequential" or (data.access == "auto" and any(is_url(tar.location) for tar in tars))
    if streamed and run.global_batch_size % data.num_streams:
        raise ConfigError(
            f"data.num_streams: {data.num_streams} does not divide global_batch_size {run.global_batch_size}; "
            "change one of them"
        )
    samples = SampleSet(tars, caches, parts, streamed)
    for number, opened in enumerate(parts):  # refuses what it must before anything else is set up
        if len(samples.visited(0, number)) < opened.share:
            where = f"data.sets.{opened.name}: " * bool(opened.name)
            raise ConfigError(where + too_few(opened.share, len(samples.visited(0, number))))
    return samples


def _agreed_views(caches: Mapping[str, CacheJoin]) -> Views:
    found = {name: join.cache.manifest.views for name, join in caches.items()}
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"towers: caches of different views: {', '.join(f'{name}: {views}' for name, views in found.items())}; the "
            "picture of an epoch can be that of one only: build them with the same --views, seed and scale"
        )
    return next(iter(found.values()), Views())


def _name(tar: TarIndex, ordinal: int) -> str:
    return f"{tar.location}: sample {tar.samples[ordinal].key!r}"
