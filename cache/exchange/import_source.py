"""What an import takes its rows from, whatever the files: found by hashes of keys or captions, and counted."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.dtypes import Float32Array

UNIT_TOLERANCE = 0.01

Int64 = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


class ImportSource(ABC):
    """Numbered rows, or samples with several rows each, found by the hash of a key or caption.

    Attributes:
        units: what is numbered, for messages.
        dim: width of the rows.
        repeated: of the units, those whose key an earlier one has too, with the same values.
        used_N: (N,) which were asked for.
    """

    units: ClassVar[str] = "rows"
    dim: int
    repeated: int = 0

    def __init__(self, hash_N: Hashes) -> None:
        self._number_N: Int64 = np.argsort(hash_N, kind="stable")
        self._hash_N = hash_N[self._number_N]
        self.used_N = np.zeros(len(hash_N), np.bool_)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.used_N)

    def find(self, hash_n: Hashes) -> Int64:
        """Return the (n,) number of each key, -1 where there is none."""
        if not len(self._hash_N):
            return np.full(len(hash_n), -1)
        at_n = np.minimum(np.searchsorted(self._hash_N, hash_n), len(self._hash_N) - 1)
        found_n: Int64 = np.where(self._hash_N[at_n] == hash_n, self._number_N[at_n], -1)
        return found_n

    def first_unused(self, count: int) -> list[int]:
        """Return the first few that were not asked for, but could have been: repeated ones are passed over."""
        unused: list[int] = np.sort(self._number_N[~self.used_N[self._number_N]])[:count].tolist()
        return unused

    def repeats(self) -> Int64:
        """Return where, in the order of the hashes, one is equal to the hash before it."""
        found: Int64 = np.flatnonzero(self._hash_N[1:] == self._hash_N[:-1]) + 1
        return found

    @property
    @abstractmethod
    def location(self) -> str:
        """Where the rows are, for messages."""

    @abstractmethod
    def name(self, number: int) -> str:
        """Return the file and place of one, for messages."""

    @abstractmethod
    def first_key(self) -> str:
        """Return some key or caption, for messages, with the file that it is in."""

    @abstractmethod
    def probe(self) -> Float32Array:
        """Return some (n, D) rows, evenly spaced."""

    def have_unit_norm(self) -> bool:
        """Return whether the rows have unit norm: some of them, those with NaN left out."""
        norm_n = np.linalg.norm(self.probe(), axis=1)
        norm_n = norm_n[np.isfinite(norm_n)]
        return bool(len(norm_n)) and bool((np.abs(norm_n - 1) < UNIT_TOLERANCE).all())
