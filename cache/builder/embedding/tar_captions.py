"""The captions of one tar, as they are read: which samples have which, and the different ones."""

from collections.abc import Mapping, Sequence

from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.sample import ReadMember, describe_missing_captions, read_annotation
from threetowers.cache.webdataset.tar_index import TarIndex


class TarCaptions:
    """Collects the captions of a tar, sample after sample."""

    def __init__(self, index: TarIndex, captions: CaptionFormat) -> None:
        self._index = index
        self._format = captions
        self._found: dict[int, tuple[Mapping[str, Sequence[str]], Sequence[str]]] = {}  # captions by source, and notes
        self._missing: dict[int, str] = {}  # why there are none
        self._place: dict[str, int] = {}

    @property
    def different(self) -> list[str]:
        """The different captions, in the order in which they were met."""
        return list(self._place)

    def add(self, ordinal: int, read: ReadMember) -> None:
        """Read the captions of a sample. Samples come in their order. Raises BadTar as `read_annotation` does."""
        annotation = read_annotation(self._index, ordinal, read, captions=self._format, captions_required=False)
        if not annotation.captions_by_source:
            members = self._index.samples[ordinal].members
            found = describe_missing_captions(members, annotation.fields, annotation.notes)
            expected = f"expected a caption in {self._format.sources_text()} (--captions names other sources)"
            self._missing[ordinal] = f"{found}, {expected}"
            return
        self._found[ordinal] = annotation.captions_by_source, annotation.notes
        for caption in annotation.captions:
            self._place.setdefault(caption, len(self._place))

    def fill(self, rows: TextRowBuffer) -> None:
        """Give the rows of a cache their captions; reject the samples that have none.

        Raises:
            ManifestError: there are more than the cache has room for.
        """
        for ordinal, (captions_by_source, notes) in self._found.items():
            rows.set_captions(ordinal, captions_by_source)
            rows.notes.update(notes)
        for ordinal, reason in self._missing.items():
            rows.reject(ordinal, RowStatus.NO_CAPTION, reason)

    def samples_with(self, places: set[int]) -> int:
        """Return how many samples have one of these captions, by their places in `different`."""
        count = 0
        for captions_by_source, _ in self._found.values():
            captions = [caption for found in captions_by_source.values() for caption in found]
            count += any(self._place[caption] in places for caption in captions)
        return count
