"""The public loss on one process: value and gradients against the float64 reference, on the same device."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.gpu.setting import Setting
from threetowers.kernels import (
    Teacher,
    contrastive_loss,
    distillation_loss,
    reference_contrastive_loss,
    reference_distillation_loss,
)

ELEMENTS = (torch.bfloat16, torch.float16, torch.float32)
BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-4}  # rounding of features, of gradients
GIB = 2**30


def run(setting: Setting) -> None:
    for batch, width in [(300, 40)] if setting.rehearse else [(4096, 512), (16384, 768)]:
        for kind in ("softmax", "sigmoid"):
            for element in ELEMENTS:
                check(setting, batch, width, kind, element)
    batch, width = (300, 40) if setting.rehearse else (4096, 512)
    groups_b = torch.arange(batch, device=setting.device) % (batch // 3)
    check(setting, batch, width, "softmax", torch.bfloat16, groups_b)
    check(setting, batch, width, "softmax", torch.bfloat16, None, GIB)
    for kind in ("softmax", "sigmoid"):
        for element in ELEMENTS:
            check(setting, batch, width, kind, element, groups_b, teachers=2)
    check(setting, batch, width, "softmax", torch.bfloat16, None, GIB, teachers=1)


def check(
    setting: Setting,
    batch: int,
    width: int,
    kind: str,
    element: torch.dtype,
    groups_B: Tensor | None = None,
    cache_bytes: int = 0,
    teachers: int = 0,
) -> None:
    """Raise AssertionError where an error is above what the rounding of features and gradients explains."""
    found = errors(batch, width, kind, element, setting.device, groups_B, cache_bytes, teachers)
    worst = max(found.values())
    name = str(element).removeprefix("torch.")
    extra = " groups" * (groups_B is not None) + " kept logits" * (cache_bytes > 0)
    extra += f" {teachers} teachers" * (teachers > 0)
    print(
        f"{kind} {batch} x {width} {name}{extra}: " + ", ".join(f"{part} {value:.1e}" for part, value in found.items())
    )
    setting.record(f"worst error {kind} {batch} x {width} {name}{extra}", worst, "relative")
    assert worst <= BOUNDS[element], f"{worst:.1e} is above {BOUNDS[element]:.0e}"


def errors(
    batch: int,
    width: int,
    kind: str,
    element: torch.dtype,
    device: torch.device,
    groups_B: Tensor | None = None,
    cache_bytes: int = 0,
    teachers: int = 0,
) -> dict[str, float]:
    """Return relative errors (norms) of the loss and its gradients, for the same features in float64.

    With teachers, whose widths differ, the loss is that of distillation from them.
    """
    results = []
    loss_of: Callable[..., Tensor]
    for exact in (False, True):
        dtype = torch.float64 if exact else element
        x_BD, y_BD = (z_BD.to(dtype, copy=True).requires_grad_() for z_BD in features(batch, width, element, device))
        log_scale = torch.tensor([math.log(50.0)], device=device, dtype=torch.promote_types(dtype, torch.float32))
        log_scale.requires_grad_()
        bias = torch.full_like(log_scale, -8.0).requires_grad_() if kind == "sigmoid" else None
        options: dict[str, Any] = {"bias": bias, "kind": kind, "group_ids": groups_B}
        if not exact:
            options["logit_cache_bytes"] = cache_bytes
        if teachers:
            taught = [teacher(batch, width // (2 + k), element, device, kind, dtype) for k in range(teachers)]
            loss_of = reference_distillation_loss if exact else distillation_loss
            loss = loss_of(x_BD, y_BD, log_scale, taught, hard_weight=0.25, **options)
        else:
            loss_of = reference_contrastive_loss if exact else contrastive_loss
            loss = loss_of(x_BD, y_BD, log_scale, **options)
        (loss * 2.0**14).backward()  # as mixed precision training does: fp16 cannot hold smaller gradients
        parts = {"loss": loss.detach(), "dx": x_BD.grad, "dy": y_BD.grad, "dscale": log_scale.grad}
        results.append({**parts, "dbias": bias.grad} if bias is not None else parts)
    got, expected = results
    return {name: float((got[name].double() - expected[name]).norm() / expected[name].norm()) for name in got}


def teacher(
    batch: int, width: int, element: torch.dtype, device: torch.device, kind: str, dtype: torch.dtype
) -> Teacher:
    """Return a teacher of other features than the student's, of numbers that `element` holds, in `dtype`."""
    u_BE, v_BE = (z_BE.to(dtype) for z_BE in features(batch, width, element, device))
    log_scale = torch.tensor([math.log(40.0)], device=device, dtype=torch.promote_types(dtype, torch.float32))
    return Teacher(u_BE, v_BE, log_scale, torch.full_like(log_scale, -6.0) if kind == "sigmoid" else None)


def features(batch: int, width: int, element: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return matched unit rows (B, D); positives stand out from the negatives by about as much as these scatter."""
    generator = torch.Generator(device).manual_seed(0)
    x_BD = torch.randn(batch, width, generator=generator, device=device)
    y_BD = x_BD + 4 * torch.randn(batch, width, generator=generator, device=device)
    return normalize(x_BD).to(element), normalize(y_BD).to(element)
