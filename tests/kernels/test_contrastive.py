"""The public loss against the float64 reference and against plain cross entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from threetowers.kernels import (
    Pair,
    contrastive_loss,
    contrastive_losses,
    reference_accuracies,
    reference_contrastive_loss,
)


def test_softmax_equals_cross_entropy_of_clip() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (normalize(torch.randn(37, 24, generator=g, dtype=torch.float64)) for _ in range(2))
    log_scale = torch.tensor([2.5], dtype=torch.float64)
    logits = log_scale.exp() * x @ y.T
    target = torch.arange(37)
    clip = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(reference_contrastive_loss(x, y, log_scale), clip)
    torch.testing.assert_close(contrastive_loss(x, y, log_scale).double(), clip, rtol=1e-5, atol=1e-5)


def test_sigmoid_equals_siglip() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (normalize(torch.randn(37, 24, generator=g, dtype=torch.float64)) for _ in range(2))
    log_scale, bias = torch.tensor([2.3], dtype=torch.float64), torch.tensor([-5.0], dtype=torch.float64)
    logits = log_scale.exp() * x @ y.T + bias
    siglip = -logsigmoid((2 * torch.eye(37) - 1) * logits).sum() / 37
    torch.testing.assert_close(reference_contrastive_loss(x, y, log_scale, bias=bias, kind="sigmoid"), siglip)
    result = contrastive_loss(x, y, log_scale, bias=bias, kind="sigmoid")
    torch.testing.assert_close(result.double(), siglip, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_pairs_losses_and_accuracies(kind: str) -> None:
    g = torch.Generator().manual_seed(1)
    x, y, z = (normalize(torch.randn(21, 16, generator=g)) for _ in range(3))
    y = normalize(x + 0.8 * y)
    log_scale, bias = torch.tensor([3.0]), torch.tensor([-4.0]) if kind == "sigmoid" else None
    results = contrastive_losses([Pair(x, y, log_scale, bias), Pair(x, z, log_scale, bias)], kind=kind)  # type: ignore[arg-type]
    for result, (a, b) in zip(results, [(x, y), (x, z)], strict=True):
        truth = reference_contrastive_loss(a, b, log_scale, bias=bias, kind=kind)
        torch.testing.assert_close(result.loss.double(), truth, rtol=1e-5, atol=1e-6)
        xy, yx = reference_accuracies(a, b)
        assert (float(result.accuracy_xy), float(result.accuracy_yx)) == pytest.approx((float(xy), float(yx)))
        assert not result.accuracy_xy.requires_grad
