"""What a pair's tiles leave out beside the diagonal: entries of equal labels, and entries above a limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from threetowers.kernels.distributed.rank_group import BatchLayout, RankGroup
from threetowers.kernels.operator.owners import Owners


@dataclass(frozen=True, slots=True)
class Exclusions:
    """The labels and the limits of one pair, both of its rows and its columns or neither.

    Labels are of the global batch, limits of the own rows and of all columns.
    """

    row_labels_B: Tensor | None = None  # int32
    col_labels_B: Tensor | None = None
    row_limits_b: Tensor | None = None  # in the back end's dtype
    col_limits_B: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return them as an operator returns them, in this order: empty ones in place of those that are not given."""
        parts = self.row_labels_B, self.col_labels_B, self.row_limits_b, self.col_limits_B
        return [torch.empty(0) if part is None else part for part in parts]

    @classmethod
    def of_tensors(cls, parts: Sequence[Tensor]) -> Self:
        """Return what `tensors` was called of."""
        return cls(*(part if len(part) else None for part in parts))


def group_labels(ranks: RankGroup, group_ids: Tensor | None, layout: BatchLayout) -> Tensor:
    """Return the labels of the global batch's groups, int32 (B,); empty without ids."""
    if group_ids is None:
        return torch.empty(0, dtype=torch.int32)
    return _renumbered(layout.join(ranks.gather(layout.padded(group_ids))))


def owner_labels(
    ranks: RankGroup,
    owners: Owners,
    row_layout: BatchLayout,
    column_layout: BatchLayout,
    group_ids: Tensor | None,
    column_group_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the labels of the rows and of the columns of a global batch whose columns have owners, int32.

    Rows, or groups of rows, differ; a column has the label of its owner. One without owner has its group's, and without
    a group -1, which no row has.
    """
    owner_m = owners.owner_m
    assert owner_m is not None
    has_label_m = owner_m >= 0
    if group_ids is None:
        ids_B = torch.arange(row_layout.total, dtype=torch.int32, device=owner_m.device)
        ids_m = torch.where(has_label_m, owner_m + row_layout.own.start, -1)
        return ids_B, column_layout.join(ranks.gather(column_layout.padded(ids_m))).to(torch.int32)

    ids_m = owners.of_columns(group_ids)
    if column_group_ids is not None:
        ids_m = torch.where(has_label_m, ids_m, column_group_ids)
        has_label_m = torch.ones_like(has_label_m)
    ids_B = row_layout.join(ranks.gather(row_layout.padded(group_ids)))
    columns_m2 = torch.stack([ids_m, has_label_m.to(torch.int64)], 1)
    columns_M2 = column_layout.join(ranks.gather(column_layout.padded(columns_m2)))
    labels_N = _renumbered(torch.cat([ids_B, columns_M2[:, 0]]))
    rows = row_layout.total
    return labels_N[:rows].clone(), torch.where(columns_M2[:, 1] > 0, labels_N[rows:], -1)


def _renumbered(ids_N: Tensor) -> Tensor:
    """Return ids as small numbers from 0, int32, which tiles compare twice as fast.

    Not by torch.unique: it would wait for a GPU to learn how many there are.
    """
    sorted_N, order_N = ids_N.sort()
    differs_N = torch.zeros_like(sorted_N, dtype=torch.int32)
    differs_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return torch.empty_like(differs_N).scatter_(0, order_N, differs_N.cumsum(0, dtype=torch.int32))
