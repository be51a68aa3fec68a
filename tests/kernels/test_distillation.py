"""Values and gradients of distillation against the dense float64 reference and the published formulas."""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from threetowers.kernels import (
    DistillationPair,
    Teacher,
    contrastive_loss,
    distillation_loss,
    distillation_losses,
    reference_contrastive_loss,
    reference_distillation_loss,
)

pytestmark = pytest.mark.usefixtures("small_tiles")
KINDS: list[Any] = ["softmax", "sigmoid"]
WIDTHS = [7, 1, 16, 3]  # of up to four teachers


def students(total: int, width: int = 12, **options: Any) -> list[Tensor]:
    g = torch.Generator().manual_seed(total)
    x_BD = torch.randn(total, width, generator=g, dtype=torch.float64)
    y_BD = x_BD + torch.randn(total, width, generator=g, dtype=torch.float64)
    return [normalize(part).to(**options).requires_grad_() for part in (x_BD, y_BD)]


def teachers(total: int, count: int, kind: str, log_scale: float = 1.0) -> list[Teacher]:
    g = torch.Generator().manual_seed(count)
    made = []
    for k, width in enumerate(WIDTHS[:count]):
        u_BE = torch.randn(total, width, generator=g)
        v_BE = u_BE + 0.5 * torch.randn(total, width, generator=g)
        bias = torch.tensor([-1.0 - k]) if kind == "sigmoid" else None
        made.append(Teacher(normalize(u_BE), normalize(v_BE), torch.tensor([log_scale + k / 3]), bias, 1.0 + k))
    return made


def scalars(kind: str, log_scale: float = 1.5, **options: Any) -> dict[str, Tensor | None]:
    bias = torch.tensor([-2.0], **options).requires_grad_() if kind == "sigmoid" else None
    return {"log_scale": torch.tensor([log_scale], **options).requires_grad_(), "bias": bias}


