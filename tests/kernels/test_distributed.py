"""Real gloo processes: on 1, 2, 3 and 4 ranks, values and averaged gradients are those of one process."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from threetowers.kernels import (
    DistillationPair,
    Pair,
    Teacher,
    ValueFault,
    contrastive_loss,
    contrastive_losses,
    describe_fault,
    distillation_losses,
    reference_accuracies,
    reference_contrastive_loss,
    reference_distillation_loss,
)
from threetowers.kernels.backends import backend_for
from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.operator import operators
from threetowers.kernels.tiles.tile_backend import TileBackend

SIZES = {1: [9], 2: [70, 33], 3: [40, 0, 90], 4: [60, 13, 1, 5]}  # uneven, one of them empty
WIDTH = 12


def batch(total: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(total)
    x_BD = torch.randn(total, WIDTH, generator=g)
    return x_BD, x_BD + torch.randn(total, WIDTH, generator=g), torch.randint(0, total, (total,), generator=g)


def total_of_ranks() -> int:
    return sum(SIZES[dist.get_world_size()])


def own_rows() -> slice:
    sizes, rank = SIZES[dist.get_world_size()], dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def leaves_for(kind: str) -> list[Tensor]:
    """Return a linear head for each side, log_scale and bias, the same on every rank."""
    g = torch.Generator().manual_seed(1)
    heads = [torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=g) for _ in range(2)]
    values = [*heads, torch.tensor([-0.5]), torch.tensor([-0.7])]
    return [value.requires_grad_() for value in values[: 4 if kind == "sigmoid" else 3]]


def assert_averaged(leaves: list[Tensor], references: list[Tensor]) -> None:
    """Check that the mean of the ranks' gradients is one process's gradient."""
    for k, (leaf, reference) in enumerate(zip(leaves, references, strict=True)):
        assert leaf.grad is not None, k
        assert reference.grad is not None
        dist.all_reduce(leaf.grad)
        difference = (leaf.grad.double() / dist.get_world_size() - reference.grad).norm()
        assert difference <= 1e-5 * reference.grad.norm() + 1e-7, (dist.get_world_size(), k, float(difference))


def check_single(
    kind: Any, *, with_ids: bool = False, cache_bytes: int = 0, dtype: Any = torch.float32, ring: bool = False
) -> None:
    x_BD, y_BD, ids_B = batch(total_of_ranks())
    mine = own_rows()
    ids = ids_B if with_ids else None
    leaves = leaves_for(kind)
    loss = contrastive_loss(
        (x_BD[mine] @ leaves[0]).to(dtype),
        (y_BD[mine] @ leaves[1]).to(dtype),
        leaves[2].to(dtype),
        bias=leaves[3].to(dtype) if kind == "sigmoid" else None,
        kind=kind,
        group_ids=None if ids is None else ids[mine],
        logit_cache_bytes=cache_bytes,
        ring=ring,
    )
    loss.backward()
    references = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = reference_contrastive_loss(
        x_BD.double() @ references[0],
        y_BD.double() @ references[1],
        references[2],
        bias=references[3] if kind == "sigmoid" else None,
        kind=kind,
        group_ids=ids,
    )
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert_averaged(leaves, references)


def check_pairs(kind: Any, ring: bool) -> None:
    """Check three pairs in one call: one side frozen, one of another width and dtype, one with fewer samples."""
    x_BD, y_BD, _ = batch(total_of_ranks())
    z_BD, mine = x_BD.flip(1)[:, :5].contiguous(), own_rows()
    some = torch.arange(len(x_BD)) % 3 > 0  # a term that only these samples have
    leaves, references = (
        leaves_for("sigmoid"),
        [leaf.detach().double().requires_grad_() for leaf in leaves_for("sigmoid")],
    )
    bias, reference_bias = (leaves[3], references[3]) if kind == "sigmoid" else (None, None)
    x, y, z, has = x_BD[mine] @ leaves[0], y_BD[mine] @ leaves[1], z_BD[mine], some[mine]
    pairs = [
        Pair(x, y, leaves[2], bias),
        Pair(z.double(), x[:, :5].double(), leaves[2], bias),
        Pair(y_BD[mine][has], y[has], leaves[2], bias),
    ]
    results = contrastive_losses(pairs, kind=kind, ring=ring)
    (results[0].loss + 2 * results[1].loss + 3 * results[2].loss).backward()
    xx, yy = x_BD.double() @ references[0], y_BD.double() @ references[1]
    sides = [(xx, yy), (z_BD.double(), xx[:, :5]), (y_BD.double()[some], yy[some])]
    truth = [reference_contrastive_loss(a, b, references[2], bias=reference_bias, kind=kind) for a, b in sides]
    (truth[0] + 2 * truth[1] + 3 * truth[2]).backward()
    for result, want, (a, b) in zip(results, truth, sides, strict=True):
        assert float(result.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
        accuracies = [float(part) for part in reference_accuracies(a.detach(), b.detach())]
        assert [float(result.accuracy_xy), float(result.accuracy_yx)] == pytest.approx(accuracies, abs=1e-6)
    used = slice(None) if kind == "sigmoid" else slice(3)
    assert_averaged(leaves[used], references[used])


def check_distillation(kind: Any, ring: bool) -> None:
    """Check two students in one call: two teachers of other widths, and one with hard pairs for some samples only."""
    x_BD, y_BD, _ = batch(total_of_ranks())
    mine = own_rows()
    some = torch.arange(len(x_BD)) % 3 > 0
    leaves = leaves_for(kind)
    references = [leaf.detach().double().requires_grad_() for leaf in leaves]
    sides = [(normalize(x_BD[:, :7]), normalize(y_BD[:, :7])), (normalize(x_BD[:, 2:5]), normalize(y_BD[:, 2:5]))]
    bias = torch.tensor([-1.0]) if kind == "sigmoid" else None
    taught = [Teacher(u, v, torch.tensor([1.5 - k]), bias, 1.0 + k) for k, (u, v) in enumerate(sides)]

    def students(parts: list[Tensor], rows: Any) -> list[DistillationPair]:
        x, y = x_BD[rows].to(parts[0].dtype) @ parts[0], y_BD[rows].to(parts[0].dtype) @ parts[1]
        own = [teacher._replace(u=teacher.u[rows], v=teacher.v[rows]) for teacher in taught]
        has = some[rows]
        few = [own[1]._replace(u=own[1].u[has], v=own[1].v[has])]
        scale, bias = parts[2], parts[3] if kind == "sigmoid" else None
        return [DistillationPair(x, y, scale, own, bias), DistillationPair(x[has], y[has], scale, few, bias, 0.3)]

    results = distillation_losses(students(leaves, mine), kind=kind, ring=ring, logit_cache_bytes=5000)
    (results[0].loss + 2 * results[1].loss).backward()
    truth = [
        reference_distillation_loss(
            pair.x, pair.y, pair.log_scale, pair.teachers, bias=pair.bias, hard_weight=pair.hard_weight, kind=kind
        )
        for pair in students(references, slice(None))
    ]
    (truth[0] + 2 * truth[1]).backward()
    for result, want in zip(results, truth, strict=True):
        assert float(result.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert_averaged(leaves, references)


class Towers(torch.nn.Module):
    """Two linear towers, a scale and perhaps a bias, as one module that data-parallel training wraps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.parts = torch.nn.ParameterList([torch.nn.Parameter(leaf.detach()) for leaf in leaves_for(kind)])

    def forward(self, x_bD: Tensor, y_bD: Tensor) -> tuple[Tensor, ...]:
        return x_bD @ self.parts[0], y_bD @ self.parts[1], *self.parts[2:]


