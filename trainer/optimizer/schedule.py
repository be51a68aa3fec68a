"""The learning rate as a function of the step: warm-up, then a cosine, a constant or a reciprocal square root."""

import math
from dataclasses import dataclass

from threetowers.trainer.config import Duration, Optim


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run, with its spans resolved to steps."""

    optim: Optim
    total: int
    warmup: int
    cooldown: int

    @classmethod
    def of(cls, optim: Optim, total: int, samples: int, batch: int) -> "Schedule":
        """Resolve the spans of a schedule.

        Args:
            optim: The section of the config.
            total: Steps of the run.
            samples: Samples of one epoch.
            batch: The global batch size.
        """

        def steps(span: float | Duration) -> int:
            return span.in_steps(samples, batch, total) if isinstance(span, Duration) else round(span * total)

        return cls(optim, total, steps(optim.warmup), steps(optim.cooldown))

    def problems(self) -> list[str]:
        """Return what does not fit into the run, for its summary."""
        optim = self.optim
        found = []
        if self.warmup >= self.total:
            last = self.rate(self.total - 1)
            found.append(
                f"the warm-up of {self.warmup:,} steps is not shorter than the run of {self.total:,}: the learning "
                f"rate only rises, to {last:.3g} of optim.lr {optim.lr:.3g}; shorten optim.warmup or lengthen duration"
            )
        elif self.warmup + self.cooldown > self.total:
            found.append(
                f"the warm-up of {self.warmup:,} steps and the cooldown of {self.cooldown:,} do not both fit into the "
                f"run of {self.total:,}: the learning rate stays below optim.lr {optim.lr:.3g}; shorten optim.warmup "
                "or optim.cooldown, or lengthen duration"
            )
        return found

    def first_difference(self, other: "Schedule", steps: int) -> int | None:
        """Return the first of so many steps, counted from 0, with another learning rate; None if there is none."""
        return next((step for step in range(steps) if self.rate(step) != other.rate(step)), None)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        optim = self.optim
        end = optim.lr_end
        if step < self.warmup:
            return optim.lr * (step + 1) / self.warmup
        if optim.schedule == "cosine":
            progress = (step - self.warmup) / max(1, self.total - self.warmup)
            return optim.lr * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))
        # A level relative to lr, which the cooldown brings down to its end.
        level = 1.0 if optim.schedule == "constant" else math.sqrt(max(1, self.warmup) / (step + 1))
        left = self.total - step  # steps to go, including this one
        if left < self.cooldown:
            level *= end + (1 - end) * left / self.cooldown
        return optim.lr * level
