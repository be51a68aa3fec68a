"""The rows of a source of embeddings, found by the hashes of their keys."""

from collections.abc import Callable, Sequence

import numpy as np

from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.import_source import ImportSource, Int64
from threetowers.cache.exchange.matrix import MatrixPart
from threetowers.cache.format.dtypes import Float32Array, cosines

# Of two rows of one key: the same input in another batch or on another device, as `verify --depth recompute` allows.
MIN_REPEAT_COSINE = 0.998
COMPARED_ROWS = 4096
PROBED_ROWS = 1024


class SourceRows(ImportSource):
    """All rows of some matrices, numbered: 17 bytes a row in memory, about twice as many while they are sorted."""

    def __init__(self, parts: Sequence[MatrixPart], hash_of: Callable[[str], int]) -> None:
        """Read all keys.

        Raises:
            BadSource: The matrices differ in width, or two rows of one key in their values.
        """
        self._parts = parts
        self.dim = parts[0].rows_nD.shape[1]
        for part in parts:
            if part.rows_nD.shape[1] != self.dim:
                raise BadSource(
                    f"{part.rows_path}: rows of width {part.rows_nD.shape[1]}, expected {self.dim} as in "
                    f"{parts[0].rows_path}"
                )
        self._start_P = np.cumsum([0, *(len(part.rows_nD) for part in parts)])
        hash_N = np.zeros(self._start_P[-1], np.uint64)
        for part, start in zip(parts, self._start_P.tolist(), strict=False):
            at = start
            for keys in part.key_blocks():
                hash_N[at : at + len(keys)] = [hash_of(key) for key in keys]
                at += len(keys)
        super().__init__(hash_N)
        self.repeated = self._drop_repeated()

    def take(self, row_n: Int64) -> Float32Array:
        """Return (n, D) rows by number."""
        rows_nD = np.empty((len(row_n), self.dim), np.float32)
        part_n = np.searchsorted(self._start_P, row_n, side="right") - 1
        for number in np.unique(part_n).tolist():
            here = np.flatnonzero(part_n == number)
            here = here[np.argsort(row_n[here])]  # a file is read forwards
            with np.errstate(over="ignore"):  # of float64; infinite rows are rejected where they are stored
                rows_nD[here] = self._parts[number].rows_nD[row_n[here] - self._start_P[number]]
        return rows_nD

    def name(self, number: int) -> str:
        """Return the file of a row, and its number there, for messages."""
        part = int(np.searchsorted(self._start_P, number, side="right")) - 1
        return f"row {number - self._start_P[part]} of {self._parts[part].rows_path}"

    @property
    def location(self) -> str:
        """The first matrix."""
        return str(self._parts[0].rows_path)

    def first_key(self) -> str:
        """Return the first key, and its file."""
        found = next((key for part in self._parts for keys in part.key_blocks() for key in keys), None)
        return f"{self._parts[0].keys_path} has {found!r}"

    def probe(self) -> Float32Array:
        """Return some (n, D) rows, evenly spaced."""
        return self.take(np.arange(0, len(self), max(1, len(self) // PROBED_ROWS)))

    def _drop_repeated(self) -> int:
        """Keep the first row of each key, and return how many were not. Raises BadSource where they differ."""
        later = self.repeats()
        for start in range(0, len(later), COMPARED_ROWS):
            at = later[start : start + COMPARED_ROWS]
            a_nD, b_nD = self.take(self._number_N[at - 1]), self.take(self._number_N[at])
            finite_n = np.isfinite(a_nD).all(axis=1) & np.isfinite(b_nD).all(axis=1)
            same_n = np.zeros(len(at), np.bool_)
            same_n[finite_n] = cosines(a_nD[finite_n], b_nD[finite_n]) >= MIN_REPEAT_COSINE
            if not same_n.all():
                first = int(at[np.flatnonzero(~same_n)[0]])
                raise BadSource(
                    f"{self.name(self._number_N[first - 1])} and {self.name(self._number_N[first])}: two different "
                    "embeddings of one key, expected one: keys that are not unique (--match, --key-column)"
                )
        kept = np.ones(len(self._hash_N), np.bool_)
        kept[later] = False
        self._hash_N, self._number_N = self._hash_N[kept], self._number_N[kept]
        return len(later)
