"""When collectives run and how much memory each rank takes, on real gloo processes."""

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

from threetowers.kernels import Pair, contrastive_losses, operators
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.tiles import TorchTiles

KINDS = ["softmax", "sigmoid"]
Log = list[str]


def step(batch: int, width: int, *, num_pairs: int = 1, **options: Any) -> None:
    """Run forward and backward of one call with random local batches."""
    sides = [torch.randn(batch, width).requires_grad_() for _ in range(2 * num_pairs)]
    scale = torch.zeros(1, requires_grad=True)
    pairs = [Pair(x, y, scale) for x, y in zip(sides[::2], sides[1::2], strict=True)]
    results = contrastive_losses(pairs, **options)
    torch.stack([result.loss for result in results]).sum().backward()


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
            return all_Wn, logged(log, "gather", wait) if part_n.dtype == torch.uint8 else wait  # not the header

        def reduce_async(self, part_n: Tensor, rank: int) -> Callable[[], Any]:
            return logged(log, f"reduce {rank}", super().reduce_async(part_n, rank))

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
    """Collectives start before tiles are computed, and are waited for after: one tile for each rank's columns."""
    size, rank, log = dist.get_world_size(), dist.get_rank(), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        ranks, backend_for = recorded(log)
        patch.setattr(operators, "RankGroup", ranks)
        patch.setattr(operators, "backend_for", backend_for)
        for kind, passes in (("softmax", 2), ("sigmoid", 1)):
            step(8, 4, kind=kind)
            under_way = tiles_under_way(log)
            assert under_way.pop("gather") == 1  # the own columns' tile
            in_order = [f"reduce {r}" for r in range(size)]  # on every rank, as collectives must be
            assert list(under_way) == in_order
            last = in_order[size - 2 :] if rank == size - 1 else in_order[size - 1 :]  # what the last tile completes
            assert [name for name, count in under_way.items() if count == 0] == last

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
        step(8, 4, num_pairs=2)  # a pair's last sums leave under the next pair's tiles
        first_waits = log.index(f"reduce {size - 1} is waited for")
        assert log[log.index(f"reduce {size - 1} starts") : first_waits].count("tile") > 0


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
    """A ring takes O(b D) whatever the number of ranks; a gather takes the whole batch's columns, O(B D), once."""
    columns_bytes = WHOLE * WIDTH * 4  # of one rank
    for kind in KINDS:
        assert 1.9 <= on_4[kind, True, WHOLE] / on_4[kind, True, HALF] <= 2.1
        if on_2 is not None:
            assert on_4[kind, True, WHOLE] <= 1.02 * on_2[kind, True, WHOLE]  # twice B D, the same b D
            assert on_4[kind, True, HALF] <= 0.6 * on_2[kind, True, WHOLE]  # the same B D
            assert on_4[kind, False, WHOLE] - on_2[kind, False, WHOLE] >= 1.9 * columns_bytes  # two ranks' columns more


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for size in (2, 4):
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
        check_overlap()
        found[size] = peaks()
        dist.destroy_process_group()
    check_memory(found.get(2), found[4])


@pytest.mark.distributed
def test_overlap_and_memory(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=4)
