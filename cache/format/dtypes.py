"""Storage dtypes: how float32 rows are stored, and what that costs in cosine.

Every row is compared with what was computed when it is written. A row whose error exceeds the bound of its dtype stops
the build: the remedy is another dtype.
"""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
StoredArray = npt.NDArray[np.generic]
DtypeName = Literal["float16", "float32", "bfloat16", "int8"]

BFLOAT16_NAN = 0x7FC0


class StorageDtype(ABC):
    """A number format of stored rows.

    Attributes:
        name: its name in the manifest and on the command line.
        stored: NumPy type on disk.
        scaled: whether a float32 scale per row is stored beside the rows.
        fill: value of a row without an embedding.
        min_cosine: bound below which a build is refused.
    """

    name: DtypeName
    stored: str
    scaled = False
    fill: float | int = float("nan")
    min_cosine: float

    @abstractmethod
    def encode(self, rows_nD: Float32Array) -> tuple[StoredArray, Float32Array | None]:
        """Return (n, D) rows as stored, and their (n,) scales if `scaled`.

        A row that does not fit decodes to nonfinite values.
        """

    @abstractmethod
    def decode(self, stored_nD: StoredArray, scale_n: Float32Array | None) -> Float32Array:
        """Return (n, D) rows as a reader sees them; NaN for rows without an embedding."""

    def row_bytes(self, dim: int) -> int:
        """Return the bytes of one row of `dim` numbers with its scale."""
        return dim * np.dtype(self.stored).itemsize + 4 * self.scaled


class _NumpyDtype(StorageDtype):
    """A type that NumPy has."""

    def encode(self, rows_nD: Float32Array) -> tuple[StoredArray, None]:
        """Return the rows cast to the stored type; what overflows becomes infinite."""
        with np.errstate(over="ignore"):
            return rows_nD.astype(self.stored), None

    def decode(self, stored_nD: StoredArray, scale_n: Float32Array | None) -> Float32Array:
        """Return the rows cast to float32."""
        return stored_nD.astype(np.float32)


class Float16Dtype(_NumpyDtype):
    """IEEE half precision: up to 65504."""

    name = stored = "float16"
    min_cosine = 0.9999


class Float32Dtype(_NumpyDtype):
    """Single precision: rows as they were computed."""

    name = stored = "float32"
    min_cosine = 0.999999


class BFloat16Dtype(StorageDtype):
    """The upper half of a float32, rounded to nearest even, in a uint16 array: Zarr has no bfloat16."""

    name = "bfloat16"
    stored = "uint16"
    fill = BFLOAT16_NAN
    min_cosine = 0.9999

    def encode(self, rows_nD: Float32Array) -> tuple[StoredArray, None]:
        """Return the upper 16 bits of each number, rounded; NaN stays NaN."""
        bits = np.ascontiguousarray(rows_nD, np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(rows_nD), np.uint16(BFLOAT16_NAN), rounded), None

    def decode(self, stored_nD: StoredArray, scale_n: Float32Array | None) -> Float32Array:
        """Return the rows with the lower 16 bits zero."""
        return (stored_nD.astype(np.uint32) << 16).view(np.float32)


class Int8Dtype(StorageDtype):
    """Integers from -127 to 127 times the row's scale, its largest magnitude over 127."""

    name = "int8"
    stored = "int8"
    scaled = True
    fill = 0
    min_cosine = 0.999

    def encode(self, rows_nD: Float32Array) -> tuple[StoredArray, Float32Array]:
        """Return the rounded multiples of each row's scale, and the scales; NaN for a nonfinite row."""
        with np.errstate(invalid="ignore"):
            scale_n = (np.abs(rows_nD).max(axis=1, initial=0) / 127).astype(np.float32)
        scale_n[~np.isfinite(scale_n)] = np.nan
        divisor_n1 = np.where(scale_n > 0, scale_n, np.float32(1))[:, None]
        steps_nD = np.rint(np.where(np.isnan(scale_n)[:, None], 0, rows_nD) / divisor_n1)
        return np.clip(steps_nD, -127, 127).astype(np.int8), scale_n

    def decode(self, stored_nD: StoredArray, scale_n: Float32Array | None) -> Float32Array:
        """Return the integers times their row's scale."""
        if scale_n is None:
            raise ValueError("int8 rows need their scales")
        return stored_nD.astype(np.float32) * scale_n[:, None].astype(np.float32)


STORAGE_DTYPES: dict[str, StorageDtype] = {
    dtype.name: dtype for dtype in (Float16Dtype(), Float32Dtype(), BFloat16Dtype(), Int8Dtype())
}


def storage_dtype(name: str) -> StorageDtype:
    """Return the storage dtype of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in STORAGE_DTYPES:
        raise ValueError(f"dtype {name!r}: expected one of {', '.join(STORAGE_DTYPES)}")
    return STORAGE_DTYPES[name]


def cosines(a_nD: npt.NDArray[np.floating], b_nD: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return the (n,) cosines of the rows of two arrays in float64: 1 where both are zero, 0 where one is."""
    a = a_nD.astype(np.float64)
    b = b_nD.astype(np.float64)
    dot = (a * b).sum(axis=1)
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(both_zero, 1.0, dot / np.where(norms > 0, norms, 1.0))


def storage_cosines(dtype: StorageDtype, rows_nD: Float32Array) -> npt.NDArray[np.float64]:
    """Return the (n,) cosine of each row, as this dtype stores it, with the row itself; 0 where it does not fit."""
    decoded = dtype.decode(*dtype.encode(rows_nD))
    fits = np.isfinite(decoded).all(axis=1)
    found = np.zeros(len(rows_nD))
    found[fits] = cosines(rows_nD[fits], decoded[fits])
    return found
