"""The tars of DataCompDR as the source of an import: samples with embeddings, found by key and read in their order."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np

from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.datacompdr.bad_reinforcement import BadReinforcement
from threetowers.cache.exchange.datacompdr.caption_rows import SYN, TXT
from threetowers.cache.exchange.datacompdr.crops import PAUG
from threetowers.cache.exchange.datacompdr.embeddings import (
    EMBEDDING_EXTENSIONS,
    IMAGE_ROWS,
    read_embeddings,
)
from threetowers.cache.exchange.import_source import ImportSource, Int64
from threetowers.cache.exchange.sample_keys import Match, sample_name
from threetowers.cache.format.dtypes import Float32Array
from threetowers.cache.format.manifest import Side
from threetowers.cache.storage.object_file import open_object
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash, read_member_of

PROBED_SAMPLES = 16
READ: dict[Side, frozenset[str]] = {
    "image": frozenset({PAUG, *EMBEDDING_EXTENSIONS}),
    "text": frozenset({SYN, TXT, *EMBEDDING_EXTENSIONS}),
}

Members = Mapping[str, bytes]
T = TypeVar("T")


class ReinforcedTars(ImportSource):
    """The samples of some tars that have embeddings: 33 bytes each in memory, beside the headers of the tars.

    Attributes:
        of: which side of them is imported.
        width: of their embeddings, of all teachers.
        n_crops: image embeddings of each; 0 where captions are imported.
    """

    units: ClassVar[str] = "samples with embeddings"

    def __init__(
        self, tars: Sequence[TarIndex], of: Side, match: Match = "key", columns: tuple[int, int] | None = None
    ) -> None:
        """Find the samples, and look into some of them.

        Args:
            tars: Indexes of the tars.
            of: Which side of them is imported.
            match: How samples are looked for. Their uid is the last part of their key.
            columns: The first column of a teacher, and the one behind its last; None: all columns.

        Raises:
            BadSource: There are no embeddings, those that were looked at cannot be used, a key is there twice, or the
                columns are not there.
        """
        self.of: Side = of
        self._tars = tars
        ordinals = [_with_embeddings(index) for index in tars]
        tar_N = np.repeat(np.arange(len(tars)), [len(each) for each in ordinals])
        self._place_N2: Int64 = np.stack([tar_N, np.concatenate(ordinals)], axis=1)
        keys = (tars[tar].samples.key(ordinal) for tar, ordinal in self._place_N2)
        hashes = (key_hash(key if match == "key" else sample_name(key)) for key in keys)
        super().__init__(np.fromiter(hashes, np.uint64, len(tar_N)))
        if not len(self):
            raise BadSource(
                f"{tars[0].location}: no sample has a member {' or '.join(EMBEDDING_EXTENSIONS)}, nor in "
                f"{len(tars) - 1} other tars (--datacompdr)"
            )
        if len(again := self.repeats()):
            first, second = self._number_N[again[0] - 1 : again[0] + 1].tolist()
            raise BadSource(
                f"{self.name(first)} and {self.name(second)}: two samples of one key, expected keys that are unique in "
                "all of the tars (--datacompdr; --match key compares the whole key)"
            )
        self._probe(columns)

    @property
    def location(self) -> str:
        """The first tar."""
        return self._tars[0].location

    def name(self, number: int) -> str:
        """Return the tar and key of a sample, for messages."""
        index = self._tars[int(self._place_N2[number, 0])]
        return index.describe(int(self._place_N2[number, 1]))

    def first_key(self) -> str:
        """Return the tar and key of the first sample."""
        return f"{self.name(0)} is the first with embeddings"

    def probe(self) -> Float32Array:
        """Return the (n, D) rows of some samples."""
        return self._probed_nD

    def read(self, numbers: Int64, parse: Callable[[int, Members], T]) -> Iterator[tuple[int, T | BadReinforcement]]:
        """Read samples in the order of the tars, each of which is opened once.

        Args:
            numbers: Of the samples, in any order.
            parse: Makes something of a number and the members of this sample; may raise BadReinforcement.

        Yields:
            The number of a sample, and what was made of it, or why nothing was.

        Raises:
            BadTar: A tar has changed since it was indexed.
        """
        ordered = np.sort(numbers)  # numbers follow tars and ordinals
        tar_n = self._place_N2[ordered, 0]
        for tar in np.unique(tar_n).tolist():
            index = self._tars[tar]
            with open_object(index.location) as file:
                for number in ordered[tar_n == tar].tolist():
                    ordinal = int(self._place_N2[number, 1])
                    wanted = index.samples[ordinal].members.keys() & READ[self.of]
                    try:
                        members = {extension: read_member_of(file, index, ordinal, extension) for extension in wanted}
                        found: T | BadReinforcement = parse(number, members)
                    except BadReinforcement as error:
                        found = error
                    except BadSample as error:  # a member that is no plain file, or too large
                        found = BadReinforcement(str(error))
                    yield number, found

    def image_rows(self, members: Members) -> Float32Array:
        """Return the (V, D) rows of the crops of a sample. Raises BadReinforcement where they are not as in others."""
        rows_VW = read_embeddings(members, "image")[IMAGE_ROWS]
        if rows_VW.shape != (self.n_crops, self.width):
            raise BadReinforcement(
                f"{IMAGE_ROWS}: {len(rows_VW)} rows of width {rows_VW.shape[1]}, expected {self.n_crops} of width "
                f"{self.width} as in other samples"
            )
        return self.of_teacher(rows_VW)

    def text_rows(self, members: Members) -> dict[str, Float32Array]:
        """Return the rows of the captions of a sample, of all teachers. Raises as `image_rows` does."""
        embeddings = read_embeddings(members, "text")
        if (widths := {rows.shape[1] for rows in embeddings.values()}) != {self.width}:
            raise BadReinforcement(
                f"{', '.join(embeddings)}: rows of width {sorted(widths)}, expected {self.width} as in other samples"
            )
        return embeddings

    def of_teacher(self, rows_nW: Float32Array) -> Float32Array:
        """Return the columns of the teacher."""
        return rows_nW[:, self._columns]

    def _probe(self, columns: tuple[int, int] | None) -> None:
        """Look into some samples: how wide are their embeddings, and how many crops have they?"""
        step = max(1, len(self) // PROBED_SAMPLES)
        found = [each for _, each in self.read(np.arange(0, len(self), step), self._embeddings_of_side)]
        sound = [each for each in found if not isinstance(each, BadReinforcement)]
        if not sound:
            raise BadSource(
                f"{self.name(0)}: {found[0]}; {len(found)} samples were looked at, expected one to be sound"
            )
        # Of a sample that is unlike the others it is said when its row is taken.
        self.n_crops = _most_common([len(each) for each in sound]) if self.of == "image" else 0
        self.width = _most_common([each.shape[1] for each in sound])
        start, stop = columns or (0, self.width)
        if stop > self.width:
            raise BadSource(f"--columns {start}:{stop}: the embeddings in {self.name(0)} have {self.width} columns")
        self._columns = slice(start, stop)
        self.dim = stop - start
        self._probed_nD = np.concatenate([self.of_teacher(each) for each in sound if each.shape[1] == self.width])

    def _embeddings_of_side(self, number: int, members: Members) -> Float32Array:
        """Return the (n, W) embeddings of the crops of a sample, or of its captions."""
        rows = [each for each in read_embeddings(members, self.of).values() if len(each)]
        if len({each.shape[1] for each in rows}) != 1:
            raise BadReinforcement(f"no embeddings of {self.of}, or of several widths")
        return np.concatenate(rows)


def _with_embeddings(index: TarIndex) -> Int64:
    """Return the ordinals of the samples of a tar that have embeddings."""
    found = [not sample.members.keys().isdisjoint(EMBEDDING_EXTENSIONS) for sample in index.samples]
    return np.flatnonzero(found)


def _most_common(numbers: Sequence[int]) -> int:
    return Counter(numbers).most_common(1)[0][0]
