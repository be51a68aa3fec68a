"""The ranks that share one global batch: who holds which rows, and the few collectives of a loss."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankGroup:
    """The default process group, or this process alone where torch.distributed is not initialised."""

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self._joined = dist.is_available() and dist.is_initialized()
        if self._joined:
            self.rank = dist.get_rank()
            self.size = dist.get_world_size()

    @property
    def _group(self) -> Any:
        """The default group. Not kept: an error's frames would hold it beyond its end, and gloo's threads with it."""
        return dist.group.WORLD if self._joined else None

    def serves(self, device: torch.device) -> bool:
        """Return whether the group has a backend for tensors of this device."""
        return self._group is None or device.type in self._device_types()

    def _device_types(self) -> list[str]:
        return ["cpu"] if self._group is None else [device.type for device in self._group._device_types]

    def gather(self, part_n: Tensor) -> Tensor:
        """Return the equal-sized parts of all ranks, (W, *part)."""
        all_Wn, wait = self.gather_async(part_n)
        wait()
        return all_Wn

    def gather_on_host(self, part_n: Tensor) -> Tensor:
        """Return the equal-sized parts of all ranks, (W, *part). On the CPU, and no other device is waited for."""
        if self._group is None:
            return part_n[None]
        all_Wn = part_n.new_empty(self.size, *part_n.shape)
        _all_gather(all_Wn.view(-1), part_n.reshape(-1), group=self._host_group())
        return all_Wn

    def _host_group(self) -> Any:
        """Return a group of the same ranks that sends from the CPU. Collective the first time.

        It is the group itself where that can; else, beside NCCL, one of gloo's, made once.
        """
        if "cpu" in self._device_types():
            return self._group
        if self._group not in _host_groups:
            _host_groups[self._group] = dist.new_group(backend="gloo")
        return _host_groups[self._group]

    def gather_async(self, part_n: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """Return the result of `gather`, which may be read once the second value has been called."""
        if self._group is None:
            return part_n[None], no_wait
        all_Wn = part_n.new_empty(self.size, *part_n.shape)
        sent = part_n.contiguous().view(torch.uint8).view(-1)  # as bytes, which every backend sends
        return all_Wn, _all_gather(all_Wn.view(torch.uint8).view(-1), sent, async_op=True).wait

    def reduce_scatter_async(self, parts_Wn: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """Return this rank's part summed over ranks, which may be read once the second value has been called."""
        if self._group is None:
            return parts_Wn[0], no_wait
        own_n = torch.empty_like(parts_Wn[0])
        return own_n, _reduce_scatter(own_n.view(-1), parts_Wn.view(-1), async_op=True).wait

    def shift_async(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], Any]:
        """Send to the rank before and receive from the rank after; done once the result has been called."""
        before = (self.rank - 1) % self.size
        after = (self.rank + 1) % self.size
        sending = [dist.P2POp(dist.isend, part, before) for part in send]
        receiving = [dist.P2POp(dist.irecv, part, after) for part in receive]
        works = dist.batch_isend_irecv(sending + receiving)
        return lambda: [work.wait() for work in works]

    def sum_(self, values_n: Tensor) -> None:
        """Sum over ranks, in place on all of them."""
        if self._group is not None:
            dist.all_reduce(values_n, dist.ReduceOp.SUM)

    def max_(self, values_n: Tensor) -> None:
        """Take the maximum over ranks, in place on all of them."""
        if self._group is not None:
            dist.all_reduce(values_n, dist.ReduceOp.MAX)

    def objects(self, value: object) -> list[Any]:
        """Return one picklable object of every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host_group())
        return values


_host_groups: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()  # by the group that they stand beside

# torch 2.14 renamed them.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def no_wait() -> None:
    """Wait for what is complete."""


class BatchLayout:
    """How one pair's global batch is divided: rank r holds ``sizes[r]`` of its rows, in the order of the ranks.

    What ranks send at once has room for as many rows as the largest of them holds: m rows a rank.
    """

    def __init__(self, sizes: Sequence[int], rank: int) -> None:
        self.sizes = list(sizes)
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.total = self.starts[-1]
        self.largest = max(self.sizes)
        self.own = self.rows_of(rank)

    def rows_of(self, rank: int) -> slice:
        """Return where this rank's rows lie in the global batch."""
        return slice(self.starts[rank], self.starts[rank + 1])

    def padded(self, own_bD: Tensor) -> Tensor:
        """Return the own rows, (m, ...): behind them zeros where another rank has more."""
        missing = self.largest - len(own_bD)
        return torch.cat([own_bD, own_bD.new_zeros(missing, *own_bD.shape[1:])]) if missing else own_bD

    def join(self, parts_WmD: Tensor) -> Tensor:
        """Return the rows of all ranks' padded parts, (B, ...); a view where ranks hold equally many."""
        rows_ND = parts_WmD.flatten(0, 1)
        return rows_ND if len(rows_ND) == self.total else rows_ND.index_select(0, self._places(rows_ND.device))

    def split(self, rows_BD: Tensor) -> Tensor:
        """Return the global batch's rows as padded parts, (W, m, ...); a view where ranks hold equally many."""
        shape = len(self.sizes), self.largest, *rows_BD.shape[1:]
        if shape[0] * shape[1] == self.total:
            return rows_BD.view(shape)
        parts_WmD = rows_BD.new_zeros(shape)
        parts_WmD.flatten(0, 1).index_copy_(0, self._places(rows_BD.device), rows_BD)
        return parts_WmD

    def _places(self, device: torch.device) -> Tensor:
        """Return where each row of the global batch lies among padded parts, int64 (B,). The host waits for nothing."""
        shifts = [rank * self.largest - start for rank, start in enumerate(self.starts[:-1])]
        shifts_W, sizes_W = torch.tensor([shifts, self.sizes]).to(device, non_blocking=True)
        shifts_B = torch.repeat_interleave(shifts_W, sizes_W, output_size=self.total)
        return torch.arange(self.total, device=device) + shifts_B
