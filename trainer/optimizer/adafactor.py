"""Adafactor as vision-language papers use it: factored second moments, a first moment in bfloat16.

timm's AdafactorBigVision differs in one point: it applies the momentum as it is stored, rounded to bfloat16. Here, as
in optax and big_vision, the update is applied in the parameter's precision and only the stored average is rounded.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SMALLEST_FACTORED = 32  # a matrix with a shorter side keeps its complete second moment
DECAY_EXPONENT = 0.8  # step t multiplies the second moment by 1 - t^-0.8, until that reaches beta2
SQUARE_OFFSET = 1e-30


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) as modified by Zhai et al. 2022 (arXiv 2106.04560).

    The learning rate is given, not relative to a parameter's size; updates are not clipped one by one; the first moment
    is an average of the updates, without bias correction, in bfloat16. Weight decay is decoupled. Second moments of a
    tensor with two sides of at least 32 are kept as means over rows and columns, of its two longest sides.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameters or parameter groups; `betas`: momentum, and the bound of the second moment's decay."""
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("Adafactor takes no closure; compute gradients before calling step")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        beta1, beta2 = group["betas"]
        sides = factored_sides(p)
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
            if sides is None:
                state["exp_avg_sq"] = torch.zeros_like(p)
            else:
                state["row"] = torch.zeros_like(p.mean(sides[1], keepdim=True))
                state["column"] = torch.zeros_like(p.mean(sides[0], keepdim=True))
        state["step"] += 1

        # Second moment: complete, or as means over rows and columns.
        decay = min(beta2, 1 - float(state["step"]) ** -DECAY_EXPONENT)
        square = grad.square() + SQUARE_OFFSET
        if sides is None:
            state["exp_avg_sq"].lerp_(square, 1 - decay)
            update = grad * state["exp_avg_sq"].rsqrt()
        else:
            state["row"].lerp_(square.mean(sides[1], keepdim=True), 1 - decay)
            state["column"].lerp_(square.mean(sides[0], keepdim=True), 1 - decay)
            row = state["row"] / state["row"].mean(sides[0], keepdim=True)
            update = grad * row.rsqrt() * state["column"].rsqrt()

        # Momentum and decoupled weight decay.
        update = beta1 * state["exp_avg"].to(p.dtype) + (1 - beta1) * update
        state["exp_avg"].copy_(update)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def factored_sides(p: Tensor) -> tuple[int, int] | None:
    """Return the two longest sides of a tensor, the shorter first; None if one of them is below 32."""
    if p.ndim < 2:
        return None
    order = sorted(range(p.ndim), key=lambda side: p.shape[side])
    if p.shape[order[-2]] < SMALLEST_FACTORED:
        return None
    return order[-2], order[-1]
