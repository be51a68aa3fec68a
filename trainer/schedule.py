"""The learning rate as a function of the step."""

import math

from threetowers.trainer.config import Optim


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """Return the rate of step `step` (0-based) of `total`: linear warm-up, then a cosine down to zero."""
    warmup = round(optim.warmup * total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
