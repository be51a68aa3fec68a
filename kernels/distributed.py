"""The ranks that share one global batch: who holds which rows, and the few collectives of a loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

ALIGN = 64  # bytes between the parts of a packed buffer, so that every part is an aligned view


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name by which operators know the group; "" where this is one process on its own."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return ""
    group = group or dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):  # new_group gives others a placeholder
        raise ValueError("this process is no member of process_group; only its members may call the loss")
    return str(group.group_name)


class RankGroup:
    """One process group, or a single process (group "")."""

    def __init__(self, name: str) -> None:
        self.group: Any = None
        self.rank, self.size = 0, 1
        if name:
            resolve: Any = getattr(dist.distributed_c10d, "_resolve_process_group")  # noqa: B009  # torch's own way
            self.group = resolve(name)
            self.rank, self.size = self.group.rank(), self.group.size()

    def device(self) -> torch.device:
        """A device that the group's backend can send from; the CPU where it can."""
        kinds = [kind.type for kind in self.group._device_types] if self.group is not None else ["cpu"]
        return torch.device("cpu" if "cpu" in kinds else kinds[0])

    def serves(self, device: torch.device) -> bool:
        """Whether the group has a backend for tensors of this device."""
        return self.group is None or device.type in [kind.type for kind in self.group._device_types]

    def gather(self, part_n: Tensor) -> Tensor:
        """Equal-sized parts of all ranks, (W, *part)."""
        all_Wn, wait = self.gather_async(part_n)
        wait()
        return all_Wn

    def gather_async(self, part_n: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """As `gather`; the result may be read after calling the second value."""
        if self.group is None:
            return part_n[None], _done
        all_Wn = part_n.new_empty(self.size, *part_n.shape)
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # 2.14 renamed it
        return all_Wn, gather(all_Wn.view(-1), part_n.reshape(-1), group=self.group, async_op=True).wait

    def reduce_async(self, part_n: Tensor, rank: int) -> Callable[[], Any]:
        """Sum over ranks in place on this rank, undefined on others; done once the result has been called."""
        if self.group is None or part_n.numel() == 0:
            return _done
        to = dist.get_global_rank(self.group, rank)
        work: Any = dist.reduce(part_n, to, dist.ReduceOp.SUM, group=self.group, async_op=True)
        return work.wait  # type: ignore[no-any-return]

    def shift_async(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], Any]:
        """Send to the rank before, receive from the rank after; both are done once the result has been called."""
        before, after = (dist.get_global_rank(self.group, (self.rank + hop) % self.size) for hop in (-1, 1))
        sending = [dist.P2POp(dist.isend, part, before, self.group) for part in send]
        receiving = [dist.P2POp(dist.irecv, part, after, self.group) for part in receive]
        works = dist.batch_isend_irecv(sending + receiving)
        return lambda: [work.wait() for work in works]

    def sum_(self, values_n: Tensor) -> None:
        """All-reduce in place."""
        if self.group is not None:
            dist.all_reduce(values_n, dist.ReduceOp.SUM, group=self.group)

    def max_(self, values_n: Tensor) -> None:
        """All-reduce in place."""
        if self.group is not None:
            dist.all_reduce(values_n, dist.ReduceOp.MAX, group=self.group)

    def objects(self, value: object) -> list[Any]:
        """One picklable object of every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def _done() -> None:
    return None


class Shards:
    """The rows of one pair term's global batch: rank r holds ``sizes[r]`` of them, in rank order."""

    def __init__(self, sizes: Sequence[int], rank: int) -> None:
        self.sizes = list(sizes)
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.total = self.starts[-1]
        self.most = max(self.sizes)
        self.rank = rank
        self.own = slice(self.starts[rank], self.starts[rank + 1])

    def join(self, parts_Wn: Tensor) -> Tensor:
        """Padded parts (W, most) to one vector over the global batch."""
        return torch.cat([part[:size] for part, size in zip(parts_Wn, self.sizes, strict=True)])

    def pad(self, part_n: Tensor) -> Tensor:
        """The own part, padded to the longest."""
        padded = part_n.new_zeros(self.most)
        padded[: len(part_n)] = part_n
        return padded


