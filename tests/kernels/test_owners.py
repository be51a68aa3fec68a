"""Columns with owners: several positives a row, columns that are negatives alone, and the margin of false negatives."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cross_entropy

from threetowers.kernels import (
    LossKind,
    Pair,
    ValueFault,
    contrastive_losses,
    describe_fault,
    reference_accuracies,
    reference_contrastive_loss,
)
from threetowers.kernels.backends import backend_for
from threetowers.kernels.operator import operators
from threetowers.kernels.tiles.tile_backend import TileBackend

KINDS: list[LossKind] = ["softmax", "sigmoid"]
WIDTH = 7


@dataclass(frozen=True)
class Case:
    """The rows and columns of a global batch, with owners, and what is excluded."""

    rows: int
    owner_M: Tensor
    group_ids: Tensor | None = None
    column_group_ids: Tensor | None = None
    margin: float | None = None
    scale: float = 3.0

    def leaves(self, kind: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Features near to those of the owner, log_scale, and for the sigmoid a bias."""
        g = torch.Generator().manual_seed(self.rows + 100 * len(self.owner_M))
        x_BD = torch.randn(self.rows, WIDTH, generator=g, dtype=torch.float64)
        y_MD = x_BD[self.owner_M.clamp(min=0)] + torch.randn(len(self.owner_M), WIDTH, generator=g, dtype=torch.float64)
        values = [x_BD / WIDTH, y_MD, torch.tensor([self.scale]).log(), torch.tensor([-1.0])]
        return [value.to(dtype).requires_grad_() for value in values[: 4 if kind == "sigmoid" else 3]]

    def reference(self, leaves: list[Tensor], kind: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss and the accuracies."""
        options: dict[str, Any] = {
            "group_ids": self.group_ids,
            "owner": self.owner_M,
            "column_group_ids": self.column_group_ids,
            "margin": self.margin,
        }
        x_BD, y_MD, log_scale, *bias = leaves
        loss = reference_contrastive_loss(x_BD, y_MD, log_scale, bias=bias[0] if bias else None, kind=kind, **options)
        return loss, reference_accuracies(x_BD.detach(), y_MD.detach(), **options)


def of_captions(rows: int, captions: int, **options: Any) -> Case:
    """As many captions of every sample."""
    return Case(rows, torch.arange(rows).repeat_interleave(captions), **options)


def ragged(rows: int, columns: int, **options: Any) -> Case:
    """Owners in any order and of any number, some without a column, some columns without an owner."""
    g = torch.Generator().manual_seed(rows * columns)
    owner_M = torch.randint(-1, rows, (columns,), generator=g)
    owner_M[columns // 2] = rows - 1  # one positive at least
    return Case(rows, owner_M, **options)


def with_groups(case: Case, *, columns: bool) -> Case:
    """The same with pairs of rows of one group, and groups of the columns without an owner, some of them rows'."""
    ids_M = torch.arange(len(case.owner_M)) % 13 if columns else None
    return Case(case.rows, case.owner_M, torch.arange(case.rows) // 2, ids_M, case.margin)


CASES = {
    "one row": of_captions(1, 3),
    "one row and column": of_captions(1, 1),
    "one column of many rows": Case(9, torch.tensor([4])),
    "one caption": of_captions(13, 1),
    "two captions": of_captions(53, 2),
    "three captions": of_captions(50, 3),
    "ragged": ragged(50, 131),
    "more rows than columns": ragged(90, 31),
    "groups": with_groups(ragged(50, 131), columns=False),
    "groups of columns": with_groups(ragged(50, 131), columns=True),
    "margin": ragged(50, 131, margin=0.2),
    "margin 0 and groups": with_groups(ragged(40, 99, margin=0.0), columns=True),
    "confident": of_captions(21, 1, scale=400.0),
}


def losses_of(case: Case, leaves: list[Tensor], kind: LossKind, **options: Any) -> Any:
    x_BD, y_MD, log_scale, *bias = leaves
    pair = Pair(x_BD, y_MD, log_scale, bias[0] if bias else None, case.owner_M, case.column_group_ids)
    return contrastive_losses([pair], kind=kind, group_ids=case.group_ids, margin=case.margin, **options)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("dtype", "cache_bytes"), [(torch.float64, 0), (torch.float64, 20_000), (torch.float32, 9_000)]
)
def test_loss_gradients_and_accuracies(
    kind: LossKind, name: str, dtype: torch.dtype, cache_bytes: int, small_tiles: str
) -> None:
    case = CASES[name]
    leaves, references = case.leaves(kind, dtype), case.leaves(kind)
    result = losses_of(case, leaves, kind, logit_cache_bytes=cache_bytes)
    truth, accuracies = case.reference(references, kind)
    grads = torch.autograd.grad(result.loss, leaves)
    wanted = torch.autograd.grad(truth, references)
    bound = 1e-12 if dtype == torch.float64 else 1e-4 if name == "confident" else 1e-5
    assert float((result.loss - truth).detach().abs()) <= bound * float(truth.detach())
    for found, want in zip(grads, wanted, strict=True):
        # The gradients of scale and bias are sums that cancel: what they round by is not relative to what is left.
        cancels = dtype != torch.float64 and name != "confident" and want.numel() == 1
        assert float((found.double() - want).norm()) <= bound * float(want.norm()) + (1e-7 if cancels else 0)
    found_accuracies = float(result.accuracy_xy), float(result.accuracy_yx)
    assert found_accuracies == pytest.approx([float(share) for share in accuracies], abs=1e-6)
    counted = len(case.owner_M[case.owner_M >= 0].unique()) if kind == "softmax" else case.rows
    assert float(result.sample_losses.sum()) / counted == pytest.approx(float(truth.detach()), rel=1e-5)
    assert not result.sample_losses.requires_grad


def test_captions_of_one_text_are_those_of_supervised_contrastive_learning() -> None:
    """Along rows the mean over a row's positives of cross entropies over all columns, by torch's own function."""
    case = of_captions(11, 3)
    x_BD, y_MD, log_scale = (leaf.detach() for leaf in case.leaves("softmax"))
    logits_BM = log_scale.exp() * x_BD @ y_MD.T
    rows = torch.stack([cross_entropy(logits_BM, torch.arange(11) * 3 + k) for k in range(3)]).mean()
    others = torch.arange(11)[:, None] != case.owner_M
    columns = cross_entropy(logits_BM.T, case.owner_M)
    assert others.sum() == 11 * 30
    result = losses_of(case, [x_BD, y_MD, log_scale], "softmax")
    torch.testing.assert_close(result.loss, (rows + columns) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_ids", [False, True])
def test_matched_columns_with_owners_are_as_without(kind: LossKind, with_ids: bool, small_tiles: str) -> None:
    case = of_captions(101, 1)
    ids = torch.arange(101) // 2 if with_ids else None
    results = []
    for owner in (case.owner_M, None):
        leaves = case.leaves(kind)
        x_BD, y_MD, log_scale, *bias = leaves
        pair = Pair(x_BD, y_MD, log_scale, bias[0] if bias else None, owner)
        (result,) = contrastive_losses([pair], kind=kind, group_ids=ids, margin=0.5)
        parts = [result.loss, result.accuracy_xy, result.accuracy_yx, result.sample_losses]
        results.append([*parts, *torch.autograd.grad(result.loss, leaves)])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-15)


def test_the_order_of_columns_does_not_matter() -> None:
    case = ragged(20, 61)
    order_M = torch.randperm(61, generator=torch.Generator().manual_seed(0))
    x_BD, y_MD, log_scale = (leaf.detach() for leaf in case.leaves("softmax"))
    here = losses_of(case, [x_BD, y_MD, log_scale], "softmax")
    there = losses_of(Case(20, case.owner_M[order_M]), [x_BD, y_MD[order_M], log_scale], "softmax")
    torch.testing.assert_close(here.loss, there.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(here.sample_losses, there.sample_losses, rtol=1e-12, atol=0)


def test_repeated_columns_are_no_false_negatives_by_rounding() -> None:
    """At a margin of 0 a copy of the positive in another tile, or another place of one, is not above it."""
    case = of_captions(150, 1, margin=0.0)
    g = torch.Generator().manual_seed(0)
    x_BD = torch.nn.functional.normalize(torch.randn(150, 96, generator=g))
    y_MD = torch.cat([x_BD[:1]] * 150)
    log_scale = torch.tensor([1.0])
    found = losses_of(case, [x_BD[:1].expand(150, -1).contiguous(), y_MD, log_scale], "softmax")
    assert float(found.loss.detach()) == pytest.approx(float(torch.tensor(150.0).log()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_sides_and_several_pairs(kind: LossKind) -> None:
    """A pair with owners beside a matched one in a call; a side without gradient has none, and changes no other."""
    case = ragged(30, 71)
    leaves = case.leaves(kind)
    x_BD, y_MD, log_scale, *bias = leaves
    alone = torch.autograd.grad(losses_of(case, leaves, kind).loss, leaves)
    for frozen in (0, 1):
        sides = [x_BD, y_MD]
        sides[frozen] = sides[frozen].detach()
        owned = Pair(*sides, log_scale, *(bias or [None]), case.owner_M)
        matched = Pair(x_BD, x_BD.flip(0).detach(), log_scale, *bias)
        results = contrastive_losses([matched, owned], kind=kind)
        learning = [leaf for at, leaf in enumerate(leaves) if at != frozen]
        grads = torch.autograd.grad(results[1].loss, learning)
        for found, want in zip(grads, [part for at, part in enumerate(alone) if at != frozen], strict=True):
            torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own reading
def test_opcheck(kind: LossKind) -> None:
    case = with_groups(ragged(20, 33), columns=True)
    x_BD, y_MD, log_scale, *bias = case.leaves(kind, torch.float32)
    nothing: list[Any] = [[]] * 4
    args = (
        *([x_BD], [y_MD], [log_scale], bias),
        *nothing,
        *([0], []),
        *([case.owner_M], [case.column_group_ids], case.group_ids, 0.5),
        *(kind, 2000, False, [True], [True], [True], [False], True),
    )
    torch.library.opcheck(operators.contrastive_forward, args)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles(kind: LossKind) -> None:
    case = ragged(40, 77, margin=0.5)

    def step(*leaves: Tensor) -> Tensor:
        loss: Tensor = losses_of(case, list(leaves), kind).loss
        return 2 * loss

    eager, compiled = (case.leaves(kind, torch.float32) for _ in range(2))
    step(*eager).backward()
    torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_refusals() -> None:
    x, y, scale, owner = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(1), torch.tensor([0, 1, 2, -1, 0])
    ids = torch.arange(5)
    faults: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"owner": owner[:4]}, {}, r"owner has shape \(4,\) and dtype torch.int64; expected int64 of shape \(5,\)"),
        ({"owner": owner.int()}, {}, "owner has .* dtype torch.int32"),
        ({"owner": None}, {}, r"x has shape \(3, 4\) and y \(5, 4\); expected the same"),
        ({"y": torch.ones(5, 6)}, {}, "expected .* of one width"),
        ({"column_group_ids": ids}, {}, "column_group_ids are given without group_ids of the rows"),
        ({"y": x, "owner": None, "column_group_ids": ids[:3]}, {"group_ids": ids[:3]}, "without an owner for each"),
        ({}, {"margin": -0.1}, "margin is -0.1; expected a finite number"),
        ({"owner": owner + 1}, {}, "pair 0: 1 owners are out of range; expected the numbers of local rows of x"),
        ({"owner": owner - 3}, {}, "pair 0: 4 owners are out of range"),
        ({"owner": owner * 0 - 1}, {}, "pair 0: no column has an owner"),
        ({"y": y[:0], "owner": owner[:0]}, {}, "pair 0: y is empty on all ranks"),
    ]
    for change, options, message in faults:
        pair = Pair(**({"x": x, "y": y, "log_scale": scale, "owner": owner} | change))
        with pytest.raises(ValueError, match=message):
            contrastive_losses([pair], **options)
    for wrong, fault in ((owner + 1, ValueFault.OWNER_OUT_OF_RANGE), (owner * 0 - 1, ValueFault.NO_OWNER)):
        (result,) = contrastive_losses([Pair(x, y, scale, owner=wrong)], check=False)
        assert describe_fault(int(result.fault)) == describe_fault(fault) != ""


SIZES = {2: [(20, 41), (33, 17)], 3: [(40, 90), (0, 21), (13, 0)]}  # rows and columns of each rank


def small_backend(x_bD: Tensor) -> TileBackend:
    backend = backend_for(x_bD)
    backend.rows, backend.cols = 16, 32
    return backend


def check_ranks(kind: LossKind, grouped: bool, **options: Any) -> None:
    """Check one rank's part: loss and averaged gradients are those of one process with the joined batch."""
    sizes, rank = SIZES[dist.get_world_size()], dist.get_rank()
    starts = torch.tensor([[0, 0], *sizes]).cumsum(0).tolist()
    owners = [
        ragged(rows, columns).owner_M if rows and columns else torch.full((columns,), -1) for rows, columns in sizes
    ]
    owner_M = torch.cat([owner + (owner >= 0) * start for owner, (start, _) in zip(owners, starts, strict=False)])
    whole = Case(starts[-1][0], owner_M, margin=options.pop("margin", None))
    if grouped:
        whole = with_groups(whole, columns=True)
    leaves, references = whole.leaves(kind), whole.leaves(kind)
    rows, columns = (slice(starts[rank][side], starts[rank + 1][side]) for side in (0, 1))
    own = Case(
        sizes[rank][0],
        owners[rank],
        None if whole.group_ids is None else whole.group_ids[rows],
        None if whole.column_group_ids is None else whole.column_group_ids[columns],
        whole.margin,
    )
    result = losses_of(own, [leaves[0][rows], leaves[1][columns], *leaves[2:]], kind, **options)
    grads = torch.autograd.grad(result.loss, leaves)
    truth, accuracies = whole.reference(references, kind)
    torch.testing.assert_close(result.loss, truth, rtol=1e-12, atol=0)
    found = float(result.accuracy_xy), float(result.accuracy_yx)
    assert found == pytest.approx([float(share) for share in accuracies], abs=1e-12)
    for grad, want in zip(grads, torch.autograd.grad(truth, references), strict=True):
        dist.all_reduce(grad)
        torch.testing.assert_close(grad / dist.get_world_size(), want, rtol=1e-11, atol=1e-14)
    total = result.sample_losses.sum()
    dist.all_reduce(total)
    counted = len(owner_M[owner_M >= 0].unique()) if kind == "softmax" else whole.rows
    torch.testing.assert_close(total / counted, truth.detach(), rtol=1e-11, atol=0)


def check_refusals() -> None:
    """Check that all ranks raise and name the one at fault."""
    x, y, scale, owner = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(1), torch.tensor([0, 1, 2, -1, 0])
    last = dist.get_world_size() - 1
    culprit = dist.get_rank() == last
    for change, message in (
        ({"owner": owner + 1}, f"rank {last}: pair 0: 1 owners are out of range"),
        ({"owner": owner[:2]}, f"rank {last}: owner has shape"),
        ({"y": x, "owner": None}, "ranks call the loss with different arguments"),
    ):
        pair = Pair(**({"x": x, "y": y, "log_scale": scale, "owner": owner} | (change if culprit else {})))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            contrastive_losses([pair])


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    operators.backend_for = small_backend  # type: ignore[attr-defined]  # several tiles for the columns of every rank
    for size in SIZES:
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
        check_refusals()
        for kind in KINDS:
            for ring in (False, True):
                check_ranks(kind, False, ring=ring)
                check_ranks(kind, True, ring=ring, margin=0.2)
                check_ranks(kind, False, ring=ring, logit_cache_bytes=9000)
        gc.collect()  # errors that were caught hold the group, whose threads are to end before the process does
        dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=3)
