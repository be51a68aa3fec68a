"""Real gloo processes: on 1, 2, 3 and 4 ranks, values and averaged gradients are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from threetowers.kernels import (
    Pair,
    contrastive_loss,
    contrastive_losses,
    dense_accuracies,
    dense_contrastive_loss,
)
from threetowers.kernels import operators as operator
from threetowers.kernels.backends import backend_for
from threetowers.kernels.tiles import TileBackend

SHARDS = {1: [9], 2: [70, 33], 3: [40, 0, 90], 4: [60, 13, 1, 5]}  # uneven, one of them empty
WIDTH = 12


def batch(total: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(total)
    x_BD = torch.randn(total, WIDTH, generator=g)
    return x_BD, x_BD + torch.randn(total, WIDTH, generator=g), torch.randint(0, total, (total,), generator=g)


def own_rows(group: Any) -> slice:
    sizes, rank = SHARDS[group.size()], group.rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def leaves_for(family: str) -> list[Tensor]:
    """A linear head for each side, log_scale and bias, as a trainer has them on every rank."""
    g = torch.Generator().manual_seed(1)
    heads = [torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=g) for _ in range(2)]
    values = [*heads, torch.tensor([-0.5]), torch.tensor([-0.7])]
    return [value.requires_grad_() for value in values[: 4 if family == "sigmoid" else 3]]


def assert_averaged(group: Any, leaves: list[Tensor], twins: list[Tensor]) -> None:
    """What data-parallel averaging makes of the ranks' gradients is one process's gradient."""
    for k, (leaf, twin) in enumerate(zip(leaves, twins, strict=True)):
        assert leaf.grad is not None, k
        assert twin.grad is not None
        dist.all_reduce(leaf.grad, group=group)
        difference = (leaf.grad.double() / group.size() - twin.grad).norm()
        assert difference <= 1e-5 * twin.grad.norm() + 1e-7, (group.size(), k, float(difference))


def check_single(
    group: Any, family: Any, *, with_ids: bool, reduction: Any, workspace: int, dtype: Any, ring: bool
) -> None:
    x_BD, y_BD, ids_B = batch(sum(SHARDS[group.size()]))
    ids, mine = ids_B if with_ids else None, own_rows(group)
    weights_B = torch.linspace(0.1, 2, len(x_BD)) / len(x_BD)
    leaves = leaves_for(family)
    loss = contrastive_loss(
        (x_BD[mine] @ leaves[0]).to(dtype), (y_BD[mine] @ leaves[1]).to(dtype), leaves[2].to(dtype),
        bias=leaves[3].to(dtype) if family == "sigmoid" else None, family=family, process_group=group,
        sample_ids=None if ids is None else ids[mine], workspace_bytes=workspace, reduction=reduction, ring=ring,
    )  # fmt: skip
    # ranks' weighted sums are averaged like gradients are: times W they are the joined batch's weighted sum
    value = (loss * weights_B[mine]).sum() * group.size() if reduction == "none" else loss
    value.backward()
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = dense_contrastive_loss(
        x_BD.double() @ twins[0], y_BD.double() @ twins[1], twins[2], bias=twins[3] if family == "sigmoid" else None,
        family=family, sample_ids=ids, reduction=reduction,
    )  # fmt: skip
    (truth * weights_B.double()).sum().backward() if reduction == "none" else truth.backward()
    torch.testing.assert_close(
        loss.double(), truth[mine] if reduction == "none" else truth, rtol=1e-5, atol=1e-6, check_dtype=False
    )
    assert_averaged(group, leaves, twins)


def check_pairs(group: Any, family: Any, ring: bool) -> None:
    """Three terms in one call, as three towers have: one side frozen, one width and dtype of its own, one with fewer
    samples."""
    x_BD, y_BD, _ = batch(sum(SHARDS[group.size()]))
    z_BD, mine = x_BD.flip(1)[:, :5].contiguous(), own_rows(group)
    some = torch.arange(len(x_BD)) % 3 > 0  # a term that only these samples have
    leaves, twins = leaves_for("sigmoid"), [leaf.detach().double().requires_grad_() for leaf in leaves_for("sigmoid")]
    bias, twin_bias = (leaves[3], twins[3]) if family == "sigmoid" else (None, None)
    x, y, z, has = x_BD[mine] @ leaves[0], y_BD[mine] @ leaves[1], z_BD[mine], some[mine]
    pairs = [
        Pair(x, y, leaves[2], bias),
        Pair(z.double(), x[:, :5].double(), leaves[2], bias),
        Pair(y_BD[mine][has], y[has], leaves[2], bias),
    ]
    results = contrastive_losses(pairs, family=family, process_group=group, ring=ring)
    (results[0].loss + 2 * results[1].loss + 3 * results[2].loss).backward()
    xx, yy = x_BD.double() @ twins[0], y_BD.double() @ twins[1]
    sides = [(xx, yy), (z_BD.double(), xx[:, :5]), (y_BD.double()[some], yy[some])]
    truth = [dense_contrastive_loss(a, b, twins[2], bias=twin_bias, family=family) for a, b in sides]
    (truth[0] + 2 * truth[1] + 3 * truth[2]).backward()
    for result, want, (a, b) in zip(results, truth, sides, strict=True):
        assert float(result.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
        accuracies = [float(part) for part in dense_accuracies(a.detach(), b.detach())]
        assert [float(result.accuracy_xy), float(result.accuracy_yx)] == pytest.approx(accuracies, abs=1e-6)
    used = slice(None) if family == "sigmoid" else slice(3)
    assert_averaged(group, leaves[used], twins[used])


class Towers(torch.nn.Module):
    """Two linear towers, a scale and perhaps a bias, as one module that data-parallel training wraps."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.parts = torch.nn.ParameterList([torch.nn.Parameter(leaf.detach()) for leaf in leaves_for(family)])

    def forward(self, x_bD: Tensor, y_bD: Tensor) -> tuple[Tensor, ...]:
        return x_bD @ self.parts[0], y_bD @ self.parts[1], *self.parts[2:]


