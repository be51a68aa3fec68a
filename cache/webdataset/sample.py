"""Reading one sample: its image, and its annotation.

The trainer, the tokenizer and the evaluation all read captions here, so that they see the same ones.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.tar_index import BadTar, TarIndex, read_member

MAX_LABEL_BYTES = 1 << 20  # of an npy member with labels
ReadMember = Callable[[str], bytes]  # a member of one sample, by its extension


class BadSample(ValueError):
    """A sample that cannot be used. The message names its tar and key."""


@dataclass(frozen=True)
class Annotation:
    """The text side of one sample.

    `fields` are those of the `json` member; `cls` is the list of numbers of a `cls` member.
    """

    captions: tuple[str, ...]
    fields: Mapping[str, Any]


def read_annotation(
    tar: TarIndex,
    ordinal: int,
    read: ReadMember | None = None,
    *,
    caption_per_line: bool = False,
    captions_required: bool = True,
) -> Annotation:
    """Return the captions and fields of a sample.

    Captions are the `captions` or the `caption` of the `json` member, else the `txt` member. White space around them
    is dropped, and so are empty ones.

    Args:
        tar: Index of the tar.
        ordinal: The sample's position in it.
        read: Reads a member of this sample, where they are at hand; otherwise they are read from the tar.
        caption_per_line: Whether each line of a `txt` member is a caption, as in CLIP_benchmark; otherwise it is one.
        captions_required: Whether a sample without a caption is an error.

    Raises:
        BadSample: A member is not what its name says, or a required caption is missing.
        BadTar: The tar has changed since it was indexed.
    """
    members = tar.samples[ordinal].members
    if read is None:
        read = partial(read_member, tar, ordinal)
    data = {extension: read(extension) for extension in ("txt", "json", "cls") if extension in members}

    fields: dict[str, Any] = {}
    captions: Any = []
    try:
        if "txt" in data:
            text = data["txt"].decode()
            captions = text.splitlines() if caption_per_line else [text]
        if "json" in data:
            fields = json.loads(data["json"])
            if not isinstance(fields, dict):
                raise ValueError(f"the json member holds a {type(fields).__name__}, expected an object")
            captions = fields.get("captions", fields.get("caption", captions))
        if "cls" in data:
            fields["cls"] = [int(number) for number in data["cls"].decode().replace(",", " ").split()]
    except ValueError as error:  # of UTF-8, JSON or a number
        raise BadSample(f"{tar.describe(ordinal)}: {error}") from error

    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample(f"{tar.describe(ordinal)}: captions are {captions!r}, expected a list of strings")
    kept = tuple(stripped for caption in captions if (stripped := caption.strip()))
    if captions_required and not kept:
        raise BadSample(
            f"{tar.describe(ordinal)}: no caption; expected a .txt member, or a .json member with `captions`, "
            f"found members {sorted(members)}"
        )
    return Annotation(kept, fields)


def read_label_vector(tar: TarIndex, ordinal: int) -> list[int]:
    """Return the `npy` member of a sample: for each class 1 if it is a label of the image, else 0.

    It is read without unpickling.

    Raises:
        BadSample: The sample has none, or it is no vector of zeros and ones.
        BadTar: The tar has changed since it was indexed.
    """
    try:
        if "npy" not in tar.samples[ordinal].members:
            raise ValueError(f"no .npy member with labels, only {sorted(tar.samples[ordinal].members)}")
        data = read_member(tar, ordinal, "npy", max_bytes=MAX_LABEL_BYTES)
        vector = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype.kind not in "biuf":
            found = f"{vector.dtype} of shape {vector.shape}" if isinstance(vector, np.ndarray) else "an archive"
            raise ValueError(f"the npy member holds {found}, expected a vector of 0 and 1, one for each class")
        if not np.isin(vector, (0, 1)).all():
            raise ValueError("the npy member holds other numbers than 0 and 1")
    except BadTar:
        raise
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError) as error:  # of NumPy's reader
        raise BadSample(f"{tar.describe(ordinal)}: label: {error}") from error
    numbers: list[int] = vector.astype(np.int64).tolist()
    return numbers


def read_image(tar: TarIndex, ordinal: int, max_pixels: int, read: ReadMember | None = None) -> Image.Image:
    """Return the decoded RGB image of a sample.

    Args:
        tar: Index of the tar.
        ordinal: The sample's position in it.
        max_pixels: Largest width x height that is decoded.
        read: Reads a member of this sample, where they are at hand; otherwise they are read from the tar.

    Raises:
        BadSample: The image is broken, or larger than `max_pixels`.
        BadTar: The tar has changed since it was indexed.
    """
    if read is None:
        read = partial(read_member, tar, ordinal)
    try:
        return decode_rgb(read(tar.samples[ordinal].image), max_pixels=max_pixels)
    except BadImage as error:
        raise BadSample(f"{tar.describe(ordinal)}: {error}") from error
