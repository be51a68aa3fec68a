"""Whose positive each column is: of m own columns each belongs to one of b own rows, or to none."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, slots=True)
class Owners:
    """The owner of each column. Without owners, column i is row i's alone, and what is said of either is of both.

    Sums over a row's columns are taken in the order of the columns, so that they have the same bits at every call, on
    GPUs too.
    """

    owner_m: Tensor | None = None  # int64, from -1 to b - 1; -1: the column is a negative alone
    order_m: Tensor | None = None  # the columns in the order of their owners
    bounds_N: Tensor | None = None  # (b + 2,) where in that order those of -1, 0, 1, ... b - 1 begin, and where all end

    @classmethod
    def of(cls, owner_m: Tensor | None, rows: int) -> Self:
        """Return the owners of the columns of so many rows. Numbers out of range, a fault, are brought into it."""
        if owner_m is None:
            return cls()
        owner_m = owner_m.clamp(-1, rows - 1)
        sorted_m, order_m = owner_m.sort(stable=True)
        bounds_N = torch.searchsorted(sorted_m, torch.arange(-1, rows + 1, device=owner_m.device))
        return cls(owner_m, order_m, bounds_N)

    def counts(self) -> Tensor | None:
        """Return how many columns each row owns, int64 (b,)."""
        return None if self.bounds_N is None else self.bounds_N.diff()[1:]

    def mark(self, values_m: Tensor, without_owner: float) -> Tensor:
        """Return the values, replaced where a column has no owner."""
        return values_m if self.owner_m is None else values_m.masked_fill(self.owner_m < 0, without_owner)

    def of_columns(self, values_b: Tensor, columns: slice = slice(None)) -> Tensor:
        """Return the value (or features) of each column's owner; of a column without one, any finite value."""
        if self.owner_m is None:
            return values_b[columns]
        owner_c = self.owner_m[columns]
        if len(values_b) == 0:
            return values_b.new_zeros(len(owner_c), *values_b.shape[1:])
        return values_b.index_select(0, owner_c.clamp(min=0))

    def by_row(self, values_m: Tensor, reduce: Literal["sum", "max", "min"]) -> Tensor:
        """Return the sum, or the largest or smallest, over each row's columns, (b,); over none 0, -inf or inf."""
        if self.order_m is None or self.bounds_N is None:
            return values_m
        ordered_m = values_m.index_select(0, self.order_m)
        lengths = self.bounds_N.diff()
        reduced: Tensor = torch.segment_reduce(ordered_m, reduce, lengths=lengths, axis=0, unsafe=True)
        return reduced[1:]

    def weighted_sums(self, y_mD: Tensor, weight_m: Tensor) -> Tensor:
        """Return ``Σ weight_j y_j`` over each row's columns, (b, D). Only where owners are given; all of one dtype."""
        assert self.order_m is not None
        assert self.bounds_N is not None
        ordered_m = weight_m.index_select(0, self.order_m)
        sums = embedding_bag(
            self.order_m, y_mD, self.bounds_N, mode="sum", per_sample_weights=ordered_m, include_last_offset=True
        )
        return sums[1:]
