"""The join of a cache to the tars of a run: by address (tar, ordinal), checked by the hash of the sample's key.

No teacher runs, except for rows that the cache lacks in a run with `on_missing_row: live`.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from threetowers.cache.encoders.names import EncoderName
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Manifest, ManifestError, Side
from threetowers.cache.read.embedding_cache import EmbeddingCache, Float64Array
from threetowers.cache.read.stream import SharedRows, TarRows, stream_rows
from threetowers.cache.read.tar_columns import OK, TarColumns
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash
from threetowers.trainer.data.joins.sample_members import SampleMembers
from threetowers.trainer.data.joins.visit import Visit

if TYPE_CHECKING:
    from threetowers.cache.encoders.encoder import FrozenEncoder

CachedRow = npt.NDArray[np.float32]  # one embedding, (D,), or those of k captions of a sample, (k, D)
FEW_TARS = 256
MOST_OPEN_TARS = 4096  # each is a memory map, of which a process may have some tens of thousands
Stored = TypeVar("Stored")  # what a cache holds for one visit of a sample


class MissingRow(ValueError):
    """A row that neither the cache nor the teacher can give. The message has the reason."""


class CacheJoin(ABC, Generic[Stored]):
    """The rows of one cache for the tars of a run, each of which has a number: its position in the run's list.

    Attributes:
        side: Which side of the samples the cache must hold.
    """

    side: ClassVar[Side]

    def __init__(
        self,
        path: str | Path,
        tars: Sequence[TarIndex],
        encoder: str | None = None,
        *,
        dim: int | None = None,
        on_missing_row: str = "error",
        weights: str | None = None,
        allow_incomplete: bool = False,
        datasets: Sequence[range] | None = None,
    ) -> None:
        """Open the cache and find the tars in it.

        Args:
            path: Folder or URL of the cache.
            tars: The run's list.
            encoder: The encoder that the cache must be of, as `CacheTower.encoder`; None accepts any.
            dim: The width that its rows must have; None accepts any.
            on_missing_row: See `CacheTower.on_missing_row`.
            weights: See `CacheTower.weights`.
            allow_incomplete: Accept tars whose rows are not built yet.
            datasets: The tar numbers of each data set of a mixture. A data set of which the cache holds no tar has no
                rows, unless `on_missing_row` is error.

        Raises:
            ManifestError: The cache is missing, not built completely, of other tars, of the other side of the samples,
                of another encoder or width.
        """
        # Random access comes back to every tar: keep them open, 17 bytes a sample and 9 a caption of text
        self.cache = EmbeddingCache.open(path, open_tars=min(max(FEW_TARS, len(tars)), MOST_OPEN_TARS))
        require_side(path, self.cache.manifest, self.side)
        if dim is not None and dim != self.cache.dim:
            raise ManifestError(
                f"{path}: dim: the tower expects rows of width {dim}, found {self.cache.dim} "
                f"({self.cache.manifest.encoder}); give the path of another cache, or set the tower's dim"
            )
        if encoder is not None:
            _require_encoder(path, self.cache.manifest, encoder)
        self.on_missing_row = on_missing_row
        self.tars = list(tars)
        self._weights = weights
        self._teacher: FrozenEncoder | None = None
        self._streamed = SharedRows()  # streams cut tars, so that several want one
        self._compared: set[int] = set()  # tars whose keys have been compared
        # The id of each tar in the cache; None where the cache holds no tar of a data set
        self.tar_ids: list[int | None] = []
        may_lack = on_missing_row != "error" and datasets is not None and len(datasets) > 1
        for tar_numbers in datasets or [range(len(self.tars))]:
            if may_lack and not self._holds_any(tar_numbers):
                self.tar_ids += [None] * len(tar_numbers)
            else:
                self.tar_ids += [self.cache.table.find(self.tars[number]).id for number in tar_numbers]
        if self.tars and all(tar_id is None for tar_id in self.tar_ids):
            raise ManifestError(
                f"{path}: holds none of the run's {len(self.tars)} tars; give the path of a cache of these tars"
            )
        self._check_tars(path)
        if not allow_incomplete:
            self.check_built()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what every process loads and reads itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_teacher", "_streamed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle with no teacher, and no rows in memory."""
        self.__dict__.update(state, _teacher=None, _streamed=SharedRows())

    def _check_tars(self, path: str | Path) -> None:
        """Check whether the run reads what was embedded. Raises ManifestError where it does not."""

    def _holds_any(self, tar_numbers: range) -> bool:
        table = self.cache.table
        tars = [self.tars[number] for number in tar_numbers]
        return any(tar.fingerprint in table.by_fingerprint or table.at(tar.location) for tar in tars)

    def check_built(self) -> None:
        """Check that the cache is built as far as it holds the run's tars.

        Raises:
            ManifestError: The rows of a tar are not built.
        """
        for tar_id in self.tar_ids:
            if tar_id is not None:
                self.cache.record(tar_id)

    def built(self) -> npt.NDArray[np.bool_]:
        """Return for each tar of the run, (T,) bool, whether its rows are built by now, or never will be."""
        built = set(self.cache.finished())
        return np.array([tar_id is None or tar_id in built for tar_id in self.tar_ids])

    def has_rows(self, tar_number: int) -> npt.NDArray[np.bool_]:
        """Return for each sample of a tar, (n,) bool, whether it has an embedding."""
        tar_id = self.tar_ids[tar_number]
        if tar_id is None:
            return np.zeros(len(self.tars[tar_number].samples), np.bool_)
        record = self.cache.record(tar_id)
        if record.n_ok == record.n_samples:
            return np.ones(record.n_samples, np.bool_)
        return np.equal(self.cache.status(tar_id), RowStatus.OK)

    def tar_id(self, tar_number: int) -> int:
        """Return the id of a tar in the cache. Raises ManifestError where it is not there."""
        tar_id = self.tar_ids[tar_number]
        if tar_id is None:
            raise ManifestError(f"{self.cache.storage}: has no rows of {self.tars[tar_number].location}")
        return tar_id

    def is_missing(self, tar_number: int, ordinal: int) -> bool:
        """Return whether a sample has no embedding."""
        tar_id = self.tar_ids[tar_number]
        return tar_id is None or bool(self.cache.columns(tar_id).status_n[ordinal] != OK)

    def columns(self, tar_number: int, streamed: TarRows | None = None) -> TarColumns | None:
        """Return what is stored of a tar beside its embeddings; None where the cache holds nothing of it.

        Args:
            tar_number: The tar.
            streamed: Its rows, where they are at hand.

        Raises:
            ManifestError: The samples of the tar are not those that were embedded, by their keys.
        """
        tar_id = self.tar_ids[tar_number]
        if tar_id is None:
            return None
        columns = self.cache.columns(tar_id) if streamed is None else streamed.columns
        if tar_number not in self._compared:
            samples = self.tars[tar_number].samples
            hash_n = np.fromiter((key_hash(samples.key(i)) for i in range(len(samples))), np.uint64, len(samples))
            if not np.array_equal(hash_n, columns.key_hash_n):
                raise ManifestError(
                    f"{self.cache.storage}: the samples of {self.tars[tar_number].location} have other keys than those "
                    "that were embedded: the tar is not the one that was cached"
                )
            self._compared.add(tar_number)
        return columns

    def rows(
        self,
        tar_number: int,
        ordinals_m: npt.NDArray[np.int64],
        view: int = 0,
        captions_m: npt.NDArray[np.int64] | None = None,
        streamed: TarRows | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the embeddings (m, D) of m samples of a tar whose keys `columns` has compared.

        Args:
            tar_number: The tar.
            ordinals_m: The samples.
            view: View of the rows.
            captions_m: Numbers of their captions, in a cache of text.
            streamed: The rows of the tar, where they are at hand.

        Raises:
            ManifestError: A sample has no such row.
        """
        if streamed is not None:
            return streamed.rows(ordinals_m, captions_m)
        tar_ids_m = np.full(len(ordinals_m), self.tar_id(tar_number))
        return self.cache.rows(tar_ids_m, ordinals_m, view=view % self.cache.n_views, captions=captions_m)

    def stored_row(self, tar_number: int, ordinal: int, visit: Visit) -> Stored | None:
        """Return what is stored for a visit of a sample; None where it is missing and `with_fallback` can do without.

        Raises:
            ManifestError: The cached rows belong to another key, or there are none.
        """
        if self.on_missing_row in ("mask", "live") and self.is_missing(tar_number, ordinal):
            return None
        return self._read(self.tar_id(tar_number), ordinal, self.tars[tar_number].samples.key(ordinal), visit)

    def streamed_rows(
        self, tar_numbers: Sequence[int], view: int
    ) -> Generator[Callable[[int, Visit], Stored | None], None, None]:
        """Yield, tar after tar, a function from an ordinal and a visit of this view to what is stored, or None.

        A thread reads the rows of the next tar meanwhile; for the memory see `cache.read.stream.stream_rows`.

        Raises:
            ManifestError: As `stored_row` does, and for a damaged shard.
        """
        with contextlib.closing(self.streamed_tars(tar_numbers, view)) as rows_of_tars:
            for tar_number, rows in zip(tar_numbers, rows_of_tars, strict=True):
                yield partial(self._take, rows, self.tars[tar_number])

    def streamed_tars(self, tar_numbers: Sequence[int], view: int) -> Generator[TarRows | None, None, None]:
        """Yield the rows of tar after tar, read ahead as by `streamed_rows`; None for tars that the cache lacks."""
        tar_ids = [self.tar_ids[number] for number in tar_numbers]
        cached_ids = [tar_id for tar_id in tar_ids if tar_id is not None]
        streamed = stream_rows(self.cache, cached_ids, view % self.cache.n_views, shared=self._streamed)
        with contextlib.closing(streamed) as rows_of_tars:
            for tar_id in tar_ids:
                yield None if tar_id is None else next(rows_of_tars)

    def _take(self, rows: TarRows | None, tar: TarIndex, ordinal: int, visit: Visit) -> Stored | None:
        return None if rows is None else self._take_from(rows, ordinal, tar.samples.key(ordinal), visit)

    @abstractmethod
    def _read(self, tar_id: int, ordinal: int, key: str, visit: Visit) -> Stored:
        """Return what is stored for a sample, by random access."""

    @abstractmethod
    def _take_from(self, rows: TarRows, ordinal: int, key: str, visit: Visit) -> Stored | None:
        """Return what is stored for a sample in the rows of its tar; None where it has no embedding."""

    @abstractmethod
    def with_fallback(
        self, stored: Stored | None, tar_number: int, visit: Visit, members: SampleMembers
    ) -> CachedRow | None:
        """Return the row of a visit or, where none is stored, what `on_missing_row` puts in its place.

        Args:
            stored: What is stored for the visit; None where there is nothing.
            tar_number: The tar of the sample.
            visit: The visit.
            members: The sample's members, of which only those are read that are needed.

        Returns:
            The row (D,), of text the rows (k, D); None under `mask` where there is none.

        Raises:
            BadSample: There is no usable member to embed.
            MissingRow: The teacher's embedding is not finite.
            ManifestError: The row is missing and there is no fallback, or is that of another caption: the cache or the
                samples have changed.
        """

    def moments(self, tar_numbers: Sequence[int]) -> tuple[CachedRow, CachedRow]:
        """Return the mean and the standard deviation (D,) of the features over some tars."""
        return self.cache.moments(self._tar_ids_of(tar_numbers))

    def covariance(self, tar_numbers: Sequence[int]) -> tuple[Float64Array, Float64Array]:
        """Return the mean (D,) and the covariance (D, D) of the features over some tars."""
        return self.cache.covariance(self._tar_ids_of(tar_numbers))

    def _tar_ids_of(self, tar_numbers: Sequence[int]) -> list[int]:
        """Return the ids in the cache of those tars that it has."""
        tar_ids = [self.tar_ids[number] for number in tar_numbers]
        return [tar_id for tar_id in tar_ids if tar_id is not None]

    def load_teacher(self) -> "FrozenEncoder":
        """Return the teacher of the cache, on the CPU. It is loaded at the first call.

        Raises:
            ManifestError: The teacher at hand is not that of the cache.
            ValueError: Its weights are not where they were at the build; set the tower's `weights`.
        """
        if self._teacher is None:
            from threetowers.cache.encoders.live import live_teacher

            self._teacher = live_teacher(self.cache.manifest, self._weights)
        return self._teacher


def require_side(path: str | Path, manifest: Manifest, side: Side) -> None:
    """Raise ManifestError unless a cache is of the side of the samples that its tower is of."""
    if manifest.of != side:
        raise ManifestError(
            f"{path}: of: the tower expects a cache of {side}, found one of {manifest.of} ({manifest.encoder}); give "
            f"the path of another cache, or set the tower's `of: {manifest.of}`"
        )


def _require_encoder(path: str | Path, manifest: Manifest, encoder: str) -> None:
    """Raise ManifestError unless a cache is of this encoder, and at its size if the name has one."""
    expected = EncoderName.parse(encoder)
    if expected.weights is not None:
        raise ManifestError(
            f"{path}: encoder: expected KIND:NAME[@SIZE], found {encoder!r}: leave its weights out, the cache states "
            "their digest"
        )
    found, wanted = manifest.encoder, expected.model
    if expected.size is not None and manifest.preprocessing is not None:
        found += "@" + "x".join(map(str, sorted(set(manifest.preprocessing.input_size))))
        wanted += f"@{expected.size}"
    if found != wanted:
        raise ManifestError(
            f"{path}: encoder: expected {wanted!r}, found {found!r}; build a cache with the expected one, or change "
            "the tower's encoder"
        )
