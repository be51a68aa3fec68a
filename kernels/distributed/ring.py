"""The column side travelling from rank to rank, and its gradients with it: O(b D) memory instead of O(B D).

At step s a rank holds the columns of the rank s places after it, so columns move to the rank before. Their gradient
follows one step behind, each rank adding its part, and arrives at its owner after as many steps as there are ranks.
More is sent than by gathering once (the features travel again in backward), always while tiles are being computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from threetowers.kernels.distributed.columns import AddGradient, ColumnExchange
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.pair_state import PairState


class RingColumns(ColumnExchange):
    """Columns of which a rank holds its own and two others': one in use, one arriving."""

    def __init__(self, ranks: RankGroup, pairs: Sequence[PairState]) -> None:
        super().__init__(ranks, pairs)
        self.packed = self._nothing_packed()  # nothing is kept: backward sends the columns round again
        self.order = [(ranks.rank + step) % ranks.size for step in range(ranks.size)]
        self._held = self._next = self.packed
        self._step = -1  # nothing is sent before columns are asked for: the sigmoid's backward asks for none
        self._complete: dict[int, Tensor] = {}

    @override
    def columns(self, k: int, rank: int) -> Tensor:
        step = (rank - self._ranks.rank) % self._ranks.size
        if self._step < 0:
            self._held = self._pack()
            self._step = 0
            self._next = torch.empty_like(self._held)
            self._wait = self._ranks.shift_async([self._held], [self._next])
        if step == self._step + 1:
            self._wait()  # what was held has been sent by then, and its memory is free for what comes next
            self._held, self._next = self._next, self._held
            self._step = step
            if step + 1 < self._ranks.size:
                self._wait = self._ranks.shift_async([self._held], [self._next])
        if step != self._step:
            raise RuntimeError(f"columns of step {step} asked for at step {self._step}: the ring only moves forward")
        return self._pairs[k].y_bD if step == 0 else self._unpack(self._held, k, rank)

    @override
    def accumulate_gradients(self, add: AddGradient) -> None:
        wanted = [k for k, pair in enumerate(self._pairs) if pair.need_y]
        current, sent, arriving = ({k: self._padded_zeros(k) for k in wanted} for _ in range(3))
        wait: Callable[[], Any] | None = None
        for step, rank in enumerate(self.order):
            for k, pair in enumerate(self._pairs):
                y_sD = self.columns(k, rank)
                dy_sD = current[k][: pair.layout.sizes[rank]] if k in current else None
                add(k, rank, y_sD, dy_sD)
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
