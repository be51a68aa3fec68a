"""The column side travelling from rank to rank, and its gradients with it: O(bD) memory instead of O(BD).

At step s a rank holds the shard of the rank s places after it, so shards move to the rank before. A shard's gradient
follows it one step behind, each rank adding its part, and comes home after as many steps as there are ranks. More is
sent than by gathering once (the features travel again in backward), always while tiles are being computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from threetowers.kernels.distributed import Packing, RankGroup, Shards


class RingColumns:
    """`Columns` of which a rank holds its own and two others: one in use, one arriving."""

    def __init__(self, ranks: RankGroup, shards: Sequence[Shards], own: Sequence[Tensor]) -> None:
        self.packed = own[0].new_empty(0, dtype=torch.uint8)  # nothing is kept: backward sends them round again
        self._ranks, self._packing, self._own = ranks, Packing(shards, own), own
        self.order = [(ranks.rank + step) % ranks.size for step in range(ranks.size)]
        self._held = self._next = self.packed
        self._step = -1  # nothing is sent before a shard is asked for: the sigmoid's backward asks for none

    def shard(self, pair: int, rank: int) -> Tensor:
        step = (rank - self._ranks.rank) % self._ranks.size
        if self._step < 0:
            self._held, self._step = self._packing.pack(), 0
            self._next = torch.empty_like(self._held)
            self._wait = self._ranks.shift_async([self._held], [self._next])
        if step == self._step + 1:
            self._wait()  # what was held has been sent by then, and its memory is free for the one after
            self._held, self._next, self._step = self._next, self._held, step
            if step + 1 < self._ranks.size:
                self._wait = self._ranks.shift_async([self._held], [self._next])
        if step != self._step:
            raise RuntimeError(f"shard of step {step} asked for at step {self._step}: the ring only moves on")
        return self._own[pair] if step == 0 else self._packing.view(self._held, pair, rank)


class RingGradients:
    """`ColumnGradients` that travel one step behind their columns."""

    def __init__(
        self, ranks: RankGroup, shards: Sequence[Shards], zeros: Sequence[Callable[[int], Tensor] | None]
    ) -> None:
        self.groups = [list(range(len(shards)))]
        self._ranks, self._shards = ranks, shards
        makers = {k: make for k, make in enumerate(zeros) if make is not None}
        self._mine, self._sent, self._arriving = (
            {k: make(shards[k].most) for k, make in makers.items()} for _ in range(3)
        )
        self._wait: Callable[[], Any] | None = None

    def target(self, pair: int, rank: int) -> Tensor | None:
        return self._mine[pair][: self._shards[pair].sizes[rank]] if pair in self._mine else None

    def passed(self, group: list[int], step: int) -> None:
        if not self._mine:
            return
        if self._wait is not None:
            self._wait()
            for pair, part_mD in self._mine.items():
                part_mD += self._arriving[pair]
        self._wait = self._ranks.shift_async(list(self._mine.values()), list(self._arriving.values()))
        self._mine, self._sent = self._sent, self._mine  # what was sent a step ago is free by now
        if step + 1 < self._ranks.size:
            for part_mD in self._mine.values():
                part_mD.zero_()
        else:
            self._wait()  # home again

    def own(self, pair: int) -> Tensor | None:
        if pair not in self._arriving:
            return None
        return self._arriving[pair][: self._shards[pair].sizes[self._ranks.rank]]
