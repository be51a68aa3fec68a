"""How the column side of every pair, and its gradient, crosses ranks: gathered at once, or in a ring (`ring.py`)."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from threetowers.kernels.distributed.rank_group import RankGroup, no_wait
from threetowers.kernels.operator.pair_state import PairState


@dataclass(frozen=True, slots=True)
class ColumnBlock:
    """Columns of one pair that are at hand: its index, where they lie in the global batch, their features.

    Those of the pair itself are (s, D), those of each of its teachers (s, E).
    """

    pair: int
    positions: slice
    y_sD: Tensor
    teachers_sE: tuple[Tensor, ...] = ()


AddGradient = Callable[[ColumnBlock, Tensor | None], None]
"""Called with a block of columns, and where to add their gradient (s, D), or None."""


class ColumnExchange(ABC):
    """The column features of all pairs, block by block, and the sums of their gradients."""

    def __init__(self, ranks: RankGroup, pairs: Sequence[PairState]) -> None:
        self._ranks = ranks
        self._pairs = pairs

    @abstractmethod
    def block_sizes(self, k: int) -> list[int]:
        """Return how many columns each block of pair k has, in the order in which they come."""

    @abstractmethod
    def blocks(self) -> Iterator[ColumnBlock]:
        """Yield all columns of all pairs, the own ones first, while others are on their way. Collective."""

    def kept(self) -> list[Tensor]:
        """Return what backward needs to have the columns again; empty tensors where it needs none.

        They are those of each pair, and after them its teachers'.
        """
        return [side_bD.new_empty(0) for pair in self._pairs for side_bD in pair.columns]

    @abstractmethod
    def accumulate_gradients(self, add: AddGradient) -> None:
        """Call ``add`` for every block, and send each rank the sum of what was added for its columns. Collective."""

    @abstractmethod
    def own_gradient(self, k: int) -> Tensor | None:
        """Return the complete sum (b, D) for the own columns of pair k; None where no gradient is wanted."""


class GatheredColumns(ColumnExchange):
    """All ranks' columns of a pair as one matrix, O(B D) memory, on its way while own rows meet own columns.

    The other columns are then cut in full tiles, whoever they belong to: there are two more blocks, those before the
    own ones and those behind, on however many ranks. Their gradients, O(B D) too, leave in one reduce-scatter a pair
    while the next pair is computed.
    """

    def __init__(self, ranks: RankGroup, pairs: Sequence[PairState], kept: Sequence[Tensor] | None = None) -> None:
        """Begin to gather, or take `kept`, what was gathered of the same features before."""
        super().__init__(ranks, pairs)
        self._columns: list[list[Tensor]] = []  # by pair and side: (B, D), or (W, m, D) while they are on their way
        self._waits: dict[int, list[Callable[[], Any]]] = {}  # by pair
        self._sums: dict[int, tuple[Tensor, Callable[[], Any]]] = {}
        if kept is not None:
            rest = iter(kept)
            self._columns = [list(itertools.islice(rest, len(pair.columns))) for pair in pairs]
        elif ranks.size > 1:
            for k, pair in enumerate(pairs):
                sent = [ranks.gather_async(pair.column_layout.padded(side_bD)) for side_bD in pair.columns]
                self._columns.append([gathered_WmD for gathered_WmD, _ in sent])
                self._waits[k] = [wait for _, wait in sent]

    @override
    def kept(self) -> list[Tensor]:
        if self._ranks.size == 1:
            return super().kept()
        return [side_BD for k in range(len(self._pairs)) for side_BD in self._joined(k)]

    @override
    def block_sizes(self, k: int) -> list[int]:
        layout = self._pairs[k].column_layout
        positions = layout.own, *self._other_positions(k)
        return [part.stop - part.start for part in positions]

    def _other_positions(self, k: int) -> tuple[slice, slice]:
        """Return where the columns before and behind the own ones lie; either may be empty."""
        layout = self._pairs[k].column_layout
        return slice(0, layout.own.start), slice(layout.own.stop, layout.total)

    @override
    def blocks(self) -> Iterator[ColumnBlock]:
        for k in range(len(self._pairs)):
            yield self._own_block(k)
        for k in range(len(self._pairs)):
            yield from self._other_blocks(k)

    def _own_block(self, k: int) -> ColumnBlock:
        y_bD, *teachers_bE = self._pairs[k].columns
        return ColumnBlock(k, self._pairs[k].column_layout.own, y_bD, tuple(teachers_bE))

    def _other_blocks(self, k: int) -> Iterator[ColumnBlock]:
        if self._ranks.size > 1:
            y_BD, *teachers_BE = self._joined(k)
            for positions in self._other_positions(k):
                yield ColumnBlock(k, positions, y_BD[positions], tuple(v_BE[positions] for v_BE in teachers_BE))

    def _joined(self, k: int) -> list[Tensor]:
        """Return the columns of all ranks, (B, D): the pair's, and its teachers'."""
        for side, wait in enumerate(self._waits.pop(k, [])):
            wait()
            self._columns[k][side] = self._pairs[k].column_layout.join(self._columns[k][side])
        return self._columns[k]

    @override
    def accumulate_gradients(self, add: AddGradient) -> None:
        for k, pair in enumerate(self._pairs):
            dy_BD = None  # frees the pair before's: its sums have left
            if pair.need_y:
                for earlier in range(k - 1):  # bounds the memory: one pair's sums are on their way at most
                    self._wait_for_sum(earlier)
                dy_BD = pair.zero_rows(pair.column_layout.total)
            for block in itertools.chain([self._own_block(k)], self._other_blocks(k)):
                add(block, None if dy_BD is None else dy_BD[block.positions])
            if dy_BD is not None:
                self._sums[k] = self._ranks.reduce_scatter_async(pair.column_layout.split(dy_BD))

    def _wait_for_sum(self, k: int) -> None:
        if k in self._sums:
            sum_mD, wait = self._sums[k]
            wait()
            self._sums[k] = sum_mD, no_wait

    @override
    def own_gradient(self, k: int) -> Tensor | None:
        if k not in self._sums:
            return None
        self._wait_for_sum(k)
        return self._sums.pop(k)[0][: len(self._pairs[k].y_bD)]
