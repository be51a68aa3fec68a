"""What is evaluated: the usable images of some tars with their captions, by address."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from threetowers.cache.webdataset.sample import BadSample, read_annotation, read_image
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.trainer.data.sample_set import group_of

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """One image of an evaluation set, by address."""

    tar: int
    ordinal: int
    key: str
    group: str  # what it shows; captions of the same group match it
    part: str  # the gallery it belongs to
    captions: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)  # what else its sample says of it, such as labels


@dataclass(frozen=True)
class EvaluationSet:
    """The usable images of some tars. `skipped`: what could not be read, each with its reason."""

    tars: list[TarIndex]
    pictures: list[Picture]
    skipped: list[str]

    def parts(self) -> list[str]:
        """Names of the galleries, sorted."""
        return sorted({picture.part for picture in self.pictures})


def evaluation_set(
    tars: Sequence[TarIndex],
    *,
    group_field: str | None,
    part_field: str | None,
    max_captions: int,
    max_pixels: int = 50_000_000,
    captions_needed: bool = True,
    caption_per_line: bool = False,
) -> EvaluationSet:
    """Return what the tars hold, read once for every model that is to be compared.

    `group_field`: JSON field naming what an image shows (None: each image is its own group, as in COCO). `part_field`:
    JSON field that splits the set into galleries (None: one). Samples that cannot be read are listed in `skipped`, and
    so are those without a caption where `captions_needed`. `caption_per_line`: as in `read_annotation`.
    """

    def read(number: int, ordinal: int) -> Picture | BadSample:
        tar = tars[number]
        try:
            text = read_annotation(tar, ordinal, caption_per_line=caption_per_line, captions_required=captions_needed)
            read_image(tar, ordinal, max_pixels)
            part = "all" if part_field is None else group_of(tar, ordinal, text, part_field)
            group = group_of(tar, ordinal, text, group_field)
        except BadSample as error:
            return error
        return Picture(number, ordinal, tar.samples[ordinal].key, group, part, text.captions[:max_captions])

    found: list[Picture | BadSample] = []
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
        for number, tar in enumerate(tars):
            found += pool.map(partial(read, number), range(len(tar.samples)))
    pictures = [one for one in found if isinstance(one, Picture)]
    skipped = [str(one) for one in found if isinstance(one, BadSample)]
    if not pictures:
        reason = f"; the first of {len(skipped)} problems: {skipped[0]}" if skipped else ""
        wanted = "image with a caption" if captions_needed else "image"
        raise ValueError(f"no usable {wanted} in {[tar.location for tar in tars]}{reason}")
    return EvaluationSet(list(tars), pictures, skipped)
