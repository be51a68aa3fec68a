"""What ranks cost each other, in real gloo processes: when collectives run, and how much memory each rank takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from threetowers.kernels import Pair, contrastive_losses
from threetowers.kernels import operators as operator
from threetowers.kernels.distributed import RankGroup
from threetowers.kernels.tiles import TorchTiles

FAMILIES = ["softmax", "sigmoid"]
Log = list[str]


def step(group: Any, batch: int, width: int, *, terms: int = 1, **options: Any) -> None:
    """Forward and backward of one call with random local batches."""
    sides = [torch.randn(batch, width).requires_grad_() for _ in range(2 * terms)]
    scale = torch.zeros(1, requires_grad=True)
    pairs = [Pair(x, y, scale) for x, y in zip(sides[::2], sides[1::2], strict=True)]
    results = contrastive_losses(pairs, process_group=group, **options)
    torch.stack([result.loss for result in results]).sum().backward()


def logged(log: Log, name: str, wait: Callable[[], Any]) -> Callable[[], Any]:
    """Notes that it starts now, and when somebody waits for it."""
    log.append(f"{name} starts")

    def waited() -> Any:
        log.append(f"{name} is waited for")
        return wait()

    return waited


def recorded(log: Log) -> Any:
    """`RankGroup` and a back end that write down what they do, and do it."""

    class RecordedRanks(RankGroup):
        def gather_async(self, part_n: Tensor) -> tuple[Tensor, Callable[[], Any]]:
            all_Wn, wait = super().gather_async(part_n)
            return all_Wn, logged(log, "gather", wait) if part_n.dtype == torch.uint8 else wait  # not the header

        def reduce_async(self, part_n: Tensor, rank: int) -> Callable[[], Any]:
            return logged(log, f"reduce {rank}", super().reduce_async(part_n, rank))

        def shift_async(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], Any]:
            kind = "columns" if send[0].dtype == torch.uint8 else "gradients"
            return logged(log, f"{kind} at {len(log)}", super().shift_async(send, receive))

    class RecordedTiles(TorchTiles):
        def dots(self, x_rD: Tensor, y_cD: Tensor, keep_rc: Tensor | None = None) -> Tensor:
            log.append("tile")
            return super().dots(x_rD, y_cD, keep_rc)

    return RecordedRanks, lambda x: RecordedTiles(torch.float32)


def tiles_under_way(log: Log) -> dict[str, int]:
    """How many tiles were computed between the start of each collective and the wait for it."""
    names = [entry.removesuffix(" starts") for entry in log if entry.endswith(" starts")]
    assert len(set(names)) == len(names)
    spans = {name: (log.index(f"{name} starts"), log.index(f"{name} is waited for")) for name in names}
    return {name: log[start:stop].count("tile") for name, (start, stop) in spans.items()}


def check_overlap(group: Any) -> None:
    """Collectives are started before tiles are computed, and waited for after: one tile a shard here."""
    size, rank, log = group.size(), group.rank(), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        ranks, backend_for = recorded(log)
        patch.setattr(operator, "RankGroup", ranks)
        patch.setattr(operator, "backend_for", backend_for)
        for family, passes in (("softmax", 2), ("sigmoid", 1)):
            step(group, 8, 4, family=family)
            under_way = tiles_under_way(log)
            assert under_way.pop("gather") == 1  # the own columns' tile
            in_order = [f"reduce {r}" for r in range(size)]  # on every rank, as collectives must be
            assert list(under_way) == in_order
            last = in_order[size - 2 :] if rank == size - 1 else in_order[size - 1 :]  # what the last tile completes
            assert [name for name, count in under_way.items() if count == 0] == last

            log.clear()
            step(group, 8, 4, family=family, ring=True)
            under_way = tiles_under_way(log)
            columns, gradients = (
                [count for name, count in under_way.items() if name.startswith(kind)]
                for kind in ("columns", "gradients")
            )
            assert columns == [1] * (size - 1) * passes
            assert gradients == [1] * (size - 1) + [0]  # the last step brings them home
            log.clear()
        step(group, 8, 4, terms=2)  # a term's last sums leave under the next term's tiles
        first_waits = log.index(f"reduce {size - 1} is waited for")
        assert log[log.index(f"reduce {size - 1} starts") : first_waits].count("tile") > 0


def peak_bytes(work: Callable[[], None]) -> int:
    """The most memory that tensors made by this took at once, of every allocation there was."""
    work()  # what is made once does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def check_memory(groups: dict[int, Any]) -> None:
    """A ring takes O(b D) whatever the number of ranks; a gather takes the whole batch's columns, O(B D), once."""
    width, half, whole = 4096, 48, 96
    shard_bytes = whole * width * 4  # of one rank's rows
    for family in FAMILIES:
        ring, gather = (
            {
                (size, batch): peak_bytes(lambda: step(group, batch, width, family=family, ring=ring))  # noqa: B023
                for size, group in groups.items()
                for batch in (half, whole)
            }
            for ring in (True, False)
        )
        assert 1.9 <= ring[4, whole] / ring[4, half] <= 2.1
        if 2 in groups:
            assert ring[4, whole] <= 1.02 * ring[2, whole]  # twice B D, the same b D
            assert ring[4, half] <= 0.6 * ring[2, whole]  # the same B D
            assert gather[4, whole] - gather[2, whole] >= 1.9 * shard_bytes  # two ranks' columns more


def _worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    every = {size: dist.new_group(list(range(size))) for size in (2, 4)}
    groups = {size: group for size, group in every.items() if rank < size}
    for group in groups.values():
        check_overlap(group)
    check_memory(groups)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_overlap_and_memory(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path / "store"),), nprocs=4)
