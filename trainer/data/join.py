"""The join of a cache to tars: by address (tar, ordinal), verified by the hash of the key. No teacher runs here."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from threetowers.cache.contract import ContractError
from threetowers.cache.layout import Status
from threetowers.cache.reader import EmbeddingCache
from threetowers.cache.tars import TarIndex


class CacheJoin:
    """The rows of one cache for a list of tars."""

    def __init__(self, path: str | Path, tars: Sequence[TarIndex], backbone: str | None = None) -> None:
        """Raises ContractError if the cache is missing, half built, of other tars, or not of the `backbone` named."""
        self.cache = EmbeddingCache.open(path)
        found = self.cache.contract.backbone
        if backbone is not None and found != backbone:
            raise ContractError(f"{path}: backbone: expected {backbone!r}, found {found!r}; build a cache of that one")
        self.tars = list(tars)
        self.tar_ids = [self.cache.tar_id(tar) for tar in self.tars]

    def good_rows(self, number: int) -> npt.NDArray[np.bool_]:
        """Return which samples of the tar at place `number` of the list have an embedding."""
        good_n: npt.NDArray[np.bool_] = self.cache.status(self.tar_ids[number]) == Status.OK
        return good_n

    def moments(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return mean and standard deviation (D,) of the features over these tars, whatever else the cache holds."""
        return self.cache.moments(self.tar_ids)

    def row(self, number: int, ordinal: int) -> npt.NDArray[np.float32]:
        """Return one embedding (D,). Raises ContractError when the cached row belongs to another key."""
        return self.cache.row(self.tar_ids[number], ordinal, self.tars[number].samples[ordinal].key)
