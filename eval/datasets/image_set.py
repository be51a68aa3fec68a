"""The images of some tars, with the captions and fields of their samples, by address."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from threetowers.cache.webdataset.sample import BadSample, read_annotation, read_image, read_label_vector
from threetowers.cache.webdataset.tar_index import BadTar, TarIndex, expand, index_tar, read_member
from threetowers.eval.left_out import BAD_TARS, UNREADABLE, OnBad

DEFAULT_MAX_PIXELS = 50_000_000


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
    """

    tar: int
    ordinal: int
    key: str
    captions: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageSet:
    """The usable images of some tars.

    Attributes:
        tars: The tars.
        images: The images.
        skipped: What cannot be used, each with the reason: samples, and under `on_bad: skip_tars` tars.
        left_out: Their number by reason.
    """

    tars: list[TarIndex]
    images: list[EvalImage]
    skipped: list[str]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def name(self, image: EvalImage) -> str:
        """Return how messages call an image: its tar and its key."""
        return f"{self.tars[image.tar].location}: sample {image.key!r}"

    def encoded(self, image: EvalImage) -> bytes:
        """Return the bytes of an image as they lie in its tar."""
        tar = self.tars[image.tar]
        return read_member(tar, image.ordinal, tar.samples[image.ordinal].image)


class ImageReader:
    """Reads the images of tars; tars that several data sets or parts share are read once."""

    def __init__(self, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self.max_pixels = max_pixels
        self._read: dict[tuple[object, ...], ImageSet] = {}

    def read(
        self,
        patterns: Sequence[str],
        caption_per_line: bool = False,
        *,
        on_bad: OnBad = "skip",
        label_vectors: bool = False,
    ) -> ImageSet:
        """Return the images of tars, globs or brace ranges; see `read_images`.

        Raises:
            BadTar: Tars cannot be read, and `on_bad` is not `skip_tars`. The message names all of them.
        """
        paths = tuple(expand(patterns))
        key = (caption_per_line, on_bad, label_vectors, paths)
        if key not in self._read:
            tars, bad = _index(paths, on_bad)
            found = read_images(
                tars, caption_per_line, self.max_pixels, on_bad=on_bad, label_vectors=label_vectors, bad_tars=bad
            )
            self._read[key] = found
        return self._read[key]


def read_images(
    tars: Sequence[TarIndex],
    caption_per_line: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    on_bad: OnBad = "skip",
    label_vectors: bool = False,
    bad_tars: Sequence[str] = (),
) -> ImageSet:
    """Read the annotation of every sample of some tars, and decode each image once to know that it can be.

    Args:
        tars: Indexes of the tars.
        caption_per_line: Whether each line of a `txt` member is a caption; otherwise the member is one caption.
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
            read = partial(_read, tar, number, caption_per_line, max_pixels, label_vectors)
            for found in pool.map(read, range(len(tar.samples))):
                if isinstance(found, EvalImage):
                    images.append(found)
                elif on_bad == "error":
                    raise BadSample(f"{found}; set on_bad: skip to leave such samples out") from found
                else:
                    skipped.append(str(found))
                    left_out[getattr(found, "reason", UNREADABLE)] += 1
    if not images:
        reason = f"; the first of {len(skipped)} problems: {skipped[0]}" if skipped else ""
        raise ValueError(f"no usable image in {[tar.location for tar in tars]}{reason}")
    return ImageSet(list(tars), images, skipped, left_out)


def _index(paths: Sequence[str], on_bad: OnBad) -> tuple[list[TarIndex], list[str]]:
    """Return the indexes of the tars that can be read, and what is wrong with each of the others."""
    tars = []
    bad = []
    for path in paths:
        try:
            tars.append(index_tar(path))
        except (BadTar, OSError) as error:
            bad.append(str(error))
    if bad and on_bad != "skip_tars":
        raise BadTar(
            f"{len(bad)} of {len(paths)} tars cannot be read: {'; '.join(bad)}. Mend them, or set on_bad: skip_tars to "
            "leave them out"
        )
    return tars, bad


def _read(
    tar: TarIndex, number: int, caption_per_line: bool, max_pixels: int, label_vectors: bool, ordinal: int
) -> EvalImage | BadSample:
    try:
        annotation = read_annotation(tar, ordinal, caption_per_line=caption_per_line, captions_required=False)
        fields = dict(annotation.fields)
        if label_vectors:
            fields["npy"] = read_label_vector(tar, ordinal)
        read_image(tar, ordinal, max_pixels)
    except BadSample as error:
        return error
    return EvalImage(number, ordinal, tar.samples[ordinal].key, annotation.captions, fields)
