"""What ranks must know of each other before any work, exchanged from host to host: no device is waited for.

A rank that has found a fault, or was called with other arguments, tells the others; then all raise, and none waits for
a rank that has left.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from threetowers.kernels.distributed.rank_group import RankGroup

MAX_PAIRS = 32  # bounds what ranks exchange


def agree_on_sizes(
    ranks: RankGroup, fault: str | None, layout: str, rows_K: Sequence[int], columns_K: Sequence[int]
) -> Tensor:
    """Return how many rows, then how many columns of K pairs every rank holds, int64 (W, 2 K) on the CPU. Collective.

    Args:
        ranks: the ranks that share the batch.
        fault: what is wrong on this rank; None if nothing is.
        layout: whatever must be the same on all ranks, as text.
        rows_K: this rank's rows, one number a pair.
        columns_K: its columns.

    Raises:
        ValueError: a rank has a fault or another layout, or no rank has a row, or a column, of some pair; on all ranks.
    """
    sizes_WN = torch.tensor([[*rows_K, *columns_K]], dtype=torch.int64)
    if ranks.size > 1:
        sizes_WN = _exchanged(ranks, fault, layout, sizes_WN[0])
    elif fault:
        raise ValueError(fault)
    for n, total in enumerate(sizes_WN.sum(0).tolist()):
        if total == 0 and n < len(rows_K):
            raise ValueError(f"pair {n}: the global batch is empty; expected at least one sample on some rank")
        if total == 0:
            raise ValueError(f"pair {n - len(rows_K)}: y is empty on all ranks; expected at least one row")
    return sizes_WN


def _exchanged(ranks: RankGroup, fault: str | None, layout: str, sizes_N: Tensor) -> Tensor:
    # One row of fixed length a rank: whether it has a fault, a digest of its layout, its sizes.
    row = torch.zeros(2 + 2 * MAX_PAIRS, dtype=torch.int64)
    row[0] = fault is not None
    row[1] = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:7], "big")
    if fault is None:
        row[2 : 2 + len(sizes_N)] = sizes_N
    rows_Wn = ranks.gather_on_host(row)

    # All ranks see the same rows, and raise together.
    if rows_Wn[:, 0].any():
        faults = [f"rank {rank}: {text}" for rank, text in enumerate(ranks.objects(fault)) if text]
        raise ValueError("; ".join(faults))
    if (rows_Wn[:, 1] != rows_Wn[0, 1]).any():
        layouts = [f"rank {rank}: {text}" for rank, text in enumerate(ranks.objects(layout))]
        raise ValueError("ranks call the loss with different arguments; " + "; ".join(layouts))
    return rows_Wn[:, 2 : 2 + len(sizes_N)].clone()
