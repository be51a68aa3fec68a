"""What a step costs on many ranks: calls, collectives and memory, and when collectives run. On real gloo processes."""

import itertools
import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.kernels.python_calls import ROOM, python_calls
from threetowers.kernels import Pair, contrastive_losses
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.operator import operators
from threetowers.kernels.tiles.torch_tiles import TorchTiles

KINDS = ["softmax", "sigmoid"]
Log = list[str]


def step(batch: int, width: int, *, num_pairs: int = 1, **options: Any) -> None:
    """Run forward and backward of one call with random local batches."""
    sides = [torch.randn(batch, width).requires_grad_() for _ in range(2 * num_pairs)]
    scale = torch.zeros(1, requires_grad=True)
    pairs = [Pair(x, y, scale) for x, y in zip(sides[::2], sides[1::2], strict=True)]
    results = contrastive_losses(pairs, **options)
    torch.stack([result.loss for result in results]).sum().backward()


def collectives(work: Callable[[], Any]) -> Counter[str]:
    """Return how often this work calls each of torch's collectives."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        work()
    return Counter(event.name for event in record.events() if event.name.startswith("c10d::"))


def costs() -> dict[Any, Any]:
    """Return calls and collectives of a step with three pairs, by kind and whether there are ids."""
    found = {}
    for kind, with_ids in itertools.product(KINDS, (False, True)):

        def work() -> None:
            ids = torch.arange(8) // 2 if with_ids else None  # noqa: B023
            step(8, 4, num_pairs=3, kind=kind, group_ids=ids)  # noqa: B023

        work()  # what is made once does not count
        found[kind, with_ids] = python_calls(work), collectives(work)
    return found


def check_costs(found: dict[int, dict[Any, Any]], rank: int) -> None:
    """Calls and collectives do not grow with the number of ranks, at one end of them or in between."""
    for (kind, with_ids), (calls, each) in found[8].items():
        gathers = 2 + 3 + with_ids  # of what hosts and values must agree on, and of each pair's columns
        reductions = {"softmax": 3, "sigmoid": 2}[kind]  # of statistics, and of totals
        expected = {"c10d::_allgather_base_": gathers, "c10d::allreduce_": reductions, "c10d::_reduce_scatter_base_": 3}
        for size in found:
            assert found[size][kind, with_ids][1] == expected, (size, rank, kind, each)
        if rank in (0, 1):
            few_calls = found[4][kind, with_ids][0]
            assert abs(calls - few_calls) <= ROOM, (rank, kind, with_ids, calls, few_calls)


def logged(log: Log, name: str, wait: Callable[[], Any]) -> Callable[[], Any]:
    """Record that a collective starts now, and when it is waited for."""
    log.append(f"{name} starts")

    def waited() -> Any:
        log.append(f"{name} is waited for")
        return wait()

    return waited


def recorded(log: Log) -> Any:
    """Return a `RankGroup` and a back end that record what they do."""

    class RecordedRanks(RankGroup):
        def gather_async(self, part_n: Tensor) -> tuple[Tensor, Callable[[], Any]]:
            all_Wn, wait = super().gather_async(part_n)
            if part_n.dtype != torch.float32:  # columns, not facts
                return all_Wn, wait
            return all_Wn, logged(log, f"gather {log.count('gather 0 starts')}", wait)

        def reduce_scatter_async(self, parts_Wn: Tensor) -> tuple[Tensor, Callable[[], Any]]:
            own_n, wait = super().reduce_scatter_async(parts_Wn)
            return own_n, logged(log, f"reduce-scatter {log.count('reduce-scatter 0 starts')}", wait)

        def shift_async(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Callable[[], Any]:
            sent = "columns" if send[0].dtype == torch.uint8 else "gradients"
            return logged(log, f"{sent} at {len(log)}", super().shift_async(send, receive))

    class RecordedTiles(TorchTiles):
        def dots(self, x_rD: Tensor, y_cD: Tensor, out_rc: Tensor | None = None) -> Tensor:
            log.append("tile")
            return super().dots(x_rD, y_cD, out_rc)

    return RecordedRanks, lambda x: RecordedTiles(torch.float32)


def tiles_under_way(log: Log) -> dict[str, int]:
    """Return how many tiles were computed between the start of each collective and the wait for it."""
    names = [entry.removesuffix(" starts") for entry in log if entry.endswith(" starts")]
    assert len(set(names)) == len(names)
    spans = {name: (log.index(f"{name} starts"), log.index(f"{name} is waited for")) for name in names}
    return {name: log[start:stop].count("tile") for name, (start, stop) in spans.items()}


def check_overlap() -> None:
    """Collectives start before tiles are computed, and are waited for after."""
    size, rank, log = dist.get_world_size(), dist.get_rank(), list[str]()
    tiles_a_pass = 2 if rank in (0, size - 1) else 3  # own columns, those before and those behind
    with pytest.MonkeyPatch.context() as patch:
        ranks, backend_for = recorded(log)
        patch.setattr(operators, "RankGroup", ranks)
        patch.setattr(operators, "backend_for", backend_for)
        for kind, passes in (("softmax", 2), ("sigmoid", 1)):
            step(8, 4, num_pairs=2, kind=kind)
            assert log.count("tile") == 2 * passes * tiles_a_pass
            under_way = tiles_under_way(log)
            own_first = {"softmax": (2, 1 + tiles_a_pass), "sigmoid": (1, 1 + tiles_a_pass)}[kind]
            assert (under_way["gather 0"], under_way["gather 1"]) == own_first
            # A pair's sums leave under the next pair's tiles; nothing is left to compute under the last one's.
            assert (under_way["reduce-scatter 0"], under_way["reduce-scatter 1"]) == (tiles_a_pass, 0)

            log.clear()
            step(8, 4, kind=kind, ring=True)
            under_way = tiles_under_way(log)
            columns, gradients = (
                [count for name, count in under_way.items() if name.startswith(sent)]
                for sent in ("columns", "gradients")
            )
            assert columns == [1] * (size - 1) * passes
            assert gradients == [1] * (size - 1) + [0]  # the last step brings them home
            log.clear()


def peak_bytes(work: Callable[[], None]) -> int:
    """Return the most memory that tensors allocated by this work took at once."""
    work()  # what is made once does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


WIDTH = 4096
HALF, WHOLE = 48, 96  # local batches


def peaks() -> dict[tuple[str, bool, int], int]:
    """Return the peak bytes of a step on this number of ranks, by kind, ring and local batch."""
    return {
        (kind, ring, batch): peak_bytes(lambda: step(batch, WIDTH, kind=kind, ring=ring))  # noqa: B023
        for kind, ring, batch in itertools.product(KINDS, (True, False), (HALF, WHOLE))
    }


def check_memory(on_2: dict[tuple[str, bool, int], int] | None, on_4: dict[tuple[str, bool, int], int]) -> None:
    """A ring takes O(b D) whatever the number of ranks; a gather the whole batch's columns and gradients, O(B D)."""
    columns_bytes = WHOLE * WIDTH * 4  # of one rank
    for kind in KINDS:
        assert 1.9 <= on_4[kind, True, WHOLE] / on_4[kind, True, HALF] <= 2.1
        assert 1.9 <= on_4[kind, False, WHOLE] / on_4[kind, False, HALF] <= 2.1
        if on_2 is not None:
            assert on_4[kind, True, WHOLE] <= 1.02 * on_2[kind, True, WHOLE]  # twice B D, the same b D
            assert on_4[kind, True, HALF] <= 0.6 * on_2[kind, True, WHOLE]  # the same B D
            # Of two ranks' columns more: features and gradients, and gloo's copy of these as it sums them.
            more = (on_4[kind, False, WHOLE] - on_2[kind, False, WHOLE]) / (2 * columns_bytes)
            assert 1.9 <= more <= 3.1, more


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found_peaks, found_costs = {}, {}
    for size in (2, 4, 8):
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
        found_costs[size] = costs()
        if size < 8:
            check_overlap()
            found_peaks[size] = peaks()
        dist.destroy_process_group()
    check_costs(found_costs, rank)
    if 4 in found_peaks:
        check_memory(found_peaks.get(2), found_peaks[4])


@pytest.mark.distributed
def test_costs_overlap_and_memory(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(["pytest", "torch.distributed", "torch.profiler", "threetowers.kernels"])
    mp.start_processes(_worker, args=(str(tmp_path),), nprocs=8, start_method="forkserver")
