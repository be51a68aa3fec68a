"""Precision tiers: how rows of float32 are stored, and what that costs in cosine.

Every row is compared with what was computed when it is written. A tier whose error is larger than its bound is refused,
not noted: the remedy is another tier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Stored = npt.NDArray[np.generic]
Scale = npt.NDArray[np.float32]
Tier = Literal["float16", "float32", "bfloat16", "int8"]

BFLOAT16_NAN = 0x7FC0


class Precision(ABC):
    """One tier. `stored` is the type on disk, `scaled` says that a float32 per row is stored beside it, `fill` is what
    a row without an embedding holds, `min_cosine` the bound below which a build is refused."""

    name: Tier
    stored: str
    scaled = False
    fill: float | int = float("nan")
    min_cosine: float

    @abstractmethod
    def encode(self, rows_nD: Float32) -> tuple[Stored, Scale | None]:
        """(n, D) rows as stored, and their (n,) scales if `scaled`. What does not fit decodes to what is not finite."""

    @abstractmethod
    def decode(self, stored_nD: Stored, scale_n: Scale | None) -> Float32:
        """(n, D) rows as a reader sees them; NaN for rows without an embedding."""

    def row_bytes(self, dim: int) -> int:
        """Bytes of one row with its scale."""
        return dim * np.dtype(self.stored).itemsize + 4 * self.scaled


class _Plain(Precision):
    """A type that NumPy has."""

    def encode(self, rows_nD: Float32) -> tuple[Stored, None]:
        with np.errstate(over="ignore"):  # what overflows is infinite, and found as such
            return rows_nD.astype(self.stored), None

    def decode(self, stored_nD: Stored, scale_n: Scale | None) -> Float32:
        return stored_nD.astype(np.float32)


class Float16(_Plain):
    name = stored = "float16"
    min_cosine = 0.9999


class Float32Tier(_Plain):
    name = stored = "float32"
    min_cosine = 0.999999


class BFloat16(Precision):
    """The upper half of a float32, rounded to nearest even, in a uint16 array: Zarr has no bfloat16."""

    name = "bfloat16"
    stored = "uint16"
    fill = BFLOAT16_NAN
    min_cosine = 0.9999

    def encode(self, rows_nD: Float32) -> tuple[Stored, None]:
        bits = np.ascontiguousarray(rows_nD, np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(rows_nD), np.uint16(BFLOAT16_NAN), rounded), None

    def decode(self, stored_nD: Stored, scale_n: Scale | None) -> Float32:
        return (stored_nD.astype(np.uint32) << 16).view(np.float32)


class Int8(Precision):
    """Whole numbers of -127 to 127 times the row's scale, its largest magnitude over 127."""

    name = "int8"
    stored = "int8"
    scaled = True
    fill = 0
    min_cosine = 0.999

    def encode(self, rows_nD: Float32) -> tuple[Stored, Scale]:
        with np.errstate(invalid="ignore"):
            scale_n = (np.abs(rows_nD).max(axis=1, initial=0) / 127).astype(np.float32)
        scale_n[~np.isfinite(scale_n)] = np.nan
        divisor_n1 = np.where(scale_n > 0, scale_n, np.float32(1))[:, None]
        steps_nD = np.rint(np.where(np.isnan(scale_n)[:, None], 0, rows_nD) / divisor_n1)
        return np.clip(steps_nD, -127, 127).astype(np.int8), scale_n

    def decode(self, stored_nD: Stored, scale_n: Scale | None) -> Float32:
        if scale_n is None:
            raise ValueError("int8 rows need their scales")
        return stored_nD.astype(np.float32) * scale_n[:, None].astype(np.float32)


PRECISIONS: dict[str, Precision] = {tier.name: tier for tier in (Float16(), Float32Tier(), BFloat16(), Int8())}


def precision(name: str) -> Precision:
    """The tier of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRECISIONS:
        raise ValueError(f"dtype {name!r}: expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def cosines(a_nD: npt.NDArray[np.floating], b_nD: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(n,) cosines of the rows of two arrays in float64: 1 where both are zero, 0 where one is."""
    a, b = a_nD.astype(np.float64), b_nD.astype(np.float64)
    dot, norms = (a * b).sum(axis=1), np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(both_zero, 1.0, dot / np.where(norms > 0, norms, 1.0))


def fidelity(tier: Precision, rows_nD: Float32) -> npt.NDArray[np.float64]:
    """(n,) cosine of each row as this tier stores it with the row itself; 0 where it does not fit."""
    decoded = tier.decode(*tier.encode(rows_nD))
    fits = np.isfinite(decoded).all(axis=1)
    found = np.zeros(len(rows_nD))
    found[fits] = cosines(rows_nD[fits], decoded[fits])
    return found
