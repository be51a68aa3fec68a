"""Reading one sample: its image, and its annotation.

The trainer, the tokenizer and the evaluation all read captions here, so that they see the same ones.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.tar_index import TarIndex, read_member

ReadMember = Callable[[str], bytes]  # a member of one sample, by its extension


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


def read_encoded_image(tar: TarIndex, ordinal: int, read: ReadMember | None = None) -> bytes:
    """Return the image of a sample as it lies in its tar.

    Args:
        tar: Index of the tar.
        ordinal: The sample's position in it.
        read: Reads a member of this sample, where they are at hand; otherwise they are read from the tar.

    Raises:
        BadSample: The sample has no image, or several, or one that is no plain file or too large.
        BadTar: The tar has changed since it was indexed.
    """
    sample = tar.samples[ordinal]
    if sample.image is None or sample.defect is not None:
        raise BadSample(f"{tar.describe(ordinal)}: {tar.describe_defect(ordinal)}", str(sample.defect))
    return read_member(tar, ordinal, sample.image) if read is None else read(sample.image)


def read_image(
    tar: TarIndex, ordinal: int, max_pixels: int, read: ReadMember | None = None, notes: list[str] | None = None
) -> Image.Image:
    """Return the decoded RGB image of a sample.

    Args:
        tar: Index of the tar.
        ordinal: The sample's position in it.
        max_pixels: Largest width x height that is decoded.
        read: Reads a member of this sample, where they are at hand; otherwise they are read from the tar.
        notes: What was tolerated is added to it, see `decode_rgb`.

    Raises:
        BadSample: There is no image, or several; or it is broken, or larger than `max_pixels`.
        BadTar: The tar has changed since it was indexed.
    """
    try:
        return decode_rgb(read_encoded_image(tar, ordinal, read), max_pixels=max_pixels, notes=notes)
    except BadImage as error:
        raise BadSample(f"{tar.describe(ordinal)}: {error}", error.defect) from error