def check_under_ddp(kind: Any) -> None:
    """Check gradients that torch's own wrapper averages."""
    x_BD, y_BD, _ = batch(total_of_ranks())
    towers, mine = DistributedDataParallel(Towers(kind)), own_rows()
    x, y, log_scale, *bias = towers(x_BD[mine], y_BD[mine])
    contrastive_loss(x, y, log_scale, bias=bias[0] if bias else None, kind=kind).backward()
    references = [leaf.detach().double().requires_grad_() for leaf in leaves_for(kind)]
    sides = x_BD.double() @ references[0], y_BD.double() @ references[1]
    reference_contrastive_loss(*sides, references[2], bias=references[3] if bias else None, kind=kind).backward()
    for leaf, reference in zip(towers.parameters(), references, strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)


def check_refusals() -> None:
    """Check that all ranks raise and name the one at fault, and that the group still works then."""
    x_bD, scale = torch.ones(3, 4), torch.tensor([1.0])
    last_rank = dist.get_world_size() - 1
    culprit = dist.get_rank() == last_rank
    name = f"rank {last_rank}: "
    cases: list[tuple[dict[str, Any], str]] = [
        ({"y": torch.ones(3, 5)}, name + "x has shape"),
        ({"x": "features"}, name + "x is a str"),
        ({"x": x_bD / 0}, name + "NaN or infinite values in x"),
        ({"group_ids": torch.arange(2)}, name + "group_ids has shape"),
        ({"x": torch.ones(3, 6), "y": torch.ones(3, 6)}, "ranks call the loss with different arguments"),
        ({"group_ids": torch.arange(3)}, "ranks call the loss with different arguments"),
        ({"x": torch.ones(3, 4, requires_grad=True)}, "ranks call the loss with different arguments"),
        ({"log_scale": torch.tensor([1.5])}, "log_scale differs between ranks"),
    ]
    for change, message in cases:
        arguments: dict[str, Any] = {"x": x_bD, "y": x_bD, "log_scale": scale} | (change if culprit else {})
        with pytest.raises(ValueError, match=message):
            contrastive_loss(**arguments)
    with pytest.raises(ValueError, match="the global batch is empty"):
        contrastive_loss(x_bD[:0], x_bD[:0], scale)

    # Not to raise: every rank gets the same bits, and the group still works then, too.
    for change, fault in (
        ({"x": x_bD / 0}, ValueFault.X_NOT_FINITE),
        ({"log_scale": torch.tensor([1.5])}, ValueFault.LOG_SCALE_DIFFERS),
    ):
        pair = Pair(**({"x": x_bD, "y": x_bD, "log_scale": scale} | (change if culprit else {})))  # type: ignore[arg-type]
        (result,) = contrastive_losses([pair], check=False)
        assert describe_fault(int(result.fault)) == describe_fault(fault)
    assert contrastive_loss(x_bD, x_bD, scale) > 0


