"""What is searched: the images and captions of one part of an evaluation set."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from threetowers.cache.webdataset.tar_index import read_member
from threetowers.eval.datasets.evaluation_set import EvaluationSet, Picture

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Gallery:
    """The images of one part of a set, and each distinct caption of each of its groups once."""

    name: str
    pictures: list[Picture]
    captions: list[str]
    image_group_N: Ids
    text_group_M: Ids


def galleries_of(data: EvaluationSet) -> list[Gallery]:
    """Return one gallery per part of the set."""
    return [_gallery(data, part) for part in data.parts()]


def encoded(data: EvaluationSet, picture: Picture) -> bytes:
    """Return an image as it lies in its tar."""
    tar = data.tars[picture.tar]
    return read_member(tar, picture.ordinal, tar.samples[picture.ordinal].image)


def _gallery(data: EvaluationSet, part: str) -> Gallery:
    pictures = [picture for picture in data.pictures if picture.part == part]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(p.group for p in pictures))}
    # Several images of one group bring the same captions: each is searched for once.
    pairs = list(dict.fromkeys((p.group, caption) for p in pictures for caption in p.captions))
    return Gallery(
        part,
        pictures,
        [caption for _, caption in pairs],
        np.array([numbers[p.group] for p in pictures]),
        np.array([numbers[group] for group, _ in pairs]),
    )
