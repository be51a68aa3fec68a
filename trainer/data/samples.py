"""The samples of a set of tars by address, and what one sample holds: an image, captions, fields."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from threetowers.cache.images import BadImage, decode_rgb
from threetowers.cache.tars import TarIndex, expand, index_tar, read_member
from threetowers.cache.views import Views
from threetowers.trainer.config import CacheTower, ConfigError, Run
from threetowers.trainer.data.finished import FinishedTars, wait_until_built
from threetowers.trainer.data.join import CacheJoin
from threetowers.trainer.data.order import Indices
from threetowers.trainer.data.view import center, mirrored, stored_crop

DONE_SO = {"mask": "left out of the terms with", "live": "computed by the teacher of"}  # on_bad_row, in words
Floats = npt.NDArray[np.float32]


class BadSample(ValueError):
    """A sample that cannot be used. The message names its tar and key."""


@dataclass(frozen=True)
class Annotation:
    """The text side of one sample."""

    captions: tuple[str, ...]
    fields: Mapping[str, Any]  # the JSON member; empty where there is none


def annotation(tar: TarIndex, ordinal: int) -> Annotation:
    """Return a sample's captions and fields, from its `.json` member (`captions` or `caption`) or its `.txt` member.

    Raises BadSample when there is no caption or the member is not what its name says.
    """
    members = tar.samples[ordinal].members
    fields: dict[str, Any] = {}
    captions: Any = []
    try:
        if "txt" in members:
            captions = [read_member(tar, ordinal, "txt").decode()]
        if "json" in members:
            fields = json.loads(read_member(tar, ordinal, "json"))
            if not isinstance(fields, dict):
                raise ValueError(f"the json member holds a {type(fields).__name__}, expected an object")
            captions = fields.get("captions", fields.get("caption", captions))
    except ValueError as error:  # of UTF-8 or JSON
        raise BadSample(f"{_name(tar, ordinal)}: {error}") from error
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadSample(f"{_name(tar, ordinal)}: captions are {captions!r}, expected a list of strings")
    captions = tuple(c.strip() for c in captions if c.strip())
    if not captions:
        raise BadSample(
            f"{_name(tar, ordinal)}: no caption; expected a .txt member, or a .json member with `captions`, "
            f"found members {sorted(members)}"
        )
    return Annotation(captions, fields)


def image(tar: TarIndex, ordinal: int, max_pixels: int) -> Image.Image:
    """Return a sample's decoded RGB image. Raises BadSample for one that is broken or larger than `max_pixels`."""
    sample = tar.samples[ordinal]
    try:
        return decode_rgb(read_member(tar, ordinal, sample.image), max_pixels=max_pixels)
    except BadImage as error:
        raise BadSample(f"{_name(tar, ordinal)}: {error}") from error


def concept(tar: TarIndex, ordinal: int, text: Annotation, field: str | None) -> str:
    """Return the name of what a sample shows: its `field`, or its own key where no field is asked for."""
    if field is None:
        return f"{tar.location}:{ordinal}"
    if field not in text.fields:
        raise BadSample(
            f"{_name(tar, ordinal)}: no field {field!r} in its json member (found {sorted(text.fields)}); "
            "see data.concept_field"
        )
    return str(text.fields[field])


