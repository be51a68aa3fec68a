"""The join of a cache to tars: by address (tar, ordinal), verified by the hash of the key.

No teacher runs here, unless a tower asks for the rows that its cache lacks to be computed (`on_missing_row: live`).
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.read.stream import stream_rows
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash
from threetowers.trainer.config import CacheTower

if TYPE_CHECKING:
    from threetowers.cache.encoders.teacher import Teacher

Row = npt.NDArray[np.float32]


class NoRow(ValueError):
    """A row that neither the cache nor the teacher has. The message says why."""


class CacheJoin:
    """The rows of one cache for a list of tars."""

    def __init__(
        self,
        path: str | Path,
        tars: Sequence[TarIndex],
        backbone: str | None = None,
        *,
        on_missing_row: str = "error",
        weights: str | None = None,
        unbuilt: bool = False,
        sets: Sequence[range] | None = None,
    ) -> None:
        """`on_missing_row`, `weights`: see CacheTower. `unbuilt`: tars whose rows are still to come are welcome.

        `sets`: where the tars are of several sets, the numbers of each. A set of which the cache has no tar at all has
        no rows; on_missing_row says what becomes of its samples.

        Raises:
            ContractError: the cache is missing, half built, of other tars, or not of the `backbone` named.
        """
        self.cache = EmbeddingCache.open(path)
        found = self.cache.manifest.backbone
        if backbone is not None and found != backbone:
            raise ManifestError(f"{path}: backbone: expected {backbone!r}, found {found!r}; build a cache of that one")
        self.on_missing_row, self._weights = on_missing_row, weights
        self.tars = list(tars)
        self.tar_ids: list[int | None] = []
        for numbers in sets or [range(len(self.tars))]:
            absent = sets is not None and len(sets) > 1 and on_missing_row != "error" and self._knows_none(numbers)
            self.tar_ids += [None if absent else self.cache.table.find(self.tars[n]).id for n in numbers]
        if self.tars and all(tar_id is None for tar_id in self.tar_ids):
            raise ManifestError(
                f"{path}: a cache of none of the run's {len(self.tars)} tars; name the one of these tars"
            )
        self._teacher: Teacher | None = None
        if not unbuilt:
            self.check_built()

    @classmethod
    def of(cls, tower: CacheTower, tars: Sequence[TarIndex], *, unbuilt: bool, sets: Sequence[range]) -> "CacheJoin":
        """The join that a tower of a run asks for."""
        options: dict[str, Any] = {"on_missing_row": tower.on_missing_row, "weights": tower.weights, "unbuilt": unbuilt}
        return cls(tower.path, tars, tower.backbone, **options, sets=sets)

    def _knows_none(self, numbers: range) -> bool:
        table = self.cache.table
        tars = [self.tars[number] for number in numbers]
        return not any(tar.fingerprint in table.by_fingerprint or table.at(tar.location) for tar in tars)

    def check_built(self) -> None:
        """Raise ContractError unless the rows of all tars are built that the cache is to have."""
        for tar_id in self.tar_ids:
            if tar_id is not None:
                self.cache.record(tar_id)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_teacher": None}

    def finished(self) -> npt.NDArray[np.bool_]:
        """Return which tars of the list have their rows built by now."""
        built = set(self.cache.finished())
        return np.array([tar_id is None or tar_id in built for tar_id in self.tar_ids])

    def good_rows(self, number: int) -> npt.NDArray[np.bool_]:
        """Return which samples of the tar at place `number` of the list have an embedding."""
        tar_id = self.tar_ids[number]
        if tar_id is None:
            return np.zeros(len(self.tars[number].samples), np.bool_)
        record = self.cache.record(tar_id)
        if record.n_ok == record.n_samples:
            return np.ones(record.n_samples, np.bool_)
        good_n: npt.NDArray[np.bool_] = self.cache.status(tar_id) == RowStatus.OK
        return good_n

    def moments(self, numbers: Sequence[int] | None = None) -> tuple[Row, Row]:
        """Return mean and standard deviation (D,) of the features over tars of the list, by default over all of it."""
        ids = [self.tar_ids[i] for i in (range(len(self.tars)) if numbers is None else numbers)]
        return self.cache.moments([tar_id for tar_id in ids if tar_id is not None])

    def row(self, number: int, ordinal: int, view: int = 0) -> Row:
        """Return one embedding (D,). Raises ContractError when the cached row belongs to another key."""
        tar, tar_id = self.tars[number], self.tar_ids[number]
        if tar_id is None:
            raise ManifestError(f"{self.cache.storage}: has no rows of {tar.location}")
        return self.cache.row(tar_id, ordinal, tar.samples[ordinal].key, view)

    def stored_row(self, number: int, ordinal: int, view: int) -> Row | None:
        """Return one embedding (D,), None where there is none and `on_missing_row` has an answer. Raises as `row`."""
        tar_id = self.tar_ids[number]
        missing = tar_id is None or self.cache.columns(tar_id).status_n[ordinal] != RowStatus.OK
        return None if missing and self.on_missing_row in ("mask", "live") else self.row(number, ordinal, view)

    def streamed_rows(self, numbers: Sequence[int], view: int) -> Generator[Callable[[int], Row | None], None, None]:
        """Yield, tar after tar, what gives the embedding (D,) of an ordinal, or None. The next tar is read meanwhile.

        Memory: that of `cache.stream.stream_rows`. Raises ContractError as `row` does, and for a damaged shard.
        """
        ids = [self.tar_ids[number] for number in numbers]
        with contextlib.closing(stream_rows(self.cache, [i for i in ids if i is not None], view)) as found:
            for number, tar_id in zip(numbers, ids, strict=True):
                if tar_id is None:
                    yield lambda ordinal: None
                else:
                    rows, tar = next(found), self.tars[number]
                    yield lambda ordinal, rows=rows, tar=tar: rows.row(ordinal, tar.samples[ordinal].key)  # type: ignore[misc]

    def filled(
        self, row: Row | None, number: int, ordinal: int, view: int, picture: Callable[[], Image.Image]
    ) -> Row | None:
        """Return a stored row as `on_missing_row` has it: None under mask where there is none, and computed under live.

        `picture` is asked for under live alone. Raises NoRow where the teacher cannot help either.
        """
        if row is not None or self.on_missing_row == "mask":
            return row
        if self.on_missing_row == "live":
            return self._live_row(number, ordinal, view, picture())
        return self.row(number, ordinal, view)  # it was there when the epoch began: this says what has become of it

    def training_row(self, number: int, ordinal: int, view: int, picture: Callable[[], Image.Image]) -> Row | None:
        """Return `stored_row`, `filled`."""
        return self.filled(self.stored_row(number, ordinal, view), number, ordinal, view, picture)

    def crop(self, number: int, ordinal: int, view: int, size: tuple[int, int]) -> Row:
        """Return where a view of crops was cut from an image of this (width, height): (5,) for `views.apply_crop`."""
        tar_id = self.tar_ids[number]
        if tar_id is not None:
            params_5 = self.cache.view_params(tar_id, ordinal, view)
            if np.isfinite(params_5).all():
                return params_5
        drawn_5: Row = self.cache.manifest.views.params(key_hash(self.tars[number].samples[ordinal].key), *size)[view]
        return drawn_5  # a picture that the build left out, or never had: as it would have been cut

    def load_teacher(self) -> "Teacher":
        """Return the teacher of the cache, on the CPU; loaded at the first call.

        Raises:
            ContractError: the one at hand is not that of the cache.
            ValueError: its weights are no longer where they were: name them in the tower's `weights`.
        """
        if self._teacher is None:
            from threetowers.cache.encoders.live import live_teacher

            self._teacher = live_teacher(self.cache.manifest, self._weights)
        return self._teacher

    def _live_row(self, number: int, ordinal: int, view: int, picture: Image.Image) -> Row:
        from threetowers.cache.encoders.live import embed, view_pixels

        teacher, cropped = self.load_teacher(), self.cache.manifest.views.cropped
        params_5 = self.crop(number, ordinal, view, picture.size) if cropped else None
        row_D: Row = embed(teacher, [view_pixels(teacher, picture, view, params_5)])[0]
        if not np.isfinite(row_D).all():
            raise NoRow(f"the teacher {teacher.backbone!r} gives an embedding that is not finite")
        return row_D
