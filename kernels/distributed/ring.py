"""The column side travelling from rank to rank, and its gradients with it: O(b D) memory instead of O(B D).

At step s a rank holds the columns of the rank s places after it, so columns move to the rank before. Their gradient
follows one step behind, each rank adding its part, and arrives at its owner after as many steps as there are ranks.
More is sent than by gathering once (the features travel again in backward), always while tiles are being computed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from threetowers.kernels.distributed.columns import AddGradient, ColumnBlock, ColumnExchange
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.operator.pair_state import PairState

ALIGNMENT = 64  # bytes between the parts of a packed buffer, so that every part is an aligned view


class RingColumns(ColumnExchange):
    """Columns of which a rank holds its own and two others': one in use, one arriving.

    Nothing is kept for backward, which sends the columns round again. Calls grow with the number of ranks, by nature.
    """

    def __init__(self, ranks: RankGroup, pairs: Sequence[PairState]) -> None:
        super().__init__(ranks, pairs)
        self._order = [(ranks.rank + step) % ranks.size for step in range(ranks.size)]
        self._complete: dict[int, Tensor] = {}
        # Where the sides of each pair begin in a packed buffer of bytes: the same on every rank.
        self._offsets: list[list[int]] = []
        self._packed_bytes = 0
        for pair in pairs:
            self._offsets.append([])
            for side_bD in pair.columns:
                self._offsets[-1].append(self._packed_bytes)
                size = pair.column_layout.largest * side_bD.shape[1] * side_bD.element_size()
                self._packed_bytes += -(-size // ALIGNMENT) * ALIGNMENT

    @override
    def block_sizes(self, k: int) -> list[int]:
        return [self._pairs[k].column_layout.sizes[rank] for rank in self._order]

    @override
    def blocks(self) -> Iterator[ColumnBlock]:
        for blocks in self._steps():
            yield from blocks

    def _steps(self) -> Iterator[list[ColumnBlock]]:
        """Yield the blocks of each step, one a pair, while the next step's columns are on their way."""
        held_N = self._pack()
        next_N = torch.empty_like(held_N)
        wait = self._ranks.shift_async([held_N], [next_N])
        for step, rank in enumerate(self._order):
            if step > 0:
                wait()  # what was held has been sent by then, and its memory is free for what comes next
                held_N, next_N = next_N, held_N
                if step + 1 < self._ranks.size:
                    wait = self._ranks.shift_async([held_N], [next_N])
            yield [self._block(held_N, k, rank) for k in range(len(self._pairs))]

    def _block(self, held_N: Tensor, k: int, rank: int) -> ColumnBlock:
        """Return this rank's columns of pair k, which are held."""
        pair = self._pairs[k]
        own = rank == self._ranks.rank
        y_sD, *teachers_sE = pair.columns if own else self._unpack(held_N, k, rank)
        return ColumnBlock(k, pair.column_layout.rows_of(rank), y_sD, tuple(teachers_sE))

    def _pack(self) -> Tensor:
        """Return the own columns of all pairs as one buffer."""
        packed_N = self._pairs[0].y_bD.new_zeros(self._packed_bytes, dtype=torch.uint8)
        for offsets, pair in zip(self._offsets, self._pairs, strict=True):
            for offset, side_bD in zip(offsets, pair.columns, strict=True):
                raw = side_bD.contiguous().view(torch.uint8).view(-1)
                packed_N[offset : offset + len(raw)] = raw
        return packed_N

    def _unpack(self, packed_N: Tensor, k: int, rank: int) -> list[Tensor]:
        """Return the columns (s, D) of pair k and of its teachers in what this rank packed, as views."""
        pair = self._pairs[k]
        rows = pair.column_layout.sizes[rank]
        sides = []
        for offset, side_bD in zip(self._offsets[k], pair.columns, strict=True):
            width = side_bD.shape[1]
            raw = packed_N[offset : offset + rows * width * side_bD.element_size()]
            sides.append(raw.view(side_bD.dtype).view(rows, width))
        return sides

    @override
    def accumulate_gradients(self, add: AddGradient) -> None:
        wanted = [k for k, pair in enumerate(self._pairs) if pair.need_y]
        current, sent, arriving = ({k: self._padded_zeros(k) for k in wanted} for _ in range(3))
        wait: Callable[[], Any] | None = None
        for step, blocks in enumerate(self._steps()):
            for block in blocks:
                add(block, current[block.pair][: len(block.y_sD)] if block.pair in current else None)
            if not wanted:
                continue
            if wait is not None:
                wait()
                for k in wanted:
                    current[k] += arriving[k]
            wait = self._ranks.shift_async(list(current.values()), list(arriving.values()))
            current, sent = sent, current  # what was sent a step ago is free by now
            if step + 1 < self._ranks.size:
                for zero_mD in current.values():
                    zero_mD.zero_()
        if wait is not None:
            wait()  # the own gradients have arrived
        self._complete = arriving

    def _padded_zeros(self, k: int) -> Tensor:
        """Return room for the gradient of any rank's columns of pair k."""
        pair = self._pairs[k]
        return pair.zero_rows(pair.column_layout.largest)

    @override
    def own_gradient(self, k: int) -> Tensor | None:
        if k not in self._complete:
            return None
        return self._complete[k][: len(self._pairs[k].y_bD)]