class SampleSet:
    """The samples of some tars, each with its index: 0 .. total-1 in the order of the tars. Caches by tower name.

    Which of them an epoch visits depends on the policy that each cache has for rows without an embedding, and, in a run
    on a cache that is still being built, on the tars that were finished when the epoch began.
    """

    def __init__(
        self, tars: Sequence[TarIndex], caches: Mapping[str, CacheJoin], finished: FinishedTars | None = None
    ) -> None:
        """Raises ConfigError if the caches hold different views."""
        self.tars = list(tars)
        self.caches = dict(caches)
        self.views = _agreed_views(self.caches)
        self.left_out: Counter[str] = Counter()  # of the epoch last asked for
        self.without_row: Counter[str] = Counter()  # of the same, but trained on
        self._finished = finished
        self._firsts = np.cumsum([0, *(len(tar.samples) for tar in self.tars)], dtype=np.int64)
        self._visited: tuple[list[int], Indices] | None = None

    @property
    def total(self) -> int:
        """Samples in the tars, usable or not."""
        return int(self._firsts[-1])

    def __len__(self) -> int:
        """Samples that durations count as an epoch: those that can be used, or all where it is too early to know."""
        return self.total if self._finished is not None else len(self.visited(0))

    def address(self, index: int) -> tuple[int, int]:
        """Return (tar number, ordinal) of a sample."""
        number = int(np.searchsorted(self._firsts, index, "right")) - 1
        return number, index - int(self._firsts[number])

    def visited(self, epoch: int) -> Indices:
        """Return the indices of the samples that an epoch visits. Collective where a cache is still being built.

        Raises BadSample if a cache holds no good row for some sample and its policy is "error".
        """
        numbers = self._numbers(epoch)
        if self._visited is None or self._visited[0] != numbers:
            self.left_out.clear()
            self.without_row.clear()
            usable = [self._firsts[number] + self._usable(number) for number in numbers]
            self._visited = numbers, np.concatenate([*usable, np.empty(0, np.int64)])
        return self._visited[1]

    def moments(self, tower: str) -> tuple[Floats, Floats]:
        """Return mean and standard deviation (D,) of a cached tower's features over the tars of the first epoch."""
        return self.caches[tower].moments(self._numbers(0))

    def picture(self, index: int, view: int, image: Image.Image, size: int) -> Tensor:
        """Return a sample's picture (3, size, size) as the caches saw it in this view; its centre without caches."""
        if not self.views.cropped:
            return mirrored(center(image, size)) if view else center(image, size)
        number, ordinal = self.address(index)
        return stored_crop(image, size, next(iter(self.caches.values())).crop(number, ordinal, view, image.size))

    def _numbers(self, epoch: int) -> list[int]:
        return list(range(len(self.tars))) if self._finished is None else self._finished.of(epoch)

    def _usable(self, number: int) -> Indices:
        good = np.ones(len(self.tars[number].samples), bool)
        for name, join in self.caches.items():
            good_rows = join.good_rows(number)
            if join.on_bad_row == "error" and not good_rows.all():
                ordinal = int(np.flatnonzero(~good_rows)[0])
                raise BadSample(
                    f"{_name(self.tars[number], ordinal)}: the cache of tower {name!r} has no embedding for it "
                    f"({np.count_nonzero(~good_rows)} such samples in this tar); repair the tar and rebuild, or set "
                    f"towers.{name}.on_bad_row: skip, mask or live"
                )
            if join.on_bad_row in ("mask", "live"):
                self.without_row[f"{DONE_SO[join.on_bad_row]} {name!r}"] += int(np.count_nonzero(~good_rows))
                if join.on_bad_row == "live" and not good_rows.all():
                    join.load_teacher()  # here, before workers start: they share it, and it may be missing
                continue
            self.left_out[f"no embedding in {name!r}"] += int(np.count_nonzero(good & ~good_rows))
            good &= good_rows
        return np.flatnonzero(good).astype(np.int64)


def open_samples(run: Run, folder: Path) -> SampleSet:
    """Return the samples of a run with their caches, once as much is built as `data.unbuilt_tars` asks for. Collective.

    `folder`: of the run; where the tars of each epoch are pinned. Raises BadSample, BadTar, ConfigError or
    ContractError for tars and caches that do not fit the run.
    """
    tars = [index_tar(path) for path in expand(run.data.tars)]
    caches = {
        name: CacheJoin.of(tower, tars, unbuilt=run.data.unbuilt_tars != "error")
        for name, tower in run.towers.items()
        if isinstance(tower, CacheTower)
    }
    joins, finished = list(caches.values()), None
    if joins and run.data.unbuilt_tars == "wait":
        wait_until_built(joins)
    if joins and run.data.unbuilt_tars == "leave_out":
        finished = FinishedTars(folder / "finished-tars.jsonl", joins, run.batch)
    samples = SampleSet(tars, caches, finished)
    samples.visited(0)  # refuses what it must before anything else is set up
    return samples


def _agreed_views(caches: Mapping[str, CacheJoin]) -> Views:
    found = {name: join.cache.contract.views for name, join in caches.items()}
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"towers: caches of different views: {', '.join(f'{name}: {views}' for name, views in found.items())}; the "
            "picture of an epoch can be that of one only: build them with the same --views, seed and scale"
        )
    return next(iter(found.values()), Views())


def _name(tar: TarIndex, ordinal: int) -> str:
    return f"{tar.location}: sample {tar.samples[ordinal].key!r}"
