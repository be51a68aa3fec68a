"""The join of a cache to tars: by address (tar, ordinal), verified by the hash of the key.

No teacher runs here, unless a tower asks for the rows that its cache lacks to be computed (`on_bad_row: live`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from threetowers.cache.contract import ContractError
from threetowers.cache.layout import Status
from threetowers.cache.reader import EmbeddingCache
from threetowers.cache.tars import TarIndex, key_hash
from threetowers.trainer.config import CacheTower

if TYPE_CHECKING:
    from threetowers.cache.teacher import Teacher

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
        on_bad_row: str = "error",
        weights: str | None = None,
        unbuilt: bool = False,
    ) -> None:
        """`on_bad_row`, `weights`: see CacheTower. `unbuilt`: tars whose rows are still to come are welcome.

        Raises:
            ContractError: the cache is missing, half built, of other tars, or not of the `backbone` named.
        """
        self.cache = EmbeddingCache.open(path)
        found = self.cache.contract.backbone
        if backbone is not None and found != backbone:
            raise ContractError(f"{path}: backbone: expected {backbone!r}, found {found!r}; build a cache of that one")
        self.on_bad_row, self._weights = on_bad_row, weights
        self.tars = list(tars)
        self.tar_ids = [self.cache.table.find(tar).id for tar in self.tars]
        self._teacher: Teacher | None = None
        if not unbuilt:
            for tar_id in self.tar_ids:
                self.cache.record(tar_id)

    @classmethod
    def of(cls, tower: CacheTower, tars: Sequence[TarIndex], *, unbuilt: bool) -> "CacheJoin":
        """The join that a tower of a run asks for."""
        options: dict[str, Any] = {"on_bad_row": tower.on_bad_row, "weights": tower.weights, "unbuilt": unbuilt}
        return cls(tower.path, tars, tower.backbone, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_teacher": None}

    def finished(self) -> npt.NDArray[np.bool_]:
        """Return which tars of the list have their rows built by now."""
        finished_T: npt.NDArray[np.bool_] = np.isin(self.tar_ids, self.cache.finished())
        return finished_T

    def good_rows(self, number: int) -> npt.NDArray[np.bool_]:
        """Return which samples of the tar at place `number` of the list have an embedding."""
        tar_id = self.tar_ids[number]
        record = self.cache.record(tar_id)
        if record.n_ok == record.n_samples:
            return np.ones(record.n_samples, np.bool_)
        good_n: npt.NDArray[np.bool_] = self.cache.status(tar_id) == Status.OK
        return good_n

    def moments(self, numbers: Sequence[int] | None = None) -> tuple[Row, Row]:
        """Return mean and standard deviation (D,) of the features over tars of the list, by default over all of it."""
        return self.cache.moments([self.tar_ids[i] for i in (range(len(self.tars)) if numbers is None else numbers)])

    def row(self, number: int, ordinal: int, view: int = 0) -> Row:
        """Return one embedding (D,). Raises ContractError when the cached row belongs to another key."""
        return self.cache.row(self.tar_ids[number], ordinal, self.tars[number].samples[ordinal].key, view)

    def training_row(self, number: int, ordinal: int, view: int, picture: Callable[[], Image.Image]) -> Row | None:
        """Return one embedding (D,) as `on_bad_row` has it: None under mask where there is none.

        `picture` is asked for under live alone. Raises ContractError as `row` does, and NoRow where the teacher cannot
        help either.
        """
        status = self.cache.slot(self.tar_ids[number]).status_n[ordinal]
        if status == Status.OK or self.on_bad_row not in ("mask", "live"):
            return self.row(number, ordinal, view)
        return None if self.on_bad_row == "mask" else self._live_row(number, ordinal, view, picture())

    def crop(self, number: int, ordinal: int, view: int, size: tuple[int, int]) -> Row:
        """Return where a view of crops was cut from the picture of this (width, height): (5,) for `views.replay`."""
        params_5 = self.cache.view_params(self.tar_ids[number], ordinal, view)
        if np.isfinite(params_5).all():
            return params_5
        drawn_5: Row = self.cache.contract.views.params(key_hash(self.tars[number].samples[ordinal].key), *size)[view]
        return drawn_5  # a picture that the build left out: as it would have been cut

    def load_teacher(self) -> "Teacher":
        """Return the teacher of the cache, on the CPU; loaded at the first call.

        Raises:
            ContractError: the one at hand is not that of the cache.
            ValueError: its weights are no longer where they were: name them in the tower's `weights`.
        """
        if self._teacher is None:
            from threetowers.cache.live import live_teacher

            self._teacher = live_teacher(self.cache.contract, self._weights)
        return self._teacher

    def _live_row(self, number: int, ordinal: int, view: int, picture: Image.Image) -> Row:
        from threetowers.cache.live import embed, view_pixels

        teacher, cropped = self.load_teacher(), self.cache.contract.views.cropped
        params_5 = self.crop(number, ordinal, view, picture.size) if cropped else None
        row_D: Row = embed(teacher, [view_pixels(teacher, picture, view, params_5)])[0]
        if not np.isfinite(row_D).all():
            raise NoRow(f"the teacher {teacher.backbone!r} gives an embedding that is not finite")
        return row_D
