"""The images of some tars, with the captions and fields of their samples, by address."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS, CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.cache.webdataset.sample import read_annotation, read_encoded_image, read_image, read_label_vector
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.cache.webdataset.tar_list import OnBad, TarList, index_tars, left_aside_lines, require_samples
from threetowers.cache.webdataset.tar_patterns import expand
from threetowers.eval.left_out import BAD_TARS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalImage:
    """One image by address, with the annotation of its sample.

    Attributes:
        tar: Number of its tar in the `ImageSet`.
        ordinal: Position of its sample in that tar.
        key: Key of its sample.
        captions: Its captions; may be empty.
        fields: The keys of its `json` member; `cls`, the list of numbers of a `cls` member; and where the data set
            asks for it `npy`, the 0 and 1 of each class in an `npy` member.
        notes: What of its annotation cannot be used, as short phrases.
        image_notes: What was tolerated of the image itself (see `decode_rgb`).
    """

    tar: int
    ordinal: int
    key: str
    captions: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    image_notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """The usable images of some tars.

    Attributes:
        tars: The tars.
        images: The images.
        skipped: What cannot be used, each with the reason: samples, and under `on_bad: skip_tars` tars.
        left_out: Their number by reason.
        max_pixels: Largest width x height of an image.
    """

    tars: list[TarIndex]
    images: list[EvalImage]
    skipped: list[str]
    left_out: Mapping[str, int] = field(default_factory=dict)
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
        on_bad: OnBad = "skip",
        label_vectors: bool = False,
    ) -> ImageSet:
        """Return the images of tars, globs or brace ranges; see `read_images`, and `index_tar` for `image_member`.

        Raises:
            BadTar: Tars cannot be read, and `on_bad` is not `skip_tars`. The message names all of them.
        """
        paths = tuple(expand(patterns))
        # The first captions count, so the order of the sources matters here.
        key = (captions, tuple(captions.sources), image_member, on_bad, label_vectors, paths)
        if key not in self._read:
            listed = require_samples(index_tars(paths, image_member, on_bad))
            read = captions.extensions | ({"npy"} if label_vectors else set())
            for line in (*TarList([], listed.empty).notes(), *left_aside_lines(listed.tars, read)):
                logger.info("%s", line)
            self._read[key] = read_images(
                listed.tars,
                captions,
                self.max_pixels,
                on_bad=on_bad,
                label_vectors=label_vectors,
                bad_tars=listed.bad,
            )
        return self._read[key]


def read_images(
    tars: Sequence[TarIndex],
    captions: CaptionFormat = DEFAULT_CAPTIONS,
    max_pixels: int = MAX_PIXELS,
    *,
    on_bad: OnBad = "skip",
    label_vectors: bool = False,
    bad_tars: Sequence[str] = (),
) -> ImageSet:
    """Read the annotation of every sample of some tars, and decode each image once to know that it can be.

    Args:
        tars: Indexes of the tars.
        captions: Where the captions are; all sources that are named are read, in their order, whatever their weights.
        max_pixels: Largest width x height that is decoded.
        on_bad: `error` raises the first sample that cannot be used; otherwise it is left out.
        label_vectors: Read labels from `npy` members, as the field `npy`.
        bad_tars: What is wrong with tars that were left out before.

    Returns:
        The images that can be used, in the order of the tars; the others are listed and counted.

    Raises:
        ValueError: No image can be used.
        BadSample: A sample cannot be used, and `on_bad` is `error`.
        BadTar: A tar has changed since it was indexed.
    """
    images: list[EvalImage] = []
    skipped = list(bad_tars)
    left_out = Counter({BAD_TARS: len(bad_tars)} if bad_tars else {})
    with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
        for number, tar in enumerate(tars):
            read = partial(_read, tar, number, captions, max_pixels, label_vectors)
            for found in pool.map(read, range(len(tar.samples))):
                if isinstance(found, EvalImage):
                    images.append(found)
                elif on_bad == "error":
                    raise BadSample(f"{found}; set on_bad: skip to leave such samples out") from found
                else:
                    skipped.append(str(found))
                    left_out[found.reason] += 1
    if not images:
        reason = f"; the first of {len(skipped)} problems: {skipped[0]}" if skipped else ""
        raise ValueError(f"no usable image in {[tar.location for tar in tars]}{reason}")
    return ImageSet(list(tars), images, skipped, left_out, max_pixels)


def _read(
    tar: TarIndex, number: int, captions: CaptionFormat, max_pixels: int, label_vectors: bool, ordinal: int
) -> EvalImage | BadSample:
    try:
        annotation = read_annotation(tar, ordinal, captions=captions, captions_required=False)
        fields = dict(annotation.fields)
        if label_vectors:
            fields["npy"] = read_label_vector(tar, ordinal)
        image_notes: list[str] = []
        read_image(tar, ordinal, max_pixels, notes=image_notes)
    except BadSample as error:
        return error
    key = tar.samples[ordinal].key
    return EvalImage(number, ordinal, key, annotation.captions, fields, annotation.notes, tuple(image_notes))