def check_host_group() -> None:
    """Check that hosts talk past a backend that does not send from the CPU, as NCCL, in a group that is made once."""

    class DeviceRanks(RankGroup):
        def _device_types(self) -> list[str]:
            return ["cuda"]

    size, rank = dist.get_world_size(), dist.get_rank()
    assert DeviceRanks().gather_on_host(torch.tensor([rank, 7])).tolist() == [[r, 7] for r in range(size)]
    assert DeviceRanks().objects(f"rank {rank}") == [f"rank {r}" for r in range(size)]
    assert DeviceRanks()._host_group() is DeviceRanks()._host_group()
    assert DeviceRanks()._host_group() is not dist.group.WORLD
    assert RankGroup()._host_group() is dist.group.WORLD


def small_backend(x_bD: Tensor) -> TileBackend:
    backend = backend_for(x_bD)
    backend.rows, backend.cols = 16, 32
    return backend


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    operators.backend_for = small_backend  # type: ignore[attr-defined]  # several tiles for the columns of every rank
    for size in SIZES:
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
        for kind in ("softmax", "sigmoid"):
            check_single(kind)
            check_single(kind, with_ids=True)
            check_single(kind, cache_bytes=5000)
            check_single(kind, with_ids=True, dtype=torch.float64)
            check_single(kind, ring=True)
            check_single(kind, ring=True, with_ids=True)
            check_single(kind, ring=True, cache_bytes=5000)
            for ring in (False, True):
                check_pairs(kind, ring)
                check_distillation(kind, ring)
            if size > 1:
                check_under_ddp(kind)
        if size > 1:
            check_refusals()
            check_host_group()
        gc.collect()  # errors that were caught may hold the group, whose threads are to end before the process does
        dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=4)
