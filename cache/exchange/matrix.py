"""Parts of a source of embeddings: a matrix, and what each of its rows is of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.key_file import count_keys, read_keys
from threetowers.cache.exchange.npy_file import open_npy

DEFAULT_COLUMNS = {"image": "key", "text": "caption"}


@dataclass(frozen=True, eq=False)
class MatrixPart:
    """A memory-mapped matrix with a key for each row.

    Attributes:
        rows_path: An .npy file.
        rows_nD: The (n, D) numbers in it.
        keys_path: A file of n keys of samples or, for text, captions; see `read_keys`.
        column: The one that they are in, of a Parquet file.
    """

    rows_path: Path
    rows_nD: npt.NDArray[np.floating]
    keys_path: Path
    column: str

    @classmethod
    def open(cls, rows: Path, keys: Path, column: str) -> Self:
        """Open both files.

        Raises:
            BadSource: One cannot be read, or they do not have as many rows as keys.
        """
        rows_nD = open_npy(rows)
        if rows_nD.ndim != 2 or rows_nD.dtype.kind != "f":
            raise BadSource(f"{rows}: expected a matrix of floats, found {rows_nD.dtype} of shape {rows_nD.shape}")
        n_keys = count_keys(keys, column)
        if n_keys != len(rows_nD):
            raise BadSource(f"{rows}: {len(rows_nD)} rows, expected one for each of the {n_keys} keys in {keys}")
        return cls(rows, rows_nD, keys, column)

    def key_blocks(self) -> Iterator[Sequence[str]]:
        """Yield the keys in the order of the rows, many at a time. Raises BadSource for what is no key."""
        return read_keys(self.keys_path, self.column)


def open_matrices(rows: Sequence[Path], keys: Sequence[Path], column: str) -> list[MatrixPart]:
    """Open several matrices, each with its own keys.

    Raises:
        BadSource: There are more of one than of the other; and as for `MatrixPart.open`.
    """
    if len(rows) != len(keys):
        raise BadSource(
            f"{len(rows)} --rows, {len(keys)} --keys: expected a file of keys for each matrix, in this order"
        )
    return [MatrixPart.open(*pair, column) for pair in zip(rows, keys, strict=True)]
