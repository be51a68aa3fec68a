"""The join of a cache of text: the rows of the captions of a sample that an epoch draws."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.caption_runs import CaptionRows, CaptionRuns
from threetowers.cache.read.stream import TarRows
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.trainer.data.joins.cache_join import CachedRow, CacheJoin, MissingRow
from threetowers.trainer.data.joins.sample_members import SampleMembers
from threetowers.trainer.data.joins.visit import Visit

NO_CAPTION = "no caption"


class DrawnRows(NamedTuple):
    """What a cache of text holds for one visit of a sample.

    Attributes:
        captions: The captions of the sample that were embedded.
        counts: How many of them there are of each source that the run draws from.
        numbers: Numbers of the k that are drawn among `captions`; none where the run draws from none of their sources.
        rows_kD: Their embeddings; None where none is drawn.
    """

    captions: CaptionRows
    counts: dict[str, int]
    numbers: tuple[int, ...]
    rows_kD: CachedRow | None

    @property
    def caption_hashes(self) -> tuple[int, ...]:
        """The hashes of the captions that are drawn."""
        return tuple(self.captions.hash_k[list(self.numbers)].tolist())


class TextJoin(CacheJoin[DrawnRows]):
    """The rows of a cache of text for the tars of a run."""

    side = "text"

    @property
    def source_names(self) -> Sequence[str]:
        """The sources of captions in the cache by their number."""
        return self.cache.manifest.caption_sources.names

    def check_captions(self, captions: CaptionFormat, key: str) -> None:
        """Check that the captions of a data set are among those that are embedded.

        Args:
            captions: Where the run finds them.
            key: The config's key of their data set, for the message.

        Raises:
            ManifestError: They are not.
        """
        embedded = self.cache.manifest.caption_sources
        where = f"{self.cache.storage}: captions"
        wanted = sorted(captions.sources)
        if (not wanted and embedded.sources) or set(wanted) - set(embedded.sources):
            default = "the default sources"
            flag = f"with --captions {' '.join(wanted)}" if wanted else "without --captions"
            raise ManifestError(
                f"{where}: {key}.captions draws from {wanted or default}, expected sources among those that are "
                f"embedded, found {list(embedded.sources) or default}; set {key}.captions to these, or build a cache "
                f"{flag}"
            )
        if captions.caption_per_line != embedded.caption_per_line:
            found = str(embedded.caption_per_line).lower()
            raise ManifestError(
                f"{where}: {key}.caption_per_line: expected that of the cache, {found}, found "
                f"{str(captions.caption_per_line).lower()}; set it to {found}, or build a cache "
                f"{'without' if embedded.caption_per_line else 'with'} --caption-per-line"
            )

    def with_fallback(
        self, stored: DrawnRows | None, tar_number: int, visit: Visit, members: SampleMembers
    ) -> CachedRow | None:
        """Return the rows (k, D) of the captions of a visit, see `CacheJoin.with_fallback`.

        Captions that were read are compared with them.
        """
        if stored is None:
            if self.on_missing_row == "mask":
                return None
            if self.on_missing_row == "live":
                return self._embed(members.captions(visit))
            # It existed when the epoch began: this raises what has changed
            stored = self.stored_row(tar_number, members.ordinal, visit)
            assert stored is not None
        if members.captions_by_source is not None:
            self._compare(stored, visit.captions, members)
        return stored.rows_kD

    def sources(self, tar_number: int, ordinal: int, captions: CaptionFormat) -> list[str]:
        """Return the sources of a sample's cached captions that a run draws from."""
        rows = self.cache.captions(self.tar_id(tar_number), ordinal, self.tars[tar_number].samples.key(ordinal))
        return list(numbers_by_source(rows.source_k, self.source_names, captions))

    def draw(self, captions: CaptionRows, visit: Visit) -> tuple[dict[str, int], tuple[int, ...]]:
        """Return how many of a sample's cached captions each source of the run has, and the numbers of the drawn ones.

        There are none where the run draws from none of their sources.
        """
        numbers = numbers_by_source(captions.source_k, self.source_names, visit.captions)
        counts = {source: len(of_source) for source, of_source in numbers.items()}
        if not counts:
            return counts, ()
        return counts, tuple(numbers[source][position] for source, position in visit.places(counts))

    def draw_numbers(
        self,
        runs: CaptionRuns,
        ordinals_m: npt.NDArray[np.int64],
        captions: CaptionFormat,
        most: int,
        visit_of: Callable[[int], Visit],
    ) -> npt.NDArray[np.int64]:
        """Return the numbers of the drawn captions of m samples of a tar, (m, most), as `draw` does; then -1.

        Nothing is done sample by sample where there is no choice.

        Args:
            runs: The captions of the tar.
            ordinals_m: The samples.
            captions: The captions of the run.
            most: How many are drawn of a sample, where it has as many.
            visit_of: The visit of each of the m samples.
        """
        counts_m = runs.bound_N[ordinals_m + 1] - runs.bound_N[ordinals_m]
        numbers_mk = np.full((len(ordinals_m), most), -1)
        numbers_mk[counts_m > 0, 0] = 0
        draws_from_all = not captions.sources or set(captions.sources) == set(self.source_names)
        for at in np.flatnonzero(counts_m > (1 if draws_from_all else 0)).tolist():
            _, numbers = self.draw(runs.captions(int(ordinals_m[at])), visit_of(at))
            numbers_mk[at] = [*numbers, *[-1] * (most - len(numbers))]
        return numbers_mk

    def _read(self, tar_id: int, ordinal: int, key: str, visit: Visit) -> DrawnRows:
        return self._drawn(
            self.cache.captions(tar_id, ordinal, key),
            visit,
            lambda number: self.cache.caption_row(tar_id, ordinal, key, number),
        )

    def _take_from(self, rows: TarRows, ordinal: int, key: str, visit: Visit) -> DrawnRows | None:
        captions = rows.captions(ordinal, key)
        if captions is None:
            return None
        kept = CaptionRows(captions.source_k.copy(), captions.hash_k.copy())  # not the columns of the whole tar
        return self._drawn(kept, visit, lambda number: rows.caption_row(ordinal, key, number))

    def _drawn(self, captions: CaptionRows, visit: Visit, row_of: Callable[[int], CachedRow | None]) -> DrawnRows:
        counts, numbers = self.draw(captions, visit)
        rows = [row_D for number in numbers if (row_D := row_of(number)) is not None]
        return DrawnRows(captions, counts, numbers, np.stack(rows) if rows else None)

    def _compare(self, stored: DrawnRows, captions: CaptionFormat, members: SampleMembers) -> None:
        """Raise ManifestError where the captions of a sample are no longer those that were embedded."""
        names = self.source_names
        by_source = members.captions_by_source or {}
        rows = stored.captions
        if captions.sources:
            codes = [code for code, name in enumerate(names) if name in captions.sources]
            own_k = np.isin(rows.source_k, codes)
            rows = CaptionRows(rows.source_k[own_k], rows.hash_k[own_k])
        ordered = {name: by_source[name] for name in names if name in by_source}
        if difference := rows.differences(names, ordered):
            raise ManifestError(f"{self.cache.storage}: {members.tar.describe(members.ordinal)}: {difference}")

    def _embed(self, captions: Sequence[str]) -> CachedRow:
        from threetowers.cache.encoders.live import embed_captions

        encoder = self.load_teacher().side("text")
        rows_kD: CachedRow = embed_captions(encoder, captions, self.cache.manifest.feature)
        if not np.isfinite(rows_kD).all():
            raise MissingRow(f"the embedding by teacher {encoder.name!r} is not finite")
        return rows_kD