def check_under_ddp(group: Any, family: Any) -> None:
    """torch's own wrapper does the averaging."""
    x_BD, y_BD, _ = batch(sum(SHARDS[group.size()]))
    towers, mine = DistributedDataParallel(Towers(family), process_group=group), own_rows(group)
    x, y, log_scale, *bias = towers(x_BD[mine], y_BD[mine])
    options = {"family": family, "process_group": group}
    contrastive_loss(x, y, log_scale, bias=bias[0] if bias else None, **options).backward()
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves_for(family)]
    sides = x_BD.double() @ twins[0], y_BD.double() @ twins[1]
    dense_contrastive_loss(*sides, twins[2], bias=twins[3] if bias else None, family=family).backward()
    for leaf, twin in zip(towers.parameters(), twins, strict=True):
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-5, atol=1e-6)


def check_refusals(group: Any) -> None:
    """One rank is at fault; all raise, and name it. Then the group still works."""
    x_bD, scale = torch.ones(3, 4), torch.tensor([1.0])
    culprit = group.rank() == group.size() - 1
    name = f"rank {group.size() - 1}: "
    cases: list[tuple[dict[str, Any], str]] = [
        ({"y": torch.ones(3, 5)}, name + "x has shape"),
        ({"x": "features"}, name + "x is a str"),
        ({"x": x_bD / 0}, name + "NaN or infinite values in x"),
        ({"sample_ids": torch.arange(2)}, name + "sample_ids has shape"),
        ({"x": torch.ones(3, 6), "y": torch.ones(3, 6)}, "ranks call the loss with different arguments"),
        ({"sample_ids": torch.arange(3)}, "ranks call the loss with different arguments"),
        ({"x": torch.ones(3, 4, requires_grad=True)}, "ranks call the loss with different arguments"),
        ({"log_scale": torch.tensor([1.5])}, "log_scale differs between ranks"),
    ]
    for change, message in cases:
        arguments: dict[str, Any] = {"x": x_bD, "y": x_bD, "log_scale": scale} | (change if culprit else {})
        with pytest.raises(ValueError, match=message):
            contrastive_loss(**arguments, process_group=group)
    with pytest.raises(ValueError, match="the global batch is empty"):
        contrastive_loss(x_bD[:0], x_bD[:0], scale, process_group=group)
    assert contrastive_loss(x_bD, x_bD, scale, process_group=group) > 0


def small_backend(x_bD: Tensor) -> TileBackend:
    backend = backend_for(x_bD)
    backend.rows, backend.cols = 16, 32
    return backend


def _worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    operator.backend_for = small_backend  # type: ignore[attr-defined]  # several tiles in every shard
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    groups = [dist.new_group(list(range(4 - size, 4))) for size in SHARDS]  # rank 0 is in the last alone
    for group in groups:
        if rank not in dist.get_process_group_ranks(group):
            with pytest.raises(ValueError, match="no member of process_group"):
                contrastive_loss(torch.ones(2, 2), torch.ones(2, 2), torch.ones(1), process_group=group)
            continue
        for family in ("softmax", "sigmoid"):
            plain = {"with_ids": False, "reduction": "mean", "workspace": 0, "dtype": torch.float32, "ring": False}
            for change in ({}, {"with_ids": True}, {"reduction": "none"}, {"reduction": "sum"}, {"workspace": 5000}):
                check_single(group, family, **(plain | change))
            check_single(group, family, **(plain | {"dtype": torch.float64, "with_ids": True}))
            for change in ({}, {"reduction": "none", "with_ids": True}, {"workspace": 5000}):
                check_single(group, family, **(plain | {"ring": True} | change))
            for ring in (False, True):
                check_pairs(group, family, ring)
        if group.size() > 1:
            for family in ("softmax", "sigmoid"):
                check_under_ddp(group, family)
            check_refusals(group)
    x_bD = torch.full((2, 2), float(rank))
    default = contrastive_loss(x_bD, x_bD, torch.zeros(1))  # the default group
    x_BD = torch.arange(4.0).repeat_interleave(2)[:, None].expand(8, 2)
    torch.testing.assert_close(default.double(), dense_contrastive_loss(x_BD, x_BD, torch.zeros(1)))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path / "store"),), nprocs=4)
