"""Values and gradients against the float64 reference, over the shapes, scales and regimes that break losses."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from threetowers.kernels import (
    Pair,
    contrastive_loss,
    contrastive_losses,
    reference_accuracies,
    reference_contrastive_loss,
)

KINDS = ["softmax", "sigmoid"]


def batch(total: int, width: int, *, dtype: torch.dtype = torch.float32, noise: float = 1.0, seed: int = 0) -> Any:
    """Return matched unit rows x and y, which are the closer the less noise there is."""
    g = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(total, width, generator=g)
    y_BD = x_BD + noise * torch.randn(total, width, generator=g)
    return [torch.nn.functional.normalize(part).to(dtype) for part in (x_BD, y_BD)]


def gradients(loss_of: Any, x_BD: Tensor, y_BD: Tensor, scale: float, kind: str, bias: float = -3.0) -> list[Tensor]:
    """Return [loss, dx, dy, d log_scale, d bias] in float64, of a copy of the inputs."""
    dtype = torch.promote_types(x_BD.dtype, torch.float32)
    leaves = [x_BD.clone(), y_BD.clone(), torch.tensor([scale], dtype=torch.float64).log().to(dtype)]
    leaves += [torch.tensor([bias], dtype=dtype)] if kind == "sigmoid" else []
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = loss_of(*leaves[:3], bias=leaves[3] if len(leaves) > 3 else None, kind=kind)
    loss.backward()
    return [loss.detach().double(), *(leaf.grad.double() for leaf in leaves)]  # type: ignore[union-attr]


def error(found: Tensor, truth: Tensor) -> float:
    """Return the relative error in the Euclidean norm."""
    return float((found - truth).norm() / truth.norm().clamp(min=1e-300))


def dense32(*args: Any, **options: Any) -> Tensor:
    return reference_contrastive_loss(*args, **options, dtype=torch.float32)


def double(x_BD: Tensor, y_BD: Tensor) -> tuple[Tensor, Tensor]:
    return x_BD.double(), y_BD.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total", [1, 2, 63, 64, 65, 70, 127, 129, 1000])
def test_any_batch_and_width(small_tiles: str, kind: str, total: int) -> None:
    for width in (1, 8, 64, 72, 96, 640, 768, 1152):
        x_BD, y_BD = batch(total, width)
        found = gradients(contrastive_loss, x_BD, y_BD, 14.3, kind)
        truth = gradients(reference_contrastive_loss, *double(x_BD, y_BD), 14.3, kind)
        torch.testing.assert_close(found[0], truth[0], rtol=2e-6, atol=1e-7)
        for a, b in zip(found[1:], truth[1:], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7, (width, error(a, b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 200.0, 1000.0])
@pytest.mark.parametrize("regime", ["unit", "unnormalised", "raised", "lowered", "equal"])
def test_hard_regimes(small_tiles: str, kind: str, scale: float, regime: str) -> None:
    """Within 1e-5 of float64, or no further off than float32 with all logits in memory is; always finite.

    A logit near 1000 is itself rounded by up to 2^-14, and the difference of two of them, whose exponential a confident
    pair's loss is, by twice that, whichever way it is computed.
    """
    x_BD, y_BD = batch(100, 48)
    if regime == "unnormalised":
        x_BD, y_BD = 7 * x_BD, 5 * y_BD
    elif regime in ("raised", "lowered"):  # by about 1000, every logit
        column_B1 = torch.full((100, 1), (1e3 / scale) ** 0.5)
        x_BD, y_BD = (torch.cat([part, column_B1], 1) for part in (x_BD, y_BD))
        y_BD[:, -1] *= 1 if regime == "raised" else -1
    elif regime == "equal":
        x_BD, y_BD = x_BD[:1].expand(100, 48), x_BD[:1].expand(100, 48)
    bias = {"raised": -1e3, "lowered": 1e3}.get(regime, -3.0)
    found = gradients(contrastive_loss, x_BD, y_BD, scale, kind, bias)
    dense = gradients(dense32, x_BD, y_BD, scale, kind, bias)
    truth = gradients(reference_contrastive_loss, *double(x_BD, y_BD), scale, kind, bias)
    assert all(part.isfinite().all() for part in found)
    for name, a, b, c in zip(("loss", "dx", "dy", "scale", "bias"), found, dense, truth, strict=False):
        rounding = 2.0**-13 if regime in ("raised", "lowered") else 1e-5
        allowed = max(rounding * c.norm(), 3 * (b - c).norm(), 1e-6 * (scale if regime == "equal" else 0))
        assert (a - c).norm() <= allowed, (name, error(a, c), error(b, c))


@pytest.mark.parametrize("margin", [7.0, 12.0, 25.0, 46.0])
def test_confident_pairs(small_tiles: str, margin: float) -> None:
    """Losses from 1e-3 to 1e-20: float32 cross entropy would give 0."""
    x_BD = torch.eye(64, 96) + 0.001 * batch(64, 96)[0]
    y_BD = torch.eye(64, 96) + 0.001 * batch(64, 96, seed=3)[0]
    scale = margin + 4.16  # 63 negatives at 0, the positive at scale
    for kind in KINDS:
        found = gradients(contrastive_loss, x_BD, y_BD, scale, kind, bias=-scale / 2)
        truth = gradients(reference_contrastive_loss, *double(x_BD, y_BD), scale, kind, bias=-scale / 2)
        for a, b in zip(found, truth, strict=True):
            assert error(a, b) <= 1e-4, (kind, error(a, b), float(truth[0]))
        assert kind == "sigmoid" or truth[0] == pytest.approx(math.exp(-margin), rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_ids_are_no_negatives(small_tiles: str, kind: str) -> None:
    for groups in (1, 3, 60, 10**6):
        x_BD, y_BD = batch(101, 16)
        ids_B = torch.randint(-groups, groups, (101,), generator=torch.Generator().manual_seed(groups)) * 2**40
        if groups == 1:
            ids_B = ids_B * 0  # all equal: no negatives at all

        def ours(*args: Any, ids_B: Tensor = ids_B, **options: Any) -> Tensor:
            return contrastive_loss(*args, group_ids=ids_B, **options)

        def reference(*args: Any, ids_B: Tensor = ids_B, **options: Any) -> Tensor:
            return reference_contrastive_loss(*args, group_ids=ids_B, **options)

        found = gradients(ours, x_BD, y_BD, 14.3, kind)
        for a, b in zip(found, gradients(reference, *double(x_BD, y_BD), 14.3, kind), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7, (groups, error(a, b))
        if groups == 1 and kind == "softmax":
            assert found[0] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features(small_tiles: str, kind: str, dtype: torch.dtype) -> None:
    """Logits never are half precision: what is left is the rounding of the gradients themselves."""
    x_BD, y_BD = batch(100, 48, dtype=dtype, noise=0.3)

    def scaled(loss: Any) -> Any:  # as mixed precision training does, else float16 gradients underflow
        return lambda *args, **options: loss(*args, **options) * 2**14

    found = gradients(scaled(contrastive_loss), x_BD, y_BD, 30.0, kind)
    truth = gradients(scaled(reference_contrastive_loss), *double(x_BD, y_BD), 30.0, kind)
    assert error(found[0], truth[0]) < 1e-5
    for a, b in zip(found[1:3], truth[1:3], strict=True):
        assert error(a, b) < 2 * torch.finfo(dtype).eps
    assert error(found[3], truth[3]) < 1e-5


def test_float64_passes_gradcheck(small_tiles: str) -> None:
    x_BD, y_BD = batch(7, 3, dtype=torch.float64)
    leaves = [
        x_BD.requires_grad_(),
        y_BD.requires_grad_(),
        torch.tensor([1.0], dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(lambda *args: contrastive_loss(*args), leaves)
    leaves.append(torch.tensor([-1.0], dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda x, y, s, b: contrastive_loss(x, y, s, bias=b, kind="sigmoid"), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logit_cache_changes_no_bit(small_tiles: str, kind: str) -> None:
    x_BD, y_BD = batch(130, 16)
    outcomes = []
    for cache_bytes in (0, 20_000, 10**6):

        def loss(*args: Any, cache_bytes: int = cache_bytes, **options: Any) -> Tensor:
            return contrastive_loss(*args, logit_cache_bytes=cache_bytes, **options)

        outcomes.append(gradients(loss, x_BD, y_BD, 14.3, kind))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_independent(small_tiles: str, kind: Any) -> None:
    """Several pairs at once: loss, accuracies and gradients are those of each alone, also where sides are shared."""
    x_BD, y_BD = batch(90, 16)
    z_BD = batch(90, 24, seed=5)[0]
    heads = [torch.randn(24, 16, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in range(2)]
    x_BD.requires_grad_()
    scale, bias = torch.tensor([2.0]), torch.tensor([-3.0]) if kind == "sigmoid" else None
    sides = [(x_BD, y_BD), (x_BD, z_BD @ heads[0]), (z_BD @ heads[1], y_BD)]
    results = contrastive_losses([Pair(a, b, scale, bias) for a, b in sides], kind=kind)
    (results[0].loss + 2 * results[1].loss - 0.5 * results[2].loss).backward()
    found = [leaf.grad for leaf in (x_BD, *heads)]
    references = [leaf.detach().double().requires_grad_() for leaf in (x_BD, *heads)]
    doubled = [
        (references[0], y_BD),
        (references[0], z_BD.double() @ references[1]),
        (z_BD.double() @ references[2], y_BD),
    ]
    truth = [reference_contrastive_loss(a, b, scale, bias=bias, kind=kind) for a, b in doubled]
    (truth[0] + 2 * truth[1] - 0.5 * truth[2]).backward()
    for result, want, (a, b) in zip(results, truth, sides, strict=True):
        assert float(result.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
        xy, yx = reference_accuracies(a.detach(), b.detach())
        assert [float(result.accuracy_xy), float(result.accuracy_yx)] == pytest.approx([float(xy), float(yx)])
    for a, reference in zip(found, references, strict=True):
        assert a is not None
        assert reference.grad is not None
        assert error(a.double(), reference.grad) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_counts_no_ties(small_tiles: str, kind: Any) -> None:
    x_BD = batch(100, 300)[0]
    y_BD = x_BD.clone()
    y_BD[1::2] = y_BD[::2]  # every caption twice: no row wins strictly, a column wins where it was copied from
    pair = Pair(x_BD, y_BD, torch.tensor([3.0]), torch.tensor([0.0]) if kind == "sigmoid" else None)
    result = contrastive_losses([pair], kind=kind)[0]
    assert (float(result.accuracy_xy), float(result.accuracy_yx)) == (0.0, 0.5)
    ids_B = torch.arange(100) // 2
    result = contrastive_losses([pair], kind=kind, group_ids=ids_B)[0]
    truth = [float(part) for part in reference_accuracies(x_BD, y_BD, group_ids=ids_B)]
    assert [float(result.accuracy_xy), float(result.accuracy_yx)] == pytest.approx(truth)


@pytest.mark.parametrize("kind", KINDS)
def test_only_wanted_gradients(small_tiles: str, kind: str) -> None:
    x_BD, y_BD = batch(60, 16)
    full = gradients(contrastive_loss, x_BD, y_BD, 14.3, kind)[1:]
    for wanted in itertools.product([False, True], repeat=len(full)):
        leaves = [x_BD.clone(), y_BD.clone(), torch.tensor([14.3]).log(), torch.tensor([-3.0])][: len(full)]
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        options: Any = {"bias": leaves[3]} if kind == "sigmoid" else {}
        loss = contrastive_loss(*leaves[:3], kind=kind, **options)  # type: ignore[arg-type]
        assert loss.requires_grad == any(wanted)
        if not any(wanted):
            continue
        loss.backward()
        for leaf, want, truth in zip(leaves, wanted, full, strict=True):
            assert (leaf.grad is not None) == want
            if want and leaf.grad is not None:
                torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-4, atol=1e-6)
