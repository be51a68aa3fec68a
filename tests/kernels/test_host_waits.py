"""The operators read no number from the device. Meta tensors have none: whatever asks for one is found out."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from threetowers.kernels.distributed.rank_group import RankGroup, no_wait
from threetowers.kernels.operator import operators

SIZES = [5, 3, 0, 4]  # of the ranks; this one is the second


class MetaRanks(RankGroup):
    """One of four ranks, whose collectives return tensors of the right shape. Sizes are real: the host has them."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 1, len(SIZES)

    @override
    def serves(self, device: torch.device) -> bool:
        return True

    @override
    def gather_on_host(self, part_n: Tensor) -> Tensor:
        rows_Wn = part_n.expand(self.size, -1).clone()
        more_W = torch.tensor(SIZES) - SIZES[self.rank]
        rows_Wn[:, 2:] = torch.where(part_n[2:] > 0, part_n[2:] + more_W[:, None], 0)
        return rows_Wn

    @override
    def gather_async(self, part_n: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        return part_n.new_empty(self.size, *part_n.shape), no_wait

    @override
    def reduce_scatter_async(self, parts_Wn: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        assert len(parts_Wn) == self.size
        return torch.empty_like(parts_Wn[0]), no_wait

    @override
    def sum_(self, values_n: Tensor) -> None:
        pass

    @override
    def max_(self, values_n: Tensor) -> None:
        pass


@contextlib.contextmanager
def anywhere(x_bD: Tensor) -> Iterator[None]:
    """Stand in for what makes a GPU the current device."""
    yield


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ranks", [RankGroup, MetaRanks])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("owned", [False, True])
def test_no_number_is_read(
    kind: str, ranks: type[RankGroup], with_ids: bool, owned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With owners the first pair has five columns for its three rows, and false negatives are looked for."""
    monkeypatch.setattr(operators, "RankGroup", ranks)
    monkeypatch.setattr(operators, "_on_device_of", anywhere)
    with torch.device("meta"):
        x, y = ([torch.empty(3, 8), torch.empty(3, 6)] for _ in range(2))
        scales = [torch.empty(1), torch.empty(1)]
        bias = [torch.empty(1), torch.empty(1)] if kind == "sigmoid" else []
        ids = torch.empty(3, dtype=torch.int64) if with_ids else None
        owner, column_ids = [None, None], [None, None]
        if owned:
            y[0], owner[0] = torch.empty(5, 8), torch.empty(5, dtype=torch.int64)
            column_ids[0] = torch.empty(5, dtype=torch.int64) if with_ids else None
        u, v = ([torch.empty(3, 5)] for _ in range(2))
        teacher = u, v, [torch.empty(1)], [torch.empty(1)] if kind == "sigmoid" else []
    needs = [True, False], [True, True], [True, True]
    options = 0.5 if owned else None, kind, 100, False, *needs, [False, False]
    of_columns = owner, column_ids, ids
    teachers = *teacher, [0, 1], [0.5]
    saved = operators.contrastive_forward._init_fn(x, y, scales, bias, *teachers, *of_columns, *options, False)
    grads = [torch.empty((), device="meta")] * 2
    flat = operators.contrastive_backward._init_fn(grads, x, y, u, v, owner, saved, [0, 1], [0.5], kind, False, *needs)
    assert [part.shape for part in flat[2:4]] == [(5 if owned else 3, 8), (3, 6)]
    assert [part.shape for part in flat[:2]] == [(3, 8), (0,)]
    with pytest.raises(RuntimeError, match="meta"):  # which does read
        operators.contrastive_forward._init_fn(x, y, scales, bias, *teachers, *of_columns, *options, True)
