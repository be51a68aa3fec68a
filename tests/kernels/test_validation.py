"""Arguments that are refused before any work, and the messages."""

from typing import Any

import pytest
import torch

from threetowers.kernels import Pair, ValueFault, contrastive_loss, contrastive_losses, describe_fault
from threetowers.kernels.validation import NOT_FINITE

X = torch.ones(6, 4)
SCALE = torch.tensor([1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(6, 5)}, r"x has shape \(6, 5\) and y \(6, 4\); expected the same \(batch, width\)"),
        ({"x": torch.ones(24), "y": torch.ones(24)}, "expected the same .batch, width. for both"),
        ({"x": torch.ones(6, 0), "y": torch.ones(6, 0)}, "expected the same"),
        ({"x": torch.ones(6, 4, dtype=torch.int32)}, "x is torch.int32 and y torch.float32; expected one of float32"),
        ({"y": torch.ones(6, 4).bfloat16()}, "x is torch.float32 and y torch.bfloat16"),
        ({"x": [[1.0]]}, "x is a list; expected a tensor"),
        ({"y": torch.ones(6, 4, device="meta")}, "x is on cpu, but y on meta"),
        ({"log_scale": 1.0}, "log_scale is a float; expected a tensor"),
        ({"log_scale": torch.ones(2)}, r"log_scale has shape \(2,\)"),
        ({"log_scale": torch.tensor([1])}, "log_scale has shape .* expected floating point"),
        ({"bias": SCALE}, "bias is given.*kind='sigmoid'"),
        ({"bias": torch.ones(1, 1), "kind": "sigmoid"}, r"bias has shape \(1, 1\)"),
        ({"kind": "nce"}, "kind is 'nce'; expected 'softmax' or 'sigmoid'"),
        ({"logit_cache_bytes": -1}, "logit_cache_bytes is -1; expected an integer number"),
        ({"logit_cache_bytes": 1e9}, "logit_cache_bytes is 1000000000.0; expected an integer number"),
        ({"group_ids": torch.arange(5)}, r"group_ids has shape \(5,\).*expected int64 of shape \(6,\)"),
        ({"group_ids": torch.arange(6).int()}, "group_ids has shape .* dtype torch.int32; expected int64"),
        ({"x": X * torch.nan}, "NaN or infinite values in x of pair 0"),
        ({"y": torch.full((6, 4), -torch.inf)}, "NaN or infinite values in y of pair 0"),
        ({"log_scale": torch.tensor([torch.nan])}, "NaN or infinite values in log_scale of pair 0"),
        ({"bias": torch.tensor([torch.inf]), "kind": "sigmoid"}, "NaN or infinite values in bias of pair 0"),
        ({"log_scale": torch.tensor([90.0])}, "log_scale is 90; expected between -80 and 80"),
        (
            {"x": X * 1e30, "y": X * 1e30},
            "values of x reach 1.0e.30 .* logits may reach beyond floating point; normalise x and y",
        ),
        ({"x": X[:0], "y": X[:0]}, "the global batch is empty"),
    ],
)
def test_messages(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "y": X, "log_scale": SCALE} | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)


def test_the_pair_at_fault_is_named() -> None:
    with pytest.raises(ValueError, match=r"pair 1: x has shape"):
        contrastive_losses([Pair(X, X, SCALE), Pair(X, X[:2], SCALE)])
    with pytest.raises(ValueError, match="in y of pair 1"):
        contrastive_losses([Pair(X, X, SCALE), Pair(X, X / 0, SCALE)])


def test_a_swapped_side_is_named_as_the_caller_does() -> None:
    """Only y wants a gradient: inside, the sides change places."""
    bad = (X / 0).requires_grad_()
    with pytest.raises(ValueError, match="values in y of pair 0"):
        contrastive_loss(X, bad, SCALE)
    assert describe_fault(fault_of(X, bad)) == describe_fault(ValueFault.Y_NOT_FINITE)


def fault_of(x: torch.Tensor, y: torch.Tensor, log_scale: torch.Tensor = SCALE, bias: Any = None) -> int:
    """Return what the call finds where it is not to raise."""
    kind: Any = "softmax" if bias is None else "sigmoid"
    good, result = contrastive_losses(
        [Pair(X, X, SCALE, bias and SCALE), Pair(x, y, log_scale, bias)], kind=kind, check=False
    )
    assert (good.fault.dtype, good.fault.shape, int(good.fault)) == (torch.int32, (), 0)
    assert not result.fault.requires_grad
    return int(result.fault)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((X, X), 0),
        ((X[:0], X[:0]), None),
        ((X * torch.nan, X), ValueFault.X_NOT_FINITE),
        ((X, torch.full((6, 4), -torch.inf)), ValueFault.Y_NOT_FINITE),
        ((X, X, torch.tensor([torch.nan])), ValueFault.LOG_SCALE_NOT_FINITE),
        ((X, X, torch.tensor([-torch.inf])), ValueFault.LOG_SCALE_NOT_FINITE),
        ((X, X, SCALE, torch.tensor([torch.inf])), ValueFault.BIAS_NOT_FINITE),
        ((X, X, torch.tensor([80.5])), ValueFault.LOG_SCALE_OUT_OF_RANGE),
        ((X, X, torch.tensor([-80.5])), ValueFault.LOG_SCALE_OUT_OF_RANGE),
        ((X, X, torch.tensor([-80.0])), 0),
        ((X * 1e30, X * 1e30), ValueFault.LOGITS_OVERFLOW),
        ((X * -1e30, X * 1e30, torch.tensor([90.0])), ValueFault.LOGITS_OVERFLOW | ValueFault.LOG_SCALE_OUT_OF_RANGE),
        ((X.double() * 1e30, X.double() * 1e30), 0),
    ],
)
def test_faults_of_values_without_raising(arguments: Any, expected: int | None) -> None:
    """The same faults that the messages tell of; what the host knows is raised all the same."""
    if expected is None:
        with pytest.raises(ValueError, match="pair 1: the global batch is empty"):
            fault_of(*arguments)
        return
    found = fault_of(*arguments)
    assert found & (NOT_FINITE if expected & NOT_FINITE else found) == expected
    assert describe_fault(found) == describe_fault(expected)
    assert (describe_fault(found) == "") == (found == 0)


@pytest.mark.parametrize("count", [0, 33])
def test_number_of_pairs(count: int) -> None:
    with pytest.raises(ValueError, match=f"got {count} pairs; expected 1 to 32"):
        contrastive_losses([Pair(X, X, SCALE)] * count)


def test_one_sample_has_no_negatives() -> None:
    x_BD = torch.ones(1, 1, requires_grad=True)
    loss = contrastive_loss(x_BD, x_BD.detach(), SCALE)
    loss.backward()
    assert loss == 0
    assert torch.equal(x_BD.grad, torch.zeros(1, 1))  # type: ignore[arg-type]
