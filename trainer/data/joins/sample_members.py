"""The members of one sample as training reads them: each at most once, and only if something needs it."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.groups import BAD_GROUP, WITHOUT_GROUP, BadField, sample_group
from threetowers.cache.webdataset.sample import Annotation, ReadMember, read_annotation, read_fields, read_image
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.trainer.data.joins.visit import Visit


class SampleMembers:
    """The members of one sample.

    Attributes:
        tar: Index of its tar.
        ordinal: Its position there.
        notes: What was tolerated in what has been read so far, as short phrases.
    """

    def __init__(self, tar: TarIndex, ordinal: int, read: ReadMember, captions: CaptionFormat, max_pixels: int) -> None:
        """Read nothing yet.

        Args:
            tar: Index of its tar.
            ordinal: Its position there.
            read: Gives the bytes of a member by its extension.
            captions: Where its captions are.
            max_pixels: Largest width x height that is decoded.
        """
        self.tar = tar
        self.ordinal = ordinal
        self.notes: list[str] = []
        self._read = read
        self._captions = captions
        self._max_pixels = max_pixels

    @cached_property
    def image(self) -> Image.Image:
        """The decoded image. Raises BadSample where there is none."""
        return read_image(self.tar, self.ordinal, self._max_pixels, self._read, self.notes)

    @cached_property
    def annotation(self) -> Annotation:
        """The captions and fields. Raises BadSample where there is no caption."""
        annotation = read_annotation(self.tar, self.ordinal, self._read, captions=self._captions)
        self.notes += annotation.notes
        return annotation

    @property
    def captions_by_source(self) -> Mapping[str, tuple[str, ...]] | None:
        """The captions by source, if anything has needed them so far."""
        return self.annotation.captions_by_source if "annotation" in self.__dict__ else None

    def captions(self, visit: Visit, rng: np.random.Generator | None = None) -> list[str]:
        """Return the captions that a visit draws, see `Visit.places`. Raises BadSample where there is none."""
        captions = self.annotation.captions_by_source
        places = visit.places({source: len(found) for source, found in captions.items()}, rng)
        return [captions[source][position] for source, position in places]

    def group(self, group_field: str | None) -> str:
        """Return the name of the sample's group; a field is read from its `json` or `cls` member, and nothing else.

        Raises:
            BadSample: The field holds a list or an object.
        """
        fields: Mapping[str, Any] = {}
        if "annotation" in self.__dict__:
            fields = self.annotation.fields
        elif group_field is not None:
            fields, notes = read_fields(self.tar, self.ordinal, self._read)
            self.notes += notes
        try:
            group = sample_group(self.tar, self.ordinal, fields, group_field)
        except BadField as error:
            message = f"{self.tar.describe(self.ordinal)}: {error}; see data.group_field"
            raise BadSample(message, BAD_GROUP) from error
        if group.without_value:
            self.notes.append(WITHOUT_GROUP)
        return group.name
