"""Reading one sample: its image, and its annotation.

The trainer, the tokenizer and the evaluation all read samples here, so that they see the same ones.
"""

import io
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from threetowers.cache.webdataset.captions import (
    DEFAULT_CAPTIONS,
    FIELD_EXTENSIONS,
    BadText,
    CaptionFormat,
    decode_text,
    json_object,
)
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.sample_list import members_text, unreadable
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex, read_member

MAX_LABEL_BYTES = 1 << 20  # of an npy member with labels
ReadMember = Callable[[str], bytes]  # a member of one sample, by its extension
BAD_LABEL = "cls: not numbers"
BAD_LABEL_VECTOR = "npy: no labels"


@dataclass(frozen=True)
class Annotation:
    """The text side of one sample.

    Attributes:
        captions_by_source: Its captions by the source that they come from (see `CaptionFormat`).
        fields: Those of its `json` member; `cls` is the list of numbers of a `cls` member.
        notes: What of its text members cannot be used, as short phrases by which samples are counted, such as
            `json.caption: null`.
    """

    captions_by_source: Mapping[str, tuple[str, ...]]
    fields: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions of all sources."""
        return tuple(itertools.chain.from_iterable(self.captions_by_source.values()))


def read_annotation(
    tar: TarIndex,
    ordinal: int,
    read: ReadMember | None = None,
    *,
    captions: CaptionFormat = DEFAULT_CAPTIONS,
    captions_required: bool = True,
) -> Annotation:
    """Return the captions and fields of a sample, as far as they can be used; the rest is in its notes.

    Args:
        tar: Index of the tar.
        ordinal: The sample's position in it.
        read: Reads a member of this sample, where they are at hand; otherwise they are read from the tar.
        captions: Where the captions are.
        captions_required: Whether a sample without a caption is an error.

    Raises:
        BadSample: A required caption is missing.
        BadTar: The tar has changed since it was indexed.
    """
    members = tar.samples[ordinal].members
    data, notes = _read_texts(tar, ordinal, read, captions.extensions)
    fields = _fields(data, notes)
    found, faults = captions.find(data, fields)
    notes += faults
    if captions_required and not found:
        reason = _no_caption(notes)
        raise BadSample(
            f"{tar.describe(ordinal)}: {describe_missing_captions(members, fields, notes)}, expected a caption in "
            f"{captions.sources_text()} (captions, --captions, names other sources)",
            reason,
        )
    return Annotation(found, fields, tuple(notes))


def read_fields(
    tar: TarIndex, ordinal: int, read: ReadMember | None = None
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the fields of a sample, as those of an annotation, and notes on them; no caption is read.

    Args:
        tar: Index of the tar.
        ordinal: The sample's position in it.
        read: Reads a member of this sample, where they are at hand; otherwise they are read from the tar.

    Raises:
        BadTar: The tar has changed since it was indexed.
    """
    data, notes = _read_texts(tar, ordinal, read, FIELD_EXTENSIONS)
    return _fields(data, notes), tuple(notes)


def _read_texts(
    tar: TarIndex, ordinal: int, read: ReadMember | None, extensions: Collection[str]
) -> tuple[dict[str, bytes], list[str]]:
    """Return those text members of a sample that have one of these extensions, and why others cannot be read."""
    members = tar.samples[ordinal].members
    if read is None:
        read = partial(read_member, tar, ordinal)
    notes: list[str] = []
    data = {}
    for extension in sorted(members.keys() & extensions):
        if defect := unreadable(members[extension]):
            notes.append(f"{extension}: {defect}")
        else:
            data[extension] = read(extension)
    return data, notes


def _fields(data: Mapping[str, bytes], notes: list[str]) -> dict[str, Any]:
    """Return the fields in some text members; what cannot be used is added to the notes."""
    fields: dict[str, Any] = {}
    if "json" in data:
        try:
            fields = json_object(data["json"])
        except BadText as error:
            notes.append(f"json: {error}")
    if "cls" in data:
        try:
            fields["cls"] = [int(number) for number in decode_text(data["cls"]).replace(",", " ").split()]
        except ValueError:
            notes.append(BAD_LABEL)
    return fields


def describe_missing_captions(members: Collection[str], fields: Mapping[str, Any], notes: Sequence[str]) -> str:
    """Return that a sample has no caption, and what it has instead: its members and the fields of its `json` member."""
    in_json = f", json fields {members_text(fields.keys() - {'cls'})}" if "json" in members else ""
    return f"{_no_caption(notes)}; found members {members_text(members)}{in_json}"


def _no_caption(notes: Sequence[str]) -> str:
    return f"no caption ({', '.join(notes)})" if notes else "no caption"


def read_label_vector(tar: TarIndex, ordinal: int) -> list[int]:
    """Return the `npy` member of a sample: for each class 1 if it is a label of the image, else 0.

    It is read without unpickling.

    Raises:
        BadSample: The sample has none, or it is no vector of zeros and ones.
        BadTar: The tar has changed since it was indexed.
    """
    members = tar.samples[ordinal].members
    try:
        if "npy" not in members:
            raise ValueError(f"no .npy member with labels, only {members_text(members)}")
        if members["npy"].size > MAX_LABEL_BYTES:
            raise ValueError(f".npy has {members['npy'].size} bytes, expected at most {MAX_LABEL_BYTES}")
        vector = np.load(io.BytesIO(read_member(tar, ordinal, "npy")), allow_pickle=False)
        if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype.kind not in "biuf":
            found = f"{vector.dtype} of shape {vector.shape}" if isinstance(vector, np.ndarray) else "an archive"
            raise ValueError(f"the npy member holds {found}, expected a vector of 0 and 1, one for each class")
        if not np.isin(vector, (0, 1)).all():
            raise ValueError("the npy member holds other numbers than 0 and 1")
    except BadTar:
        raise
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError) as error:  # of NumPy's reader
        raise BadSample(f"{tar.describe(ordinal)}: label: {error}", BAD_LABEL_VECTOR) from error
    numbers: list[int] = vector.astype(np.int64).tolist()
    return numbers


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
