"""The ranks that share one global batch: who holds which rows, and the few collectives of a loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

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


class Ranks:
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
        return all_Wn, _collective("all_gather")(all_Wn.view(-1), part_n.reshape(-1), self.group).wait

    def scatter_sum_async(self, parts_Wn: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """Sum over ranks of the part meant for this rank; may be read after calling the second value."""
        if self.group is None:
            return parts_Wn[0], _done
        part_n = torch.empty_like(parts_Wn[0])
        return part_n, _collective("reduce_scatter")(part_n.view(-1), parts_Wn.view(-1), self.group).wait

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


def _collective(kind: str) -> Callable[[Tensor, Tensor, Any], Any]:
    """The flat collective by its name of this torch version (2.14 renamed them), asynchronous."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[kind]
    function = getattr(dist, f"{kind}_single", None) or getattr(dist, older)
    return lambda out, part, group: function(out, part, group=group, async_op=True)


class Shards:
    """The rows of one pair term's global batch: rank r holds ``sizes[r]`` of them, in rank order."""

    def __init__(self, sizes: Sequence[int], rank: int) -> None:
        self.sizes = list(sizes)
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.total = self.starts[-1]
        self.most = max(self.sizes)
        self.rank = rank
        self.own = slice(self.starts[rank], self.starts[rank + 1])
        # own shard first: it is at hand while the others are on their way; then each rank begins elsewhere
        self.order = [(rank + step) % len(self.sizes) for step in range(len(self.sizes))]

    def join(self, parts_Wn: Tensor) -> Tensor:
        """Padded parts (W, most) to one vector over the global batch."""
        return torch.cat([part[:size] for part, size in zip(parts_Wn, self.sizes, strict=True)])

    def pad(self, part_n: Tensor) -> Tensor:
        """The own part, padded to the longest."""
        padded = part_n.new_zeros(self.most)
        padded[: len(part_n)] = part_n
        return padded


class Columns:
    """The column side of several pair terms, all ranks' rows of it, in one packed gather."""

    def __init__(self, ranks: Ranks, shards: Sequence[Shards], own: Sequence[Tensor], packed_WN: Tensor | None) -> None:
        self._shards, self._own = shards, own
        self._offsets = [0]
        for shard, y_bD in zip(shards, own, strict=True):
            size = shard.most * y_bD.shape[1] * y_bD.element_size()
            self._offsets.append(self._offsets[-1] + -(-size // ALIGN) * ALIGN)
        self._wait: Callable[[], Any] = _done
        if packed_WN is not None:
            self.packed_WN = packed_WN
        elif ranks.size == 1:
            self.packed_WN = own[0].new_empty(0, dtype=torch.uint8)
        else:
            self.packed_WN, self._wait = ranks.gather_async(self._pack())

    def _pack(self) -> Tensor:
        packed_N = self._own[0].new_zeros(self._offsets[-1], dtype=torch.uint8)
        for offset, y_bD in zip(self._offsets, self._own, strict=False):
            raw = y_bD.contiguous().view(torch.uint8).view(-1)
            packed_N[offset : offset + len(raw)] = raw
        return packed_N

    def shard(self, pair: int, rank: int) -> Tensor:
        """The rows (s, D) that this rank holds of this pair's column side. Other ranks' rows wait for the gather."""
        shards, own_bD = self._shards[pair], self._own[pair]
        if rank == shards.rank:
            return own_bD
        self._wait()
        self._wait = _done
        rows, width = shards.sizes[rank], own_bD.shape[1]
        offset = self._offsets[pair]
        raw = self.packed_WN[rank, offset : offset + rows * width * own_bD.element_size()]
        return raw.view(own_bD.dtype).view(rows, width)