def numbers_by_source(
    source_k: npt.NDArray[np.uint8], names: Sequence[str], captions: CaptionFormat
) -> dict[str, range]:
    """Return which of a sample's k cached captions are of each source that a run draws from.

    Args:
        source_k: The source of each caption; those of one source are next to each other.
        names: The sources by number.
        captions: The captions of the run.
    """
    found: dict[str, range] = {}
    for number, code in enumerate(source_k.tolist()):
        name = names[code]
        if not captions.sources or name in captions.sources:
            first = found[name].start if name in found else number
            found[name] = range(first, number + 1)
    return found


def no_caption(tar: TarIndex, ordinal: int, captions: CaptionFormat) -> BadSample:
    """Return the error of a sample of whose cached captions none is of a source that the run draws from."""
    return BadSample(
        f"{tar.describe(ordinal)}: {NO_CAPTION} in the cache, expected one in {captions.sources_text()}", NO_CAPTION
    )


def other_captions(tar: TarIndex, ordinal: int, one: str, other: str) -> ManifestError:
    """Return the error of two cached towers that hold different captions of a sample."""
    return ManifestError(
        f"{tar.describe(ordinal)}: the caches of the towers {one!r} and {other!r} hold different captions: the "
        "captions were changed between their builds; build the older one again"
    )
