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
from threetowers.kernels.pair_state import PairState

ALIGNMENT = 64  # bytes between the parts of a packed buffer, so that every part is an aligned view


class RingColumns(ColumnExchange):
    """Columns of which a rank holds its own and two others': one in use, one arriving.

    Nothing is kept for backward, which sends the columns round again. Calls grow with the number of ranks, by nature.
    """

    def __init__(self, ranks: RankGroup, pairs: Sequence[PairState]) -> None:
        super().__init__(ranks, pairs)
        self._order = [(ranks.rank + step) % ranks.size for step in range(ranks.size)]
        self._complete: dict[int, Tensor] = {}
        # Where each pair begins in a packed buffer of bytes: the same on every rank.
        self._offsets = [0]
        for pair in pairs:
            size = pair.layout.largest * pair.y_bD.shape[1] * pair.y_bD.element_size()
            self._offsets.append(self._offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)

    @override
    def block_sizes(self, k: int) -> list[int]:
        return [self._pairs[k].layout.sizes[rank] for rank in self._order]

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
            yield [
                ColumnBlock(k, pair.layout.rows_of(rank), self._unpack(held_N, k, rank) if step else pair.y_bD)
                for k, pair in enumerate(self._pairs)
            ]

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
        return pair.zero_rows(pair.layout.largest)

    @override
    def own_gradient(self, k: int) -> Tensor | None:
        if k not in self._complete:
            return None
        return self._complete[k][: len(self._pairs[k].y_bD)]
