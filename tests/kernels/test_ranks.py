"""Real gloo processes: on 1, 2, 3 and 4 ranks, values and averaged gradients are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from threetowers.kernels import contrastive_loss, dense_contrastive_loss

SHARDS = {1: [9], 2: [7, 5], 3: [4, 0, 9], 4: [6, 3, 1, 5]}  # uneven, one of them empty


def _batch(total: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(total, 12, generator=g)
    return x_BD, x_BD + torch.randn(total, 12, generator=g), torch.randint(0, total // 2 + 1, (total,), generator=g)


def _check_group(group: dist.ProcessGroup, family: Any, with_ids: bool) -> None:
    sizes, rank = SHARDS[group.size()], group.rank()
    x_BD, y_BD, ids_B = _batch(sum(sizes), seed=len(sizes))
    ids_B = ids_B if with_ids else None
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    # a shared linear head, as a trainer has: its averaged gradient must be one process's
    head = torch.eye(12) + 0.1
    leaves = [head.clone().requires_grad_(), torch.tensor([0.3], requires_grad=True)]
    leaves += [torch.tensor([-0.7], requires_grad=True)] if family == "sigmoid" else []
    loss = contrastive_loss(
        x_BD[mine] @ leaves[0], y_BD[mine], leaves[1], bias=leaves[2] if len(leaves) > 2 else None,
        family=family, sample_ids=None if ids_B is None else ids_B[mine], process_group=group,
    )  # fmt: skip
    loss.backward()
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = dense_contrastive_loss(
        x_BD.double() @ twins[0], y_BD, twins[1], bias=twins[2] if len(twins) > 2 else None,
        family=family, sample_ids=ids_B,
    )  # fmt: skip
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad is not None
        dist.all_reduce(leaf.grad, group=group)
        torch.testing.assert_close(leaf.grad.double() / group.size(), twin.grad, rtol=1e-4, atol=1e-5)


def _worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    groups = [dist.new_group(list(range(4 - size, 4))) for size in SHARDS]  # never starts at rank 0 but for W=4
    for group in groups:
        if rank in dist.get_process_group_ranks(group):
            for family in ("softmax", "sigmoid"):
                for with_ids in (False, True):
                    _check_group(group, family, with_ids)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path / "store"),), nprocs=4)
