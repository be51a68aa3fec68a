"""The samples of a set of tars by address, and what one sample holds: an image, captions, fields."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from threetowers.cache.images import BadImage, decode_rgb
from threetowers.cache.tars import TarIndex, read_member
from threetowers.trainer.data.join import CacheJoin


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
    """The usable samples of some tars, addressed 0 .. len-1, and the caches joined to them by tower name."""

    def __init__(self, tars: Sequence[TarIndex], caches: Mapping[str, CacheJoin], on_bad: str) -> None:
        """Raises BadSample if a cache holds no good row for some sample and `on_bad` is "error"."""
        self.tars = list(tars)
        self.caches = dict(caches)
        self.left_out: Counter[str] = Counter()
        self.total = sum(len(tar.samples) for tar in tars)
        usable = [self._usable(number, on_bad) for number in range(len(self.tars))]
        self.tar_N: npt.NDArray[np.int32] = np.repeat(
            np.arange(len(usable), dtype=np.int32), [len(ordinals) for ordinals in usable]
        )
        self.ordinal_N: npt.NDArray[np.int32] = np.concatenate([*usable, np.empty(0, np.int32)]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.tar_N)

    def address(self, index: int) -> tuple[int, int]:
        """Return (tar number, ordinal) of a sample."""
        return int(self.tar_N[index]), int(self.ordinal_N[index])

    def _usable(self, number: int, on_bad: str) -> npt.NDArray[np.int32]:
        good = np.ones(len(self.tars[number].samples), bool)
        for name, join in self.caches.items():
            good_rows = join.good_rows(number)
            if on_bad == "error" and not good_rows.all():
                ordinal = int(np.flatnonzero(~good_rows)[0])
                raise BadSample(
                    f"{_name(self.tars[number], ordinal)}: the cache of tower {name!r} has no embedding for it "
                    f"({np.count_nonzero(~good_rows)} such samples in this tar); repair the tar and rebuild, or set "
                    "data.on_bad: skip to train without them"
                )
            self.left_out[f"no embedding in {name!r}"] += int(np.count_nonzero(good & ~good_rows))
            good &= good_rows
        return np.flatnonzero(good).astype(np.int32)


def _name(tar: TarIndex, ordinal: int) -> str:
    return f"{tar.location}: sample {tar.samples[ordinal].key!r}"
