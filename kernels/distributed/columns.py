"""How the column side of every pair, and its gradient, crosses ranks: gathered at once, or in a ring (`ring.py`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.pair_state import PairState

ALIGNMENT = 64  # bytes between the parts of a packed buffer, so that every part is an aligned view

AddGradient = Callable[[int, int, Tensor, Tensor | None], None]
"""Called with a pair's index, a rank, that rank's columns (s, D), and where to add their gradient, or None."""


class ColumnExchange(ABC):
    """The column features of all pairs, rank by rank, and the sums of their gradients.

    Attributes:
        order: whose columns to ask for at each step: the own ones first, while others are on their way.
        packed: what backward needs to have the columns again.
    """

    order: list[int]
    packed: Tensor

    def __init__(self, ranks: RankGroup, pairs: Sequence[PairState]) -> None:
        self._ranks = ranks
        self._pairs = pairs
        # Where each pair begins in a packed buffer of bytes: the same on every rank.
        self._offsets = [0]
        for pair in pairs:
            size = pair.layout.largest * pair.y_bD.shape[1] * pair.y_bD.element_size()
            self._offsets.append(self._offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)

    def _nothing_packed(self) -> Tensor:
        return self._pairs[0].y_bD.new_empty(0, dtype=torch.uint8)

    def _pack(self) -> Tensor:
        """Return the own columns of all pairs as one buffer."""
        packed_N = self._pairs[0].y_bD.new_zeros(self._offsets[-1], dtype=torch.uint8)
        for offset, pair in zip(self._offsets, self._pairs, strict=False):
            raw = pair.y_bD.contiguous().view(torch.uint8).view(-1)
            packed_N[offset : offset + len(raw)] = raw
        return packed_N

    def _unpack(self, packed_N: Tensor, k: int, rank: int) -> Tensor:
        """Return the rows (s, D) of pair k in what this rank packed, as a view."""
        y_bD = self._pairs[k].y_bD
        rows = self._pairs[k].layout.sizes[rank]
        width = y_bD.shape[1]
        start = self._offsets[k]
        raw = packed_N[start : start + rows * width * y_bD.element_size()]
        return raw.view(y_bD.dtype).view(rows, width)

    @abstractmethod
    def columns(self, k: int, rank: int) -> Tensor:
        """Return the rows (s, D) that this rank holds of pair k's column side."""

    @abstractmethod
    def accumulate_gradients(self, add: AddGradient) -> None:
        """Call ``add`` for every pair and rank, and send each rank the sum of what was added for its columns."""

    @abstractmethod
    def own_gradient(self, k: int) -> Tensor | None:
        """Return the complete sum (b, D) for the own columns of pair k; None where no gradient is wanted."""


class GatheredColumns(ColumnExchange):
    """All ranks' columns in one gather, O(B D) memory, on its way while own rows meet own columns.

    The sums for a rank's columns are reduced to it while the next rank's are computed, so they take O(b D) memory.
    """

    def __init__(self, ranks: RankGroup, pairs: Sequence[PairState], packed: Tensor | None = None) -> None:
        """Begin the gather, or take `packed`, an earlier gather of the same features."""
        super().__init__(ranks, pairs)
        self.order = sorted(range(ranks.size), key=lambda rank: (rank != ranks.rank, rank))
        self._wait: Callable[[], Any] | None = None
        self._leaving: list[tuple[Tensor, Callable[[], Any]]] = []
        self._arriving: dict[int, tuple[Tensor, Callable[[], Any]]] = {}
        if packed is not None:
            self.packed = packed
        elif ranks.size == 1:
            self.packed = self._nothing_packed()
        else:
            self.packed, self._wait = ranks.gather_async(self._pack())

    @override
    def columns(self, k: int, rank: int) -> Tensor:
        if rank == self._ranks.rank:
            return self._pairs[k].y_bD
        if self._wait is not None:
            self._wait()
            self._wait = None
        return self._unpack(self.packed[rank], k, rank)

    @override
    def accumulate_gradients(self, add: AddGradient) -> None:
        for k, pair in enumerate(self._pairs):
            sums: dict[int, Tensor] = {}  # by rank: complete, and not yet sent
            next_rank = 0
            for rank in self.order:
                y_sD = self.columns(k, rank)
                dy_sD = None
                if pair.need_y:
                    self._wait_until_leaving(1)  # bounds the memory
                    dy_sD = pair.zero_rows(pair.layout.sizes[rank])
                    sums[rank] = dy_sD
                add(k, rank, y_sD, dy_sD)
                # Collectives must come in one order on all ranks, that of the ranks: the sum for the own columns,
                # which is computed first, waits for its turn.
                while next_rank in sums:
                    self._send(k, next_rank, sums.pop(next_rank))
                    next_rank += 1

    def _send(self, k: int, rank: int, sum_sD: Tensor) -> None:
        sent = sum_sD, self._ranks.reduce_async(sum_sD, rank)
        if rank == self._ranks.rank:
            self._arriving[k] = sent
        else:
            self._leaving.append(sent)

    @override
    def own_gradient(self, k: int) -> Tensor | None:
        self._wait_until_leaving(0)
        if k not in self._arriving:
            return None
        sum_bD, wait = self._arriving.pop(k)
        wait()
        return sum_bD

    def _wait_until_leaving(self, most: int) -> None:
        """Wait until at most this many sums are on their way to other ranks."""
        while len(self._leaving) > most:
            _, wait = self._leaving.pop(0)
            wait()
