"""The images of some tars, with the captions and fields of their samples, by address."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS, CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.cache.webdataset.sample import read_annotation, read_encoded_image, read_image
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.cache.webdataset.tar_list import index_tars, require_samples
from threetowers.cache.webdataset.tar_patterns import expand


@dataclass(frozen=True)
class EvalImage:
    """One image by address, with the annotation of its sample.

    Attributes:
        tar: Number of its tar in the `ImageSet`.
        ordinal: Position of its sample in that tar.
        key: Key of its sample.
        captions: Its captions; may be empty.
        fields: The keys of its `json` member, and `cls`, the list of numbers of a `cls` member.
        notes: What of its annotation cannot be used, as short phrases.
    """

    tar: int
    ordinal: int
    key: str
    captions: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """The readable images of some tars. `skipped` lists the others, each with its reason.

    `max_pixels` is the largest width x height of an image among them.
    """

    tars: list[TarIndex]
    images: list[EvalImage]
    skipped: list[str]
    max_pixels: int = MAX_PIXELS

    def name(self, image: EvalImage) -> str:
        """Return how messages call an image: its tar and its key."""
        return f"{self.tars[image.tar].location}: sample {image.key!r}"

    def encoded(self, image: EvalImage) -> bytes:
        """Return the bytes of an image as they lie in its tar."""
        return read_encoded_image(self.tars[image.tar], image.ordinal)


class ImageReader:
    """Reads the images of tars; tars that several data sets or parts share are read once."""

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self.max_pixels = max_pixels
        self._read: dict[tuple[object, ...], ImageSet] = {}

    def read(
        self,
        patterns: Sequence[str],
        captions: CaptionFormat = DEFAULT_CAPTIONS,
        *,
        image_member: str | None = None,
    ) -> ImageSet:
        """Return the images of tars, globs or brace ranges; see `read_images`, and `index_tar` for `image_member`."""
        tars = tuple(expand(patterns))
        # The first captions count, so the order of the sources matters here.
        key = (captions, tuple(captions.sources), image_member, tars)
        if key not in self._read:
            listed = require_samples(index_tars(tars, image_member))
            self._read[key] = read_images(listed.tars, captions, self.max_pixels)
        return self._read[key]


def read_images(
    tars: Sequence[TarIndex], captions: CaptionFormat = DEFAULT_CAPTIONS, max_pixels: int = MAX_PIXELS
) -> ImageSet:
    """Read the annotation of every sample of some tars, and decode each image once to know that it can be.

    Args:
        tars: Indexes of the tars.
        captions: Where the captions are; all sources that are named are read, in their order, whatever their weights.
        max_pixels: Largest width x height that is decoded.

    Returns:
        The images that can be read, in the order of the tars; the others are listed in `skipped`.

    Raises:
        ValueError: No image can be read.
        BadTar: A tar has changed since it was indexed.
    """
    images: list[EvalImage] = []
    skipped: list[str] = []
    with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
        for number, tar in enumerate(tars):
            read = partial(_read, tar, number, captions, max_pixels)
            for found in pool.map(read, range(len(tar.samples))):
                if isinstance(found, EvalImage):
                    images.append(found)
                else:
                    skipped.append(str(found))
    if not images:
        reason = f"; the first of {len(skipped)} problems: {skipped[0]}" if skipped else ""
        raise ValueError(f"no usable image in {[tar.location for tar in tars]}{reason}")
    return ImageSet(list(tars), images, skipped, max_pixels)


def _read(tar: TarIndex, number: int, captions: CaptionFormat, max_pixels: int, ordinal: int) -> EvalImage | BadSample:
    try:
        annotation = read_annotation(tar, ordinal, captions=captions, captions_required=False)
        read_image(tar, ordinal, max_pixels)
    except BadSample as error:
        return error
    key = tar.samples[ordinal].key
    return EvalImage(number, ordinal, key, annotation.captions, annotation.fields, annotation.notes)
