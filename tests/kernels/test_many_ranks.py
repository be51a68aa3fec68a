"""256 ranks in one process, a thread each: the loss of one process, at the calls of few ranks."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests.kernels.python_calls import ROOM, python_calls
from threetowers.kernels import contrastive_loss, reference_contrastive_loss
from threetowers.kernels.distributed.rank_group import RankGroup, no_wait
from threetowers.kernels.operator import operators

LOCAL, WIDTH = 2, 4
own = threading.local()  # the rank of each thread


class Meeting:
    """Where the threads of all ranks leave their tensors, and take what one of them makes of these."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0  # meetings held
        self._parts: list[Any] = [None] * size
        self._made: Any = None
        self._combine: Callable[[Sequence[Any]], Any] | None = None
        self._barrier = threading.Barrier(size, self._make)

    def _make(self) -> None:
        if self._combine is not None:
            self._made, self._combine = self._combine(self._parts), None
            self.count += 1

    def held(self, part: Any, combine: Callable[[Sequence[Any]], Any]) -> Any:
        self._parts[own.rank] = part
        self._combine = combine
        self._barrier.wait(timeout=60)  # the last one to come combines
        made = self._made
        self._barrier.wait(timeout=60)  # all have taken it
        return made


def thread_ranks(meeting: Meeting) -> Callable[[], RankGroup]:
    """Return what stands in for `RankGroup` in the threads of these ranks."""

    class ThreadRanks(RankGroup):
        def __init__(self) -> None:
            super().__init__()
            self.rank, self.size = own.rank, meeting.size

        @override
        def gather_on_host(self, part_n: Tensor) -> Tensor:
            return meeting.held(part_n, torch.stack)  # type: ignore[no-any-return]

        @override
        def gather_async(self, part_n: Tensor) -> tuple[Tensor, Callable[[], Any]]:
            return meeting.held(part_n, torch.stack).clone(), no_wait

        @override
        def reduce_scatter_async(self, parts_Wn: Tensor) -> tuple[Tensor, Callable[[], Any]]:
            return meeting.held(parts_Wn, lambda parts: torch.stack(parts).sum(0))[self.rank].clone(), no_wait

        @override
        def sum_(self, values_n: Tensor) -> None:
            values_n.copy_(meeting.held(values_n.clone(), lambda parts: torch.stack(parts).sum(0)))

        @override
        def max_(self, values_n: Tensor) -> None:
            values_n.copy_(meeting.held(values_n.clone(), lambda parts: torch.stack(parts).amax(0)))

    return ThreadRanks


def leaves(ranks: int, kind: str) -> list[Tensor]:
    """Return x and y (B, D), log_scale and, for the sigmoid, a bias."""
    g = torch.Generator().manual_seed(ranks)
    x_BD = torch.randn(ranks * LOCAL, WIDTH, generator=g)
    y_BD = x_BD + torch.randn(ranks * LOCAL, WIDTH, generator=g)
    return [x_BD, y_BD, torch.tensor([-0.5]), *([torch.tensor([-3.0])] if kind == "sigmoid" else [])]


def step(ranks: int, rank: int, kind: Any) -> list[Tensor]:
    """Return the loss and the gradients of this rank."""
    own.rank = rank
    x_BD, y_BD, *scalars = leaves(ranks, kind)
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    inputs = [part.clone().requires_grad_() for part in (x_BD[mine], y_BD[mine], *scalars)]
    x_bD, y_bD, log_scale, *bias = inputs
    ids = torch.arange(mine.start, mine.stop) // 3  # groups reach over ranks
    loss = contrastive_loss(x_bD, y_bD, log_scale, bias=bias[0] if bias else None, kind=kind, group_ids=ids)
    loss.backward()
    return [loss.detach(), *(part.grad for part in inputs if part.grad is not None)]


def step_of_all(ranks: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[Tensor]], int, int]:
    """Return every rank's results, the Python calls of rank 1, and the number of meetings."""
    meeting = Meeting(ranks)
    monkeypatch.setattr(operators, "RankGroup", thread_ranks(meeting))
    results: list[list[Tensor]] = [[]] * ranks
    calls = 0

    def work(rank: int) -> None:
        nonlocal calls

        def one() -> None:
            results[rank] = step(ranks, rank, kind)

        if rank == 1:
            calls = python_calls(one)
        else:
            one()

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(work, range(ranks)))
    return results, calls, meeting.count


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_calls_and_gradients_of_256_ranks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step_of_all(4, kind, monkeypatch)  # what is made once does not count
    _, few_calls, few_meetings = step_of_all(4, kind, monkeypatch)
    results, calls, meetings = step_of_all(256, kind, monkeypatch)
    assert meetings == few_meetings == {"softmax": 8, "sigmoid": 7}[kind]
    assert abs(calls - few_calls) <= ROOM

    references = [leaf.double().requires_grad_() for leaf in leaves(256, kind)]
    ids_B = torch.arange(256 * LOCAL) // 3
    options: dict[str, Any] = {"bias": references[3] if kind == "sigmoid" else None, "group_ids": ids_B}
    truth = reference_contrastive_loss(*references[:3], kind=kind, **options)
    truth.backward()
    for loss, *_ in results:
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=0)
    for at in (0, 1):  # features: each rank has its own, scaled for the averaging over ranks
        found = torch.cat([grads[at] for _, *grads in results]).double() / 256
        assert references[at].grad is not None
        assert (found - references[at].grad).norm() <= 1e-5 * references[at].grad.norm()
    for at in range(2, len(references)):  # scalars: their average
        found = torch.stack([grads[at] for _, *grads in results]).double().mean(0)
        torch.testing.assert_close(found, references[at].grad, rtol=1e-4, atol=1e-7)
