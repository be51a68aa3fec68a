"""Adafactor in the form vision-language papers train with: factored second moments, a first moment in bfloat16."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SMALLEST_FACTORED = 32  # a matrix with a shorter side keeps its whole second moment
DECAY = 0.8  # the second moment of step t forgets by 1 - t^-DECAY, until that reaches beta2
EPSILON = 1e-30


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) as Zhai et al. 2022 (arXiv 2106.04560) changed it.

    The learning rate is given, not relative to a parameter's size; updates are not clipped one by one; the first moment
    is an average of the updates, without bias correction, in half precision. Weight decay is decoupled. Second moments
    of a tensor with two sides of at least 32 are kept as means over rows and columns, of its two longest sides.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("Adafactor takes no closure; compute gradients before calling step")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        sides = factored_sides(p)
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
            for name, side in (("row", sides[1]), ("column", sides[0])) if sides else (("exp_avg_sq", None),):
                state[name] = torch.zeros_like(p if side is None else p.mean(side, keepdim=True))
        state["step"] += 1
        decay = min(beta2, 1 - float(state["step"]) ** -DECAY)
        square = p.grad.square() + EPSILON  # type: ignore[union-attr]
        if sides:
            for name, side in (("row", sides[1]), ("column", sides[0])):
                state[name].lerp_(square.mean(side, keepdim=True), 1 - decay)
            row = state["row"] / state["row"].mean(sides[0], keepdim=True)
            update = p.grad * row.rsqrt() * state["column"].rsqrt()
        else:
            state["exp_avg_sq"].lerp_(square, 1 - decay)
            update = p.grad * state["exp_avg_sq"].rsqrt()
        update = beta1 * state["exp_avg"].to(p.dtype) + (1 - beta1) * update
        state["exp_avg"].copy_(update)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def factored_sides(p: Tensor) -> tuple[int, int] | None:
    """Return the two longest sides of a tensor, the shorter first; None if one of them is below 32."""
    if p.ndim < 2:
        return None
    order = sorted(range(p.ndim), key=lambda side: p.shape[side])
    return None if p.shape[order[-2]] < SMALLEST_FACTORED else (order[-2], order[-1])