class Packing:
    """Several pair terms' column sides as one buffer of bytes, every rank's with the same layout."""

    def __init__(self, shards: Sequence[Shards], own: Sequence[Tensor]) -> None:
        self._shards, self._own = shards, own
        self._offsets = [0]
        for shard, y_bD in zip(shards, own, strict=True):
            size = shard.most * y_bD.shape[1] * y_bD.element_size()
            self._offsets.append(self._offsets[-1] + -(-size // ALIGN) * ALIGN)

    def pack(self) -> Tensor:
        """The own rows."""
        packed_N = self._own[0].new_zeros(self._offsets[-1], dtype=torch.uint8)
        for offset, y_bD in zip(self._offsets, self._own, strict=False):
            raw = y_bD.contiguous().view(torch.uint8).view(-1)
            packed_N[offset : offset + len(raw)] = raw
        return packed_N

    def view(self, packed_N: Tensor, pair: int, rank: int) -> Tensor:
        """The rows (s, D) of this pair in what this rank packed."""
        own_bD, rows = self._own[pair], self._shards[pair].sizes[rank]
        width, start = own_bD.shape[1], self._offsets[pair]
        raw = packed_N[start : start + rows * width * own_bD.element_size()]
        return raw.view(own_bD.dtype).view(rows, width)


class Columns(Protocol):
    """The column side of all pair terms, shard by shard."""

    packed: Tensor  # what backward needs to have them again
    order: list[int]  # whose shard to ask for at each step: the own one first, while others are on their way

    def shard(self, pair: int, rank: int) -> Tensor:
        """The rows (s, D) that this rank holds of this pair's column side."""
        ...


class GatheredColumns:
    """All ranks' columns in one gather: O(BD) memory, on its way while own rows meet own columns."""

    def __init__(
        self, ranks: RankGroup, shards: Sequence[Shards], own: Sequence[Tensor], packed: Tensor | None
    ) -> None:
        """packed: an earlier gather of the same features; None to gather now."""
        self._packing, self._own, self._rank = Packing(shards, own), own, ranks.rank
        self.order = sorted(range(ranks.size), key=lambda rank: (rank != ranks.rank, rank))
        self._wait: Callable[[], Any] = _done
        if packed is not None:
            self.packed = packed
        elif ranks.size == 1:
            self.packed = own[0].new_empty(0, dtype=torch.uint8)
        else:
            self.packed, self._wait = ranks.gather_async(self._packing.pack())

    def shard(self, pair: int, rank: int) -> Tensor:
        if rank == self._rank:
            return self._own[pair]
        self._wait()
        self._wait = _done
        return self._packing.view(self.packed[rank], pair, rank)


class ColumnGradients(Protocol):
    """Where the tiles' sums for the column side go, and how they come home to the rank that holds the rows."""

    groups: list[list[int]]  # terms in the order to compute them: a group's terms go through the shards together

    def target(self, pair: int, rank: int) -> Tensor | None:
        """Room (s, D) to add the gradient of this rank's rows to; None where none is wanted."""
        ...

    def passed(self, group: list[int], step: int) -> None:
        """The group's terms have added their sums for the shard of this step."""
        ...

    def own(self, pair: int) -> Tensor | None:
        """The complete sum for the own rows, (b, D)."""
        ...


class ReducedGradients:
    """A shard's sums go to the rank that holds its rows while the next shard is computed: O(bD) memory.

    Collectives have to come in one order on all ranks, the order of the ranks. The own shard, which is computed first,
    waits for its turn.
    """

    def __init__(
        self, ranks: RankGroup, shards: Sequence[Shards], zeros: Sequence[Callable[[int], Tensor] | None]
    ) -> None:
        """zeros: for each term a maker of zeroed rows, or None where no gradient is wanted."""
        self.groups = [[k] for k in range(len(shards))]
        self._ranks, self._shards, self._zeros = ranks, shards, zeros
        self._sums: dict[tuple[int, int], Tensor] = {}  # computed or being computed, by pair and rank
        self._turn = [0 for _ in shards]  # whose shard goes next
        self._leaving: list[tuple[Tensor, Callable[[], Any]]] = []
        self._arriving: dict[int, tuple[Tensor, Callable[[], Any]]] = {}

    def target(self, pair: int, rank: int) -> Tensor | None:
        zeros = self._zeros[pair]
        if zeros is None:
            return None
        self._let_leave(1)  # bounds the memory
        self._sums[pair, rank] = zeros(self._shards[pair].sizes[rank])
        return self._sums[pair, rank]

    def passed(self, group: list[int], step: int) -> None:
        for pair in group:
            while (pair, self._turn[pair]) in self._sums:
                rank = self._turn[pair]
                part_sD = self._sums.pop((pair, rank))
                sent = part_sD, self._ranks.reduce_async(part_sD, rank)
                if rank == self._ranks.rank:
                    self._arriving[pair] = sent
                else:
                    self._leaving.append(sent)
                self._turn[pair] += 1

    def own(self, pair: int) -> Tensor | None:
        self._let_leave(0)
        if pair not in self._arriving:
            return None
        part_bD, wait = self._arriving.pop(pair)
        wait()
        return part_bD

    def _let_leave(self, most: int) -> None:
        """Wait until at most this many sums are on their way."""
        while len(self._leaving) > most:
            _, wait = self._leaving.pop(0)
            wait()