def gradients(loss: Tensor, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None) -> list[Tensor]:
    leaves = [leaf for leaf in (x, y, log_scale, bias) if leaf is not None and leaf.requires_grad]
    return list(torch.autograd.grad(loss, leaves))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float, absolute: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm() + absolute


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("total", [1, 2, 63, 130])
def test_equals_the_reference(kind: Any, count: int, total: int) -> None:
    # A log_scale's gradient may be far less than the terms near 1 that it is summed of, which float32 rounds.
    for dtype, *tolerance in ((torch.float64, 1e-10, 1e-12), (torch.float32, 2e-5, 2e-7)):
        x_BD, y_BD = students(total, dtype=dtype)
        options = scalars(kind, dtype=dtype)
        taught = teachers(total, count, kind)
        for hard_weight in (0.0, 0.25):
            for ids in (None, torch.arange(total) // 3):
                more: Any = {"kind": kind, "group_ids": ids, "hard_weight": hard_weight}
                loss = distillation_loss(x_BD, y_BD, teachers=taught, **options, **more)
                truth = reference_distillation_loss(x_BD, y_BD, teachers=taught, **options, **more)
                assert_close([loss.detach()], [truth.detach()], *tolerance)
                if total > 1:  # of a single pair the softmax's gradient is rounding alone
                    found = gradients(loss, x_BD, y_BD, **options)  # type: ignore[arg-type]
                    assert_close(found, gradients(truth, x_BD, y_BD, **options), *tolerance)  # type: ignore[arg-type]


@pytest.mark.parametrize("cache_bytes", [0, 60_000, 10_000_000])
def test_the_logit_cache_changes_no_bit(cache_bytes: int) -> None:
    taught = teachers(130, 2, "softmax")
    found = []
    for budget in (0, cache_bytes):
        x_BD, y_BD = students(130, dtype=torch.float32)
        options = scalars("softmax")
        loss = distillation_loss(x_BD, y_BD, teachers=taught, **options, logit_cache_bytes=budget)  # type: ignore[arg-type]
        found.append(gradients(loss, x_BD, y_BD, **options))  # type: ignore[arg-type]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_of_own_pairs_is_the_contrastive_loss(kind: Any) -> None:
    x_BD, y_BD = students(70, dtype=torch.float32)
    options = scalars(kind)
    taught = teachers(70, 1, kind)
    loss = distillation_loss(x_BD, y_BD, teachers=taught, hard_weight=1.0, kind=kind, **options)  # type: ignore[arg-type]
    expected = contrastive_loss(x_BD, y_BD, kind=kind, **options)  # type: ignore[arg-type]
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sure_teacher_gives_the_contrastive_loss_with_its_accuracy(kind: Any) -> None:
    """Confident pairs: losses of 1e-6 and less keep their relative accuracy, and so do their gradients."""
    eye_BD = torch.eye(60)
    bias = torch.tensor([-20.0]) if kind == "sigmoid" else None
    sure = Teacher(eye_BD, eye_BD, torch.tensor([4.0]), bias)
    x_BD = eye_BD.clone().requires_grad_()
    y_BD = (eye_BD + 0.01).requires_grad_()
    log_scale = torch.tensor([3.0], requires_grad=True)
    student_bias = None if bias is None else torch.tensor([-8.0], requires_grad=True)
    loss = distillation_loss(x_BD, y_BD, log_scale, [sure], bias=student_bias, kind=kind)
    truth = reference_distillation_loss(x_BD, y_BD, log_scale, [sure], bias=student_bias, kind=kind)
    hard = reference_contrastive_loss(x_BD, y_BD, log_scale, bias=student_bias, kind=kind)
    assert_close([loss.detach()], [truth.detach()], 1e-5)
    assert_close([loss.detach()], [hard.detach()], 1e-3)
    arguments = x_BD, y_BD, log_scale, student_bias
    assert_close(gradients(loss, *arguments), gradients(truth, *arguments), 1e-5)


def test_equals_the_published_formula() -> None:
    """MobileCLIP's loss: the mean over teachers and directions of KL divergences, whose gradient is the same."""
    x_BD, y_BD = students(40, dtype=torch.float64)
    log_scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    taught = [teacher._replace(weight=1.0) for teacher in teachers(40, 2, "softmax")]
    logits_BB = log_scale.exp() * x_BD @ y_BD.T
    divergences, entropies = [], []
    for teacher in taught:
        teacher_BB = (teacher.log_scale.exp() * teacher.u @ teacher.v.T).double()
        for student_BB, target_BB in ((logits_BB, teacher_BB), (logits_BB.T, teacher_BB.T)):
            target_BB = target_BB.softmax(1)
            divergences.append(cross_entropy(student_BB, target_BB) + (target_BB * target_BB.log()).sum(1).mean())
            entropies.append(-(target_BB * target_BB.log()).sum(1).mean())
    expected = torch.stack(divergences).mean()
    loss = distillation_loss(x_BD, y_BD, log_scale, taught)
    assert_close([loss.detach()], [(expected + torch.stack(entropies).mean()).detach()], 1e-7)
    leaves = x_BD, y_BD, log_scale, None
    assert_close(gradients(loss, *leaves), gradients(expected, *leaves), 1e-6)


def test_sample_losses_average_to_the_loss() -> None:
    for kind in KINDS:
        x_BD, y_BD = students(50, dtype=torch.float32)
        pair = DistillationPair(
            x_BD, y_BD, torch.ones(1), teachers(50, 2, kind), torch.zeros(1) if kind == "sigmoid" else None
        )
        (result,) = distillation_losses([pair], kind=kind)
        assert result.sample_losses.shape == (50,)
        torch.testing.assert_close(result.sample_losses.mean(), result.loss.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_sides_and_swapped_pairs(kind: Any) -> None:
    """Whichever side needs a gradient, it is the same; teachers get none even where they could."""
    taught = [teacher._replace(u=teacher.u.requires_grad_()) for teacher in teachers(70, 2, kind)]
    options = scalars(kind)
    truth = gradients(
        reference_distillation_loss(*(pair := students(70)), teachers=taught, kind=kind, **options),  # type: ignore[arg-type]
        *pair,
        *options.values(),  # type: ignore[arg-type]
    )
    for frozen in (0, 1):
        sides = students(70, dtype=torch.float32)
        sides[frozen] = sides[frozen].detach()
        loss = distillation_loss(*sides, teachers=taught, kind=kind, **options)  # type: ignore[arg-type]
        (found,) = torch.autograd.grad(loss, [sides[1 - frozen]])
        assert_close([found], [truth[1 - frozen]], 2e-5)
    assert taught[0].u.grad is None


def test_zero_weights_leave_a_teacher_out() -> None:
    x_BD, y_BD = students(30, dtype=torch.float32)
    good, other = teachers(30, 2, "softmax")
    absent = other._replace(weight=0.0, u=torch.full_like(other.u, torch.nan))
    alone = distillation_loss(x_BD, y_BD, torch.ones(1), [good])
    assert torch.equal(distillation_loss(x_BD, y_BD, torch.ones(1), [good, absent]), alone)


def test_what_does_not_fit() -> None:
    x_BD, y_BD = (part.detach() for part in students(5, dtype=torch.float32))
    (teacher,) = teachers(5, 1, "softmax")
    scale = torch.ones(1)

    def refused(message: str, *taught: Teacher, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            distillation_loss(x_BD, y_BD, scale, taught, **options)

    refused("0 teachers are given, none with a weight above 0")
    refused("1 teachers are given, none", teacher._replace(weight=0.0))
    refused("the weight of teacher 0 is -1", teacher._replace(weight=-1.0))
    refused("hard_weight is 1.5; expected a number from 0 to 1", teacher, hard_weight=1.5)
    refused("teacher 1: u has 4 rows and x 5", teacher, teacher._replace(u=teacher.u[:4], v=teacher.v[:4]))
    refused(r"teacher 0: u has shape \(5, 7\) and v \(5, 6\)", teacher._replace(v=teacher.v[:, :6]))
    refused("teacher 0: bias is given", teacher._replace(bias=scale))
    refused("NaN or infinite values in v of teacher 0 of pair 0", teacher._replace(v=teacher.v * torch.nan))
    refused("teacher 0 of pair 0: log_scale is 99", teacher._replace(log_scale=scale * 99))
    refused(
        "values of u reach 1.0e\\+30 and of v 1.0e\\+30",
        teacher._replace(u=teacher.u * 0 + 1e30, v=teacher.v * 0 + 1e30),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("noise", [0.1, 1.0, 8.0])  # sure, and ever flatter
def test_gradients_at_any_scale(kind: Any, count: int, noise: float) -> None:
    """Within 1e-5 of float64, or hardly further off than float32 with all logits in memory is."""

    def noisy(seed: int, width: int, noise: float) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)
        x_BD = torch.randn(200, width, generator=g)
        return [normalize(x_BD), normalize(x_BD + noise * torch.randn(200, width, generator=g))]

    for scale, teacher_scale in itertools.product((1.0, 14.3, 100.0), repeat=2):
        taught = [
            Teacher(*noisy(1 + k, 24, [1.0, noise, 0.3][k]), torch.tensor([teacher_scale]).log()) for k in range(count)
        ]
        outcomes = []
        for dtype, function in (
            (torch.float32, distillation_loss),
            (torch.float32, functools.partial(reference_distillation_loss, dtype=torch.float32)),
            (torch.float64, reference_distillation_loss),
        ):
            x_BD, y_BD = (part.to(dtype, copy=True).requires_grad_() for part in noisy(0, 48, noise))
            options = scalars(kind, torch.tensor(scale).log().item(), dtype=dtype)
            loss = function(x_BD, y_BD, teachers=taught, kind=kind, **options)  # type: ignore[operator]
            outcomes.append([part.double() for part in gradients(loss, x_BD, y_BD, **options)])  # type: ignore[arg-type]
        for name, found, dense, truth in zip(("dx", "dy", "scale", "bias"), *outcomes, strict=False):
            error, dense_error = ((part - truth).norm() / truth.norm() for part in (found, dense))
            assert error <= max(1e-5, 1.5 * dense_error), (name, scale, teacher_scale, float(error), float(dense_error))
