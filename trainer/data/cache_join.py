"""The join of a cache to the tars of a run: by address (tar, ordinal), checked by the hash of the sample's key.

No teacher runs, except for rows that the cache lacks in a run with `on_missing_row: live`.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from threetowers.cache.encoders.names import EncoderName
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.read.stream import stream_rows
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash

if TYPE_CHECKING:
    from threetowers.cache.encoders.encoder import FrozenEncoder

CachedRow = npt.NDArray[np.float32]  # one embedding, (D,)


class MissingRow(ValueError):
    """A row that neither the cache nor the teacher can give. The message has the reason."""


class CacheJoin:
    """The rows of one cache for the tars of a run, each of which has a number: its position in the run's list."""

    def __init__(
        self,
        path: str | Path,
        tars: Sequence[TarIndex],
        encoder: str | None = None,
        *,
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
            on_missing_row: See `CacheTower.on_missing_row`.
            weights: See `CacheTower.weights`.
            allow_incomplete: Accept tars whose rows are not built yet.
            datasets: The tar numbers of each data set of a mixture. A data set of which the cache holds no tar has no
                rows, unless `on_missing_row` is error.

        Raises:
            ManifestError: The cache is missing, not built completely, of other tars or of another encoder.
        """
        self.cache = EmbeddingCache.open(path)
        if encoder is not None:
            _require_encoder(path, self.cache.manifest, encoder)
        self.on_missing_row = on_missing_row
        self.tars = list(tars)
        self._weights = weights
        self._teacher: FrozenEncoder | None = None
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
        self._check_image_members(path)
        if not allow_incomplete:
            self.check_built()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the teacher, which every process loads itself."""
        return self.__dict__ | {"_teacher": None}

    def _check_image_members(self, path: str | Path) -> None:
        expected = self.cache.manifest.image_member
        for tar, tar_id in zip(self.tars, self.tar_ids, strict=True):
            if tar_id is not None and tar.samples.image_member != expected:
                raise ManifestError(
                    f"{path}: image_member: the cache was built from {_member(expected)}, the images of {tar.location} "
                    f"are {_member(tar.samples.image_member)}; set image_member (data.image_member, --image-member) to "
                    "that of the cache, or build a cache from the other member"
                )

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

    def moments(self, tar_numbers: Sequence[int]) -> tuple[CachedRow, CachedRow]:
        """Return the mean and the standard deviation (D,) of the features over some tars."""
        tar_ids = [self.tar_ids[number] for number in tar_numbers]
        return self.cache.moments([tar_id for tar_id in tar_ids if tar_id is not None])

    def row(self, tar_number: int, ordinal: int, view: int = 0) -> CachedRow:
        """Return one embedding (D,).

        Raises:
            ManifestError: The cached row belongs to another key, or there is none.
        """
        tar, tar_id = self.tars[tar_number], self.tar_ids[tar_number]
        if tar_id is None:
            raise ManifestError(f"{self.cache.storage}: has no rows of {tar.location}")
        return self.cache.row(tar_id, ordinal, tar.samples[ordinal].key, view)

    def stored_row(self, tar_number: int, ordinal: int, view: int) -> CachedRow | None:
        """Return one embedding (D,), or None where it is missing and `with_fallback` can do without.

        Raises:
            ManifestError: As `row` does.
        """
        if self.on_missing_row in ("mask", "live"):
            tar_id = self.tar_ids[tar_number]
            if tar_id is None or self.cache.columns(tar_id).status_n[ordinal] != RowStatus.OK:
                return None
        return self.row(tar_number, ordinal, view)

    def streamed_rows(
        self, tar_numbers: Sequence[int], view: int
    ) -> Generator[Callable[[int], CachedRow | None], None, None]:
        """Yield, tar after tar, a function from an ordinal to its stored embedding (D,) or None.

        A thread reads the rows of the next tar meanwhile; for the memory see `cache.read.stream.stream_rows`.

        Raises:
            ManifestError: As `row` does, and for a damaged shard.
        """
        tar_ids = [self.tar_ids[number] for number in tar_numbers]
        cached_ids = [tar_id for tar_id in tar_ids if tar_id is not None]
        with contextlib.closing(stream_rows(self.cache, cached_ids, view)) as rows_of_tars:
            for tar_number, tar_id in zip(tar_numbers, tar_ids, strict=True):
                if tar_id is None:
                    yield lambda ordinal: None
                    continue
                rows = next(rows_of_tars)
                tar = self.tars[tar_number]
                yield lambda ordinal, rows=rows, tar=tar: rows.row(ordinal, tar.samples[ordinal].key)  # type: ignore[misc]

    def with_fallback(
        self, row: CachedRow | None, tar_number: int, ordinal: int, view: int, read_image: Callable[[], Image.Image]
    ) -> CachedRow | None:
        """Return a stored row or, where there is none, what `on_missing_row` puts in its place.

        Args:
            row: The stored row, None where there is none.
            tar_number: The tar of the sample.
            ordinal: Its ordinal.
            view: The view of the row.
            read_image: Gives the decoded image; called only where the teacher has to embed it.

        Returns:
            The row (D,); None under `mask` where it is missing.

        Raises:
            MissingRow: The teacher's embedding is not finite.
            ManifestError: The row is missing and there is no fallback: the cache has changed.
        """
        if row is not None or self.on_missing_row == "mask":
            return row
        if self.on_missing_row == "live":
            return self._embed(tar_number, ordinal, view, read_image())
        return self.row(tar_number, ordinal, view)  # it existed when the epoch began: this raises what has changed

    def view_params(self, tar_number: int, ordinal: int, view: int, size: tuple[int, int]) -> CachedRow:
        """Return the parameters (P,) of one view of an image of this (width, height), for `views.render_view`."""
        tar_id = self.tar_ids[tar_number]
        if tar_id is not None:
            stored_P = self.cache.view_params(tar_id, ordinal, view)
            if np.isfinite(stored_P).all():
                return stored_P
        # The build left this image out, or never had it: draw the crops that it would have drawn
        key = self.tars[tar_number].samples[ordinal].key
        drawn_P: CachedRow = self.cache.manifest.views.params(key_hash(key), *size)[view]
        return drawn_P

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

    def _embed(self, tar_number: int, ordinal: int, view: int, image: Image.Image) -> CachedRow:
        from threetowers.cache.encoders.live import embed, view_pixels

        encoder = self.load_teacher().side("image")
        params_P = None
        if self.cache.manifest.views.cropped:
            params_P = self.view_params(tar_number, ordinal, view, image.size)
        row_D: CachedRow = embed(encoder, [view_pixels(encoder, image, view, params_P)], self.cache.manifest.feature)[0]
        if not np.isfinite(row_D).all():
            raise MissingRow(f"the embedding by teacher {encoder.name!r} is not finite")
        return row_D


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


def _member(image_member: str | None) -> str:
    return "the only image of each sample (null)" if image_member is None else f"the member {image_member!r}"
