"""The runs of rows of a tar of text: which rows are whose captions, and whether these are still the same."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from threetowers.cache.webdataset.captions import caption_hash, shortened

REMEDY = (
    "restore the captions, carry the rows of the unchanged ones over with `threetowers cache remap`, or build a new "
    "cache"
)


class CaptionRows(NamedTuple):
    """The k captions of one sample that have rows, in the order of these.

    Attributes:
        source_k: number of each caption's source in `manifest.captions.names`.
        hash_k: its `caption_hash`.
    """

    source_k: npt.NDArray[np.uint8]
    hash_k: npt.NDArray[np.uint64]

    def difference(self, number: int, caption: str | None) -> str:
        """Return what is wrong if this caption, which has no such row, is caption `number` of the sample now."""
        known = self.hash_k.tolist()
        if caption is None:
            return f"no caption {number}: the sample had {len(known)} when it was embedded"
        wanted = caption_hash(caption)
        shown = f"caption {number} ({shortened(caption)})"
        if wanted in known:
            return f"{shown} was moved: it has the row of caption {known.index(wanted)}; {REMEDY}"
        if number >= len(known):
            return f"{shown} was added: the sample had {len(known)} captions when it was embedded; {REMEDY}"
        return f"{shown} was changed: the row there is of another caption; {REMEDY}"

    def differences(self, names: Sequence[str], captions_by_source: Mapping[str, Sequence[str]]) -> str | None:
        """Return in what the captions of the sample now differ from those that have rows; None where nothing does.

        Args:
            names: of the sources, by number.
            captions_by_source: the captions now.
        """
        found = [(source, caption) for source, captions in captions_by_source.items() for caption in captions]
        now = [(source, caption_hash(caption)) for source, caption in found]
        before = [(names[code], each) for code, each in zip(self.source_k.tolist(), self.hash_k.tolist(), strict=True)]
        if now == before:
            return None
        counts_now = Counter(now)
        counts_before = Counter(before)
        added = counts_now - counts_before
        removed = counts_before - counts_now
        if added:
            at = next(i for i, each in enumerate(now) if each in added)
            source, caption = found[at]
            word = "changed" if removed else "added"
            counted = f"{len(before)} captions were embedded, there are {len(now)} now"
            return f"caption {at} ({source}: {shortened(caption)}) was {word}: {counted}; {REMEDY}"
        if removed:
            at = next(i for i, each in enumerate(before) if each in removed)
            counted = f"{len(before)} captions were embedded, {len(now)} are left"
            return f"caption {at} ({before[at][0]}) was removed: {counted}; {REMEDY}"
        at = next(i for i, (one, other) in enumerate(zip(now, before, strict=True)) if one != other)
        source, caption = found[at]
        return (
            f"caption {at} ({source}: {shortened(caption)}) was moved: it was caption {before.index(now[at])}; {REMEDY}"
        )


@dataclass(frozen=True, eq=False)
class CaptionRuns:
    """The runs of a tar of n samples and r rows.

    Attributes:
        bound_N: (n + 1,) first row of each sample's run; that of the next sample ends it.
        source_r: see `CaptionRows`.
        hash_r: see `CaptionRows`.
    """

    bound_N: npt.NDArray[np.int64]
    source_r: npt.NDArray[np.uint8]
    hash_r: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, end_n: npt.NDArray[Any], source_r: npt.NDArray[Any], hash_r: npt.NDArray[Any]) -> Self:
        """Return the runs that end there; see `CaptionRows` for sources and hashes."""
        bound_N = np.concatenate([[0], end_n.astype(np.int64)])
        return cls(bound_N, source_r.astype(np.uint8), hash_r.astype(np.uint64))

    def row(self, ordinal: int, number: int, caption: str | None) -> int | None:
        """Return the row of a caption of a sample; None where there is none, or one of another caption."""
        row = int(self.bound_N[ordinal]) + number
        if number < 0 or row >= self.bound_N[ordinal + 1]:
            return None
        return row if caption is None or self.hash_r[row] == caption_hash(caption) else None

    def rows(
        self, ordinals_m: npt.NDArray[np.int64], numbers_m: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the (m,) rows of captions of m samples, and which of the m have no such caption."""
        rows_m = self.bound_N[ordinals_m] + numbers_m
        outside = np.flatnonzero((numbers_m < 0) | (rows_m >= self.bound_N[ordinals_m + 1]))
        return rows_m, outside

    def addresses(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return of which sample each row is, (r,), and the number of its caption among those of the sample, (r,)."""
        ordinal_r = np.repeat(np.arange(len(self.bound_N) - 1), np.diff(self.bound_N))
        return ordinal_r, np.arange(len(ordinal_r)) - self.bound_N[ordinal_r]

    def captions(self, ordinal: int) -> CaptionRows:
        """Return the captions of a sample."""
        run = slice(self.bound_N[ordinal], self.bound_N[ordinal + 1])
        return CaptionRows(self.source_r[run], self.hash_r[run])
